"""Publishes a pipeline as an artifact, with its models and files in one folder; checks it before against what the code
that trained the model gives."""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
from pathlib import Path

import msgspec

from torchship import __version__, textfiles
from torchship.artifact import Artifact, Store, open_artifact
from torchship.artifact import folder as folders
from torchship.artifact.manifest import Provenance
from torchship.artifact.package import pack
from torchship.artifact.recheck import faults
from torchship.difference import relative_error
from torchship.errors import BadConfig, GuardRefused
from torchship.pipeline.composed import Composed
from torchship.pipeline.config import FILE, INSIDE, StageConfig
from torchship.pipeline.planning import Plan, plan
from torchship.recipe import Recipe
from torchship.tensors import FLOATS, Tensors


def pack_pipeline(
    plan: Plan, folder: Path | str, *, store: Store | None = None, inputs: Tensors = {}, outputs: Tensors = {}
) -> Artifact:
    """Write a checked pipeline into the empty `folder` as an artifact: models and files of options are copied in.

    `inputs` and `outputs` are an example and the pipeline's answer to it. Python stages outside torchship are named,
    not copied: they must be installed where it is opened. Raises BadConfig, ArtifactError.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise BadConfig(f"{root} is not empty", hint="give a new folder")
    found = store or Store()
    names = _names(plan)
    stages = [
        _taken(stage, name, f"{index}_{name}", root=root, store=found)
        for index, (stage, name) in enumerate(zip(plan.config.stages, names, strict=True))
    ]
    config = msgspec.structs.replace(plan.config, stages=tuple(stages))
    data = msgspec.json.format(msgspec.json.encode(config), indent=1)
    folders.write(root / FILE, data)
    return pack(
        root,
        name=plan.name,
        signature=plan.signature,
        recipe=Recipe("pipeline"),
        provenance=Provenance(
            torchship=__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            source=f"pipeline {plan.name}",
            model_hash=hashlib.sha256(data).hexdigest(),
        ),
        max_batch=plan.max_batch,
        inputs=inputs,
        outputs=outputs,
        labels=plan.labels,
        kind="pipeline",
    )


def _names(plan: Plan) -> list[str]:
    """The name of each stage as other stages know it. The stages of a published pipeline inside are `name.inner`."""
    names = list(dict.fromkeys(node.name.partition(".")[0] for node in plan.nodes))
    return names if len(plan.config.stages) > 1 else [plan.config.stages[0].name or names[0]]


def _taken(stage: StageConfig, name: str, place: str, *, root: Path, store: Store) -> StageConfig:
    """The stage with its model, its pipeline or its files copied below `root`."""
    if stage.artifact:
        source = open_artifact(store.resolve(stage.artifact))
        shutil.copytree(source.path, root / "models" / place)
        return msgspec.structs.replace(stage, artifact=f"{INSIDE}models/{place}", name=name)
    copied: list[str] = []

    def take(value: str) -> str:
        source = Path(os.path.expanduser(value))
        if value.startswith(INSIDE) or not os.path.isfile(source):
            return value
        copied.append(f"files/{place}/{len(copied)}/{source.name}")
        folders.make((root / copied[-1]).parent)
        shutil.copyfile(source, root / copied[-1])
        return f"{INSIDE}{copied[-1]}"

    options = {  # in lists and tables, which hold names of classes and the like, a file is written with a slash
        name: take(value)
        if isinstance(value, str)
        else textfiles.with_texts(value, lambda text: take(text) if "/" in text else text)
        for name, value in stage.options.items()
    }
    return msgspec.structs.replace(stage, options=options)


def check_parity(
    made: Plan, *, inputs: Tensors, expected: Tensors, store: Store | None = None, tolerance: float = 1e-3
) -> dict[str, float]:
    """Run the pipeline on `inputs` and compare every tensor that `expected` names, such as `pixels` of a stage.

    Returns the relative L2 error of each floating-point tensor. Raises GuardRefused when one is above `tolerance`,
    BadConfig for a tensor that no stage gives.
    """
    if not expected:
        raise BadConfig("nothing is expected", hint="name at least one tensor of the pipeline")
    config = msgspec.structs.replace(made.config, outputs=tuple(expected))
    composed = Composed(plan(config, store), store)
    try:
        found = composed(inputs)
    finally:
        composed.close()
    names = {spec.name: name for spec, name in zip(composed.signature.outputs, expected, strict=True)}
    wanted = {inner: expected[name] for inner, name in names.items()}
    for inner, fault in faults(composed.signature, wanted, found, allowed=tolerance).items():
        raise GuardRefused(
            f"{names[inner]!r} {fault}: the pipeline does not do what was expected",
            hint="compare size, interpolation, crop, mean, std and colour order with the training code",
        )
    floats = {spec.name for spec in composed.signature.outputs if spec.dtype in FLOATS}
    return {names[inner]: relative_error(wanted[inner], found[inner]) for inner in wanted if inner in floats}
