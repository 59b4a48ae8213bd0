"""What a pipeline is as plain data: its stages from top to bottom, as TOML and Python both write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from torchship import home, textfiles
from torchship.errors import BadConfig
from torchship.stage import Value


class StageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One stage: exactly one of `run`, `artifact` and `remote` says what it is.

    `inputs` maps the stage's own input names to tensors of the pipeline (`pixels`, or `decode.pixels` for those of
    one stage), `outputs` its own output names to the names under which later stages find them. `parameters` are this
    pipeline's defaults for values that a request may set. `buckets` are lengths by the name of an axis: a server fills
    rows up to the next one, so that rows of different lengths share a batch. Several `device`s are dealt out to the
    copies in turn.
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
    threads: int = 0
    max_batch: int = 0
    buckets: dict[str, tuple[int, ...]] = {}
    trust: bool = False

    @property
    def first_device(self) -> str:
        """The device of whoever opens one copy only."""
        return self.device if isinstance(self.device, str) else self.device[0]


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
