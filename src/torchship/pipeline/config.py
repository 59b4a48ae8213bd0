"""What a pipeline is as plain data: its stages from top to bottom, as TOML, Python and an artifact hold them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec

from torchship import home, textfiles
from torchship.artifact import Artifact, signing
from torchship.artifact import folder as folders
from torchship.errors import BadConfig, CorruptArtifact, UnsafeArtifact
from torchship.stage import Value

FILE = "pipeline.json"
INSIDE = "artifact:"
_MAX_FILE = 2**20
_PLAIN_ROOMS = ("torchship.stages.images:", "torchship.stages.labels:", "torchship.stages.boxes:",
                "torchship.stages.text:", "torchship.stages.audio:")  # fmt: skip


class StageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One stage: exactly one of `run`, `artifact` and `remote` says what it is.

    `inputs` maps the stage's own input names to tensors of the pipeline (`pixels`, or `decode.pixels` for those of
    one stage), `outputs` its own output names to the names under which later stages find them. `parameters` are this
    pipeline's defaults for values that a request may set. `buckets` are lengths by the name of an axis: a server fills
    rows up to the next one, so that rows of different lengths share a batch. Several `device`s are dealt out to the
    copies in turn. `memory_share` is what each copy may take of its card's memory, of 1; 0: what others leave.
    """

    run: str = ""
    artifact: str = ""
    remote: str | tuple[str, ...] = ""
    name: str = ""
    options: dict[str, Any] = {}
    parameters: dict[str, Value] = {}
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    signature: str = ""
    copies: int = 1
    device: str | tuple[str, ...] = "cpu"
    memory_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    threads: int = 0
    max_batch: int = 0
    buckets: dict[str, tuple[int, ...]] = {}
    trust: bool = False

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each copy; the first is that of whoever opens one copy only."""
        named = (self.device,) if isinstance(self.device, str) else self.device
        return tuple(named[copy % len(named)] for copy in range(self.copies if named else 0))


class PipelineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Stages from top to bottom. `inputs` (as `image:BYTES[1]`) are by default those of the first stage, `outputs`
    (names of tensors) those of the last; `parameters` are defaults for every stage that names them."""

    name: str
    stages: tuple[StageConfig, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    parameters: dict[str, Value] = {}


def convert(data: object, *, where: str = "$") -> PipelineConfig:
    """Plain data as a PipelineConfig. Raises BadConfig whose message starts with the path of the fault."""
    try:
        return msgspec.convert(data, PipelineConfig)
    except msgspec.ValidationError as fault:
        message, _, path = str(fault).partition(" - at `$")
        raise BadConfig(f"{where}{path.rstrip('`')}: {message}", hint="see docs/pipelines.md") from None


def store_of(path: Path | str) -> Path | None:
    """The store that a server's file names, found from the file; None: the user's own. Raises NotFound, BadConfig."""
    root = textfiles.read_toml(path).get("store", {}).get("root", "")
    return Path(path).parent / home.expand(root) if root else None


def read(path: Path | str) -> PipelineConfig:
    """A pipeline from a TOML file: its tables at the top level, or the only `[[model]]` with stages of a server's file.

    Raises NotFound, BadConfig.
    """
    data = textfiles.read_toml(path)
    if "stages" in data:
        return convert({"name": Path(path).stem, **data})
    models = data.get("model", [])
    models = models if isinstance(models, list) else []
    found = [(i, model) for i, model in enumerate(models) if isinstance(model, dict) and "stages" in model]
    if len(found) != 1:
        raise BadConfig(f"{path}: holds {len(found)} pipelines, expected one", hint="write `stages = [...]`")
    index, model = found[0]
    known = {name: model[name] for name in PipelineConfig.__struct_fields__ if name in model}
    return convert(known, where=f"$.model[{index}]")


def read_artifact(artifact: Artifact, *, trust: bool = False) -> PipelineConfig:
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
    change, root = msgspec.structs.replace, artifact.path.absolute()

    def place(text: str) -> str:
        return str(root / folders.check_path(text.removeprefix(INSIDE))) if text.startswith(INSIDE) else text

    placed = [
        change(stage, artifact=place(stage.artifact), options=textfiles.with_texts(stage.options, place), trust=trusted)
        for stage in config.stages  # its own word for `trust` is no proof
    ]
    return change(config, stages=tuple(placed))


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
