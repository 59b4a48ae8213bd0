"""Pipelines: stages in a row or a graph, as plain data, checked before anything starts."""

from torchship.pipeline.composed import Composed
from torchship.pipeline.config import PipelineConfig, StageConfig
from torchship.pipeline.opening import open_stage
from torchship.pipeline.planning import Node, Plan, plan

__all__ = ["Composed", "Node", "PipelineConfig", "Plan", "StageConfig", "open_stage", "plan"]
