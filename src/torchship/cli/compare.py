"""`torchship compare A B`: two artifacts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
from rich.text import Text

from torchship import hardware
from torchship.artifact import Store, open_artifact
from torchship.cli import _shown
from torchship.errors import BadConfig
from torchship.optimize import compare
from torchship.optimize.compare import Comparison


@click.command(
    epilog="""\b
Examples:
  torchship compare resnet18@1 resnet18@2
  torchship compare resnet18 runs/other/resnet18/3 --measure
  torchship compare here/manifest.json from-the-pi/manifest.json --json
  torchship compare here/report.json from-the-pi/report.json
  torchship compare resnet18 from-the-pi/report.json
"""
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--measure", is_flag=True, help="Measure both now, in turns on this machine, and compare their outputs.")
@click.option("--trust", is_flag=True, help="With --measure: allow artifacts that hold native code.")
@click.option("--threads", type=click.IntRange(0), default=0, help="With --measure: threads to run with [all cores].")
@click.option("--device", default="cpu", show_default=True, help="With --measure: device to run on.")
@click.option("--store", metavar="DIR", help="Where names are looked up.")
@click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON to stdout.")
def command(
    *, a: str, b: str, measure: bool, trust: bool, threads: int, device: str, store: str | None, as_json: bool
) -> None:
    """Compare two artifacts: what they are, what was measured, and how many times better B is.

    A and B are names in the store (resnet18, resnet18@3), folders, or manifest.json files from other machines; or
    report.json files: then every recipe that either search tried is compared (an artifact brings its own report).
    """
    shelf = Store(store)
    if measure:
        if a.endswith(".json") or b.endswith(".json"):
            raise BadConfig("--measure needs artifacts, not files about them", hint="leave it out, or give folders")
        first, second = (open_artifact(shelf.resolve(target)) for target in (a, b))
        rows = compare.rows(first.manifest, second.manifest)[:5]
        rows.append(compare.outputs_apart(first, second, trust=trust))
        rows += compare.side_by_side(first, second, device=device, threads=threads or hardware.here().cores)
    else:
        rows = compare.of(
            *(
                compare.read(Path(target))
                if target.endswith(".json")
                else open_artifact(shelf.resolve(target), verify=False)
                for target in (a, b)
            )
        )
    _show(rows, a, b, as_json=as_json)


def _show(rows: Sequence[Comparison], a: str, b: str, *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode({"a": a, "b": b, "rows": rows}).decode())
        return
    shown = []
    for row in rows:
        style = "" if row.better is None or 0.95 < row.better < 1.05 else "green" if row.better > 1 else "red"
        better = "" if row.better is None else f"{row.better:.3g}x"
        shown.append([Text(cell, style) for cell in (row.what, row.a, row.b, better)])
    _shown.console().print(_shown.table(("", a, b, "B is better"), shown, right=["B is better"]))
