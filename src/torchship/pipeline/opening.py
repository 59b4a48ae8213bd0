"""Opens one stage of a pipeline in this process."""

from __future__ import annotations

from torchship.artifact import Store
from torchship.artifact import open_stage as open_artifact_stage
from torchship.errors import StageFailed, TorchshipError
from torchship.pipeline.config import StageConfig
from torchship.pipeline.describe import load_body, open_remote
from torchship.stage import FunctionStage, Stage


def open_stage(config: StageConfig, store: Store | None = None) -> Stage:
    """The stage that `config` describes, in this process and ready to run.

    Raises BadConfig, NotFound, ArtifactError, Unavailable; StageFailed for whatever else a Python class raises when
    it is made.
    """
    if config.run:
        body = load_body(config.run)
        try:
            return FunctionStage(body, options=config.options)
        except TorchshipError:
            raise
        except Exception as fault:
            words = " ".join(str(fault).split())[:300]
            raise StageFailed(f"{config.run} cannot be made: {type(fault).__name__}: {words}") from fault
    if config.artifact:
        return open_artifact_stage(
            config.artifact, store=store, device=config.device, threads=config.threads, trust=config.trust
        )
    return open_remote(config)
