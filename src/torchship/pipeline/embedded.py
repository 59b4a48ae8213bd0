"""Reads the pipeline that an artifact of kind `pipeline` holds; its models and files lie in the same folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from torchship.artifact import Artifact, signing
from torchship.artifact import folder as folders
from torchship.errors import CorruptArtifact, UnsafeArtifact
from torchship.pipeline.config import PipelineConfig, StageConfig

FILE = "pipeline.json"
INSIDE = "artifact:"
_MAX_FILE = 2**20
_PLAIN_ROOMS = ("torchship.stages.images:", "torchship.stages.labels:", "torchship.stages.boxes:",
                "torchship.stages.text:", "torchship.stages.audio:")  # fmt: skip


def read(artifact: Artifact, *, trust: bool = False) -> PipelineConfig:
    """The pipeline in an artifact, with its models and files where they lie.

    Without `trust` or a trusted signature its Python stages may only be torchship's own plain ones, and no option may
    name a file outside. Raises UnsafeArtifact, CorruptArtifact, BadConfig.
    """
    data = folders.read(artifact.path, FILE, limit=_MAX_FILE)
    try:
        config = msgspec.json.decode(data, type=PipelineConfig)
    except msgspec.MsgspecError as fault:
        raise CorruptArtifact(f"{artifact.path / FILE}: {fault}", hint="publish the pipeline again") from None
    trusted = trust or signing.is_trusted(artifact.path, digest=artifact.digest)
    if not trusted:
        for stage in config.stages:
            _check_plain(stage, artifact)
    stages = tuple(_placed(stage, artifact.path, trust=trusted) for stage in config.stages)
    return msgspec.structs.replace(config, stages=stages)


def _check_plain(stage: StageConfig, artifact: Artifact) -> None:
    fault = ""
    if stage.remote:
        fault = "asks another server"
    elif stage.run and not stage.run.startswith(_PLAIN_ROOMS):
        fault = f"runs {stage.run}"
    elif stage.artifact and not stage.artifact.startswith(INSIDE):
        fault = f"opens {stage.artifact}, which is not part of it"
    elif any(map(_names_a_file, stage.options.values())):
        fault = "names a file outside"
    if fault:
        raise UnsafeArtifact(
            f"the pipeline {artifact.manifest.name!r} {fault}",
            hint="open it with trust=True (--trust) if you know who made it, or trust its signer's key",
        )


def _names_a_file(value: object) -> bool:
    return isinstance(value, str) and not value.startswith(INSIDE) and ("/" in value or os.path.exists(value))


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Options with every text in them changed, also in lists and tables."""
    if isinstance(value, Mapping):
        return {name: with_texts(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _placed(stage: StageConfig, root: Path, *, trust: bool) -> StageConfig:
    def place(text: str) -> str:
        inside = text.startswith(INSIDE)
        return str(root.absolute() / folders.check_path(text.removeprefix(INSIDE))) if inside else text

    options = with_texts(stage.options, place)
    return msgspec.structs.replace(
        stage, artifact=place(stage.artifact), options=options, trust=trust
    )  # its own word is no proof
