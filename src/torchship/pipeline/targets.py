"""Opens whatever was published, a model or a whole pipeline, as one Stage in this process."""

from __future__ import annotations

from pathlib import Path

from torchship.artifact import Artifact, Store, open_artifact
from torchship.pipeline.composed import Composed
from torchship.pipeline.config import PipelineConfig, StageConfig
from torchship.pipeline.planning import Plan, plan
from torchship.stage import Stage


def plan_target(
    target: Path | str, *, store: Store | None = None, device: str = "cpu", threads: int = 0, trust: bool = False
) -> Plan:
    """The plan of a published model or pipeline, as a server would run it alone. Raises what `plan` raises."""
    found = store or Store()
    path = target if isinstance(target, Path) else found.resolve(target)
    artifact = open_artifact(path, verify=False)
    stage = StageConfig(artifact=str(path.absolute()), device=device, threads=threads, trust=trust)
    return plan(PipelineConfig(artifact.manifest.name, (stage,)), found)


def open_target(
    target: Artifact | Path | str,
    *,
    store: Store | None = None,
    device: str = "cpu",
    threads: int = 0,
    trust: bool = False,
) -> Stage:
    """Open an artifact as a Stage: an Artifact, a folder, or `name`, `name@current` or `name@3` in the store.

    A model is one stage; the stages of a pipeline all run in this process. `threads=0` takes as many as there are
    cores; `trust` allows native code and foreign Python stages. Raises NotFound, ArtifactError, Unavailable.
    """
    found = store or Store()
    if isinstance(target, Artifact):
        target = target.path
    path = target if isinstance(target, Path) else found.resolve(target)
    if open_artifact(path, verify=False).manifest.kind == "model":
        return open_artifact(path).open(device=device, threads=threads, trust=trust)
    return Composed(plan_target(path, store=found, device=device, threads=threads, trust=trust), found)


open = open_target  # as `torchship.open`
