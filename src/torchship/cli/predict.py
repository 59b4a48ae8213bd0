"""`torchship predict ARTIFACT|URL --input FILE`: run an artifact, or a served model, on a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from torchship.cli import _shown, _tensorfiles
from torchship.errors import BadInput, NotFound
from torchship.stage import Stage, Value
from torchship.tensors import Tensors, dtype_name


@click.command(
    epilog="""\b
Examples:
  torchship predict resnet18 --input cat.jpg
  torchship predict encoder@2 --input tokens.npz --output vectors.npz
  torchship predict http://127.0.0.1:8000/v2/models/classify --input cat.jpg --parameter top_k=3
"""
)
@click.argument("target", metavar="ARTIFACT|FILE.toml|URL")
@click.option("--input", "file", required=True, type=click.Path(path_type=Path),
              help="npy, npz, json, safetensors or a picture; any file for a model that takes BYTES.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="Also write the outputs: npz, npy, safetensors, json.")
@click.option("--parameter", "parameters", multiple=True, metavar="NAME=VALUE", help="A request parameter; repeat.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1, 1000), help="How many names to print.")
@click.option("--mean", default="", metavar="A,B,C", help="For a picture: what is taken off.  [default: ImageNet's]")
@click.option("--std", default="", metavar="A,B,C", help="For a picture: what is divided by.  [default: ImageNet's]")
@click.option("--token", default="", envvar="TORCHSHIP_TOKEN", help="Access token.  [env: TORCHSHIP_TOKEN]")
@click.option("--store", default=None, metavar="DIR", help="Where names are looked up.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", default=0, help="[default: as many as there are cores]")
@click.option("--trust", is_flag=True, help="Open native code: only if you know who made it.")
@click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON to stdout.")
def command(
    *, target: str, file: Path, output: Path | None, parameters: tuple[str, ...], top: int, mean: str, std: str,
    token: str, as_json: bool, **opening: Any,
) -> None:  # fmt: skip
    """Run an artifact (a name in the store, a folder), a pipeline (a TOML file) or a served model (a URL) on a file.

    A picture for a model that takes FP32[-1,3,H,W] is resized, cut and normalized as torchvision's classifiers are.
    """
    if output:
        _tensorfiles.check_suffix(output)
    if not file.exists():
        raise NotFound(f"no file {file}")
    chosen = dict(map(_parameter, parameters))
    read = partial(_tensorfiles.read, file, mean=_numbers(mean), std=_numbers(std))
    labels: tuple[str, ...] = ()
    if "://" in target:
        outputs = _ask(target, chosen, token=token, read=read)
    else:
        outputs, labels = _run(target, chosen, read=read, **opening)
    if output:
        _tensorfiles.write(output, outputs)
    _show(outputs, labels, top=top, as_json=as_json)


def _ask(url: str, parameters: dict[str, Value], *, token: str, read: Callable[..., Tensors]) -> Tensors:
    """The answer of a served model, by any URL of it, to what `read` gives for its signature."""
    from torchship.client import Client
    from torchship.client.address import parse
    from torchship.wire.oip_json import signature_of

    found = parse(url)
    if not found.model:
        raise BadInput(f"{url} names no model", hint="as in http://127.0.0.1:8000/v2/models/classify")
    with Client(found.server, token=token) as client:
        tensors = read(signature=signature_of(client.metadata(found.model, found.version)))
        return client.infer(found.model, tensors, version=found.version, parameters=parameters)


def _run(
    target: str, chosen: dict[str, Value], *, read: Callable[..., Tensors], store: str | None, **opening: Any
) -> tuple[Tensors, tuple[str, ...]]:
    """The outputs of a pipeline in a TOML file, or of what is published; and its labels."""
    import sys

    from torchship.artifact import Store, open_artifact
    from torchship.pipeline import Composed, config, open_target, plan, rows

    found = Store(store)
    labels: tuple[str, ...] = ()
    if target.endswith(".toml"):
        sys.path.insert(0, "")  # Python stages of the user's lie where the command is typed
        stage: Stage = Composed(plan(config.read(target), found), found)
    else:
        path = found.resolve(target)
        stage, labels = open_target(path, store=found, **opening), open_artifact(path, verify=False).manifest.labels
    try:
        tensors = read(signature=stage.signature)
        stage.signature.check(tensors)
        alone = isinstance(stage, Composed)  # it cuts its jobs into batches itself
        return stage(tensors, chosen) if alone else rows.run(stage, tensors, chosen), labels
    finally:
        stage.close()


def _parameter(text: str) -> tuple[str, Value]:
    name, found, value = text.partition("=")
    if not name or not found:
        raise BadInput(f"{text!r} is not NAME=VALUE", hint="as in --parameter top_k=3")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise BadInput(f"{text!r} is not numbers", hint="as in --mean 0.485,0.456,0.406") from None


def _show(outputs: Tensors, labels: tuple[str, ...], *, top: int, as_json: bool) -> None:
    names = _names(outputs, labels, top)
    if as_json:
        _shown.print_json({"outputs": _tensorfiles.as_json(outputs), **({"top": names} if names else {})})
        return
    for number, row in enumerate(names):
        if len(names) > 1:
            click.echo(f"row {number}:")
        for name, score in row:
            click.echo(f"  {score:7.2%}  {name}")
    if names:
        return
    out = _shown.console()
    for name, array in outputs.items():
        out.print(f"[bold]{name}[/bold] {dtype_name(array.dtype)}{list(array.shape)}")
        out.print(np.array2string(array, threshold=64, edgeitems=4, precision=5), markup=False)


def _names(outputs: Tensors, labels: tuple[str, ...], top: int) -> list[list[tuple[str, float]]]:
    """The best names of each row: from a pipeline that names them, or from a classifier's only output."""
    from torchship.stages.labels import activate
    from torchship.stages.labels import top as best

    if {"labels", "scores"} <= outputs.keys() and outputs["labels"].ndim == 2:
        rows = zip(outputs["labels"].tolist(), outputs["scores"].tolist(), strict=True)
        return [[(n.decode(errors="replace"), s) for n, s in zip(*row, strict=True)][:top] for row in rows]
    first = next(iter(outputs.values()))
    if not labels or len(outputs) != 1 or first.ndim != 2 or first.shape[1] != len(labels):
        return []
    proper = bool((first >= 0).all() and abs(first.sum(1) - 1).max() < 1e-2)
    scores = first if proper else activate(first.astype("float32"), "softmax")
    return [[(labels[i], float(row[i])) for i in order] for row, order in zip(scores, best(scores, top), strict=True)]
