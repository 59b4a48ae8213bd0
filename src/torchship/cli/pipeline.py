"""`torchship pipeline ...`: check, draw and publish pipelines."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from torchship.artifact import Store, folder
from torchship.cli import _shown, _tensorfiles
from torchship.errors import BadInput
from torchship.pipeline import Composed, Plan, config, drawing, pack_pipeline, plan, plan_target
from torchship.pipeline.opening import open_stage
from torchship.pipeline.packing import check_parity

_store = click.option("--store", "root", default=None, metavar="DIR", help="Where artifacts are found by name.")


@click.group(
    epilog="""\b
Examples:
  torchship pipeline check classify.toml
  torchship pipeline draw classify.toml --svg classify.svg
  torchship pipeline publish classify.toml --name classify --example cat.jpg --expect training_pixels.npz
"""
)
def command() -> None:
    """Look after pipelines: TOML files with stages = [...], or the only [[model]] with stages of a server's file."""


def _made(plan: Plan, store: Store) -> None:
    """Make every Python stage once, as a worker would: what its options name must be there. Raises what it raises."""
    for node in plan.nodes:
        if node.config.run:
            open_stage(node.config, store).close()


def _planned(target: str, root: str | None) -> tuple[Plan, Store]:
    """The plan of a TOML file or of what is published."""
    sys.path.insert(0, "")  # Python stages of the user's lie where the command is typed
    if target.endswith(".toml"):
        store = Store(root or config.store_of(target))
        return plan(config.read(target), store), store
    store = Store(root)
    return plan_target(target, store=store), store


@command.command()
@click.argument("target", metavar="FILE.toml|ARTIFACT")
@_store
@click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON to stdout.")
def check(*, target: str, root: str | None, as_json: bool) -> None:
    """Check a pipeline before anything starts: every input, every parameter, every file that an option names."""
    plan, store = _planned(target, root)
    _made(plan, store)
    if as_json:
        facts = {name: getattr(plan, name) for name in ("name", "signature", "max_batch", "parameters")}
        _shown.print_json({**facts, "stages": plan.nodes})
        return
    stages = "1 stage fits" if len(plan.nodes) == 1 else f"{len(plan.nodes)} stages fit together"
    click.echo(f"{plan.name}: {stages}")
    click.echo(f"  {plan.signature}")
    for parameter in plan.parameters:
        ends = [("from", parameter.low), ("to", parameter.high)]
        bounds = "".join(f" {word} {end:g}" for word, end in ends if end is not None)
        about = f": {parameter.about}" if parameter.about else ""
        click.echo(f"  parameter {parameter.name}{bounds}, by default {parameter.default}{about}")


@command.command()
@click.argument("target", metavar="FILE.toml|ARTIFACT")
@_store
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), help="Write a drawing there, too.")
def draw(*, target: str, root: str | None, svg: Path | None) -> None:
    """Show which tensor goes where: as text, and as an SVG."""
    plan, _ = _planned(target, root)
    click.echo(drawing.as_text(plan))
    if svg:
        folder.write(svg, drawing.as_svg(plan).encode())
        click.echo(f"\nwrote {svg}", err=True)


@command.command()
@click.argument("file", metavar="FILE.toml", type=click.Path(exists=True, dir_okay=False))
@click.option("--name", default=None, help="The name to publish under.  [default: the pipeline's]")
@click.option("--example", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="An input (a picture, npz, json ...) that is run now and kept with its answer.")  # fmt: skip
@click.option("--expect", type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Tensors (pixels, logits ...) that your own code makes of it: npz, safetensors.")  # fmt: skip
@click.option("--tolerance", default=1e-3, show_default=True, help="Relative L2 error that --expect allows.")
@_store
def publish(
    *, file: str, name: str | None, example: Path | None, expect: Path | None, tolerance: float, root: str | None
) -> None:
    """Publish a pipeline as one artifact that holds its models and files, and is served like a model.

    With --expect it is published only when its tensors, also those between its stages, agree with yours.
    """
    plan, store = _planned(file, root)
    _made(plan, store)
    examples = {}
    if example:
        inputs = _tensorfiles.read(example, signature=plan.signature)
        plan.signature.check(inputs)
        composed = Composed(plan, store)
        examples = {"inputs": inputs, "outputs": composed(inputs)}
        composed.close()
    if expect and not example:
        raise BadInput("--expect needs --example", hint="give the input that the expected tensors belong to")
    if expect:
        expected = _tensorfiles.read_any(expect)
        errors = check_parity(plan, inputs=inputs, expected=expected, store=store, tolerance=tolerance)
        for tensor, error in errors.items():
            click.echo(f"{tensor}: relative error {error:.1e}")
    with tempfile.TemporaryDirectory(prefix="torchship-") as place:
        made = Path(place) / "artifact"
        pack_pipeline(plan, made, store=store, **examples)
        given = name or plan.name
        version = store.publish(made, name=given)
    click.echo(f"published {given}@{version}: {plan.signature}")
