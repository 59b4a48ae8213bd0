"""Opens one stage of a pipeline in this process."""

from __future__ import annotations

from torchship.artifact import Store
from torchship.artifact import open_stage as open_artifact_stage
from torchship.pipeline.config import StageConfig
from torchship.pipeline.describe import load_body, open_remote
from torchship.stage import FunctionStage, Stage


def open_stage(config: StageConfig, store: Store | None = None) -> Stage:
    """The stage that `config` describes, in this process and ready to run.

    Raises BadConfig, NotFound, ArtifactError, Unavailable; whatever a Python class raises when it is made.
    """
    if config.run:
        return FunctionStage(load_body(config.run), options=config.options)
    if config.artifact:
        return open_artifact_stage(
            config.artifact, store=store, device=config.device, threads=config.threads, trust=config.trust
        )
    return open_remote(config)
