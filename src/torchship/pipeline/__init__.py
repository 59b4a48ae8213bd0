"""Pipelines: stages in a row or a graph, as plain data, checked before anything starts."""

from torchship.pipeline.composed import Composed, open_target, plan_target
from torchship.pipeline.config import PipelineConfig, StageConfig, convert
from torchship.pipeline.opening import open_stage
from torchship.pipeline.packing import pack_pipeline
from torchship.pipeline.planning import Node, Plan, plan

__all__ = [
    "Composed",
    "Node",
    "PipelineConfig",
    "Plan",
    "StageConfig",
    "convert",
    "open_stage",
    "open_target",
    "pack_pipeline",
    "plan",
    "plan_target",
]
