"""`torchship doctor`: what this machine can run, why a model does not export, and what a failure means."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import click

_EXAMPLES = """
\b
Examples:
  torchship doctor
  torchship doctor --json | jq .backends
  torchship doctor mypkg.model:build --input "image:FP32[-1,3,224,224]"
  torchship doctor mypkg.model:build --input "ids:INT64[-1,seq:1..512]" --routes export,onnx
  torchship doctor --explain server.log
  python serve.py 2>&1 | torchship doctor --explain -
"""


@click.command(epilog=_EXAMPLES)
@click.argument("target", required=False)
@click.option("--input", "inputs", multiple=True, metavar="SPEC",
              help='An input as "name:DTYPE[axes]"; -1 frees an axis, seq:1..512 names and bounds it.')  # fmt: skip
@click.option("--routes", metavar="A,B", help="Only these: export, 'export strict', onnx, trace, script, compile.")
@click.option("--timeout", type=float, default=180.0, show_default=True, metavar="S", help="Seconds for each route.")
@click.option("--explain", "log", type=click.File("r", errors="replace"), metavar="LOGFILE",
              help="Explain the failures in a log; - reads standard input.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON to stdout.")
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> None:
    """Say what this machine can run; or why a model does not export; or what a failure means.

    Without TARGET: the machine, its features, and which backends run here. With TARGET (module:attribute, an
    nn.Module or a function that returns one): every export route is tried in a process of its own, and each refusal
    is explained with your line and a proposed edit.

    \b
    Exit codes: 0 the machine was examined, the model is healthy, or the failure was explained
                1 neither torch.export nor ONNX takes the model, something gives wrong results, or nothing is known
    """
    as_json = given["as_json"]
    if given["log"] is not None:
        code = _explain(given["log"].read(), as_json=as_json)
    elif given["target"] is not None:
        code = _diagnose(given["target"], given["inputs"], given["routes"], given["timeout"], as_json=as_json)
    else:
        code = _machine(as_json=as_json)
    ctx.exit(code)


def _machine(*, as_json: bool) -> int:
    from torchship.cli import _doctor_pages as pages
    from torchship.doctor.machine import examine

    found = examine()
    if as_json:
        _print_json(found)
    else:
        pages.show_machine(found)
    return 0


def _diagnose(target: str, inputs: tuple[str, ...], routes: str | None, timeout: float, *, as_json: bool) -> int:
    from rich.console import Console

    if find_spec("torch") is None:
        from torchship.errors import Unavailable

        raise Unavailable("a model can only be examined where torch is", hint="pip install torch onnx onnxscript")
    from torchship.cli import _doctor_pages as pages
    from torchship.doctor import examination
    from torchship.doctor import routes as known

    sys.path.insert(0, "")
    names = known.ROUTE_NAMES if routes is None else tuple(part.strip() for part in routes.split(","))
    progress = Console(stderr=True)
    with progress.status(f"examining the module: {', '.join(names)}") as status:
        found = examination.diagnose_target(
            target, inputs=inputs, routes=names, timeout=timeout, on_step=lambda name: status.update(f"{name} is done")
        )
    if as_json:
        _print_json(found)
    else:
        pages.show_examination(found)
    return 0 if found.healthy else 1


def _explain(text: str, *, as_json: bool) -> int:
    from torchship.cli import _doctor_pages as pages
    from torchship.doctor.explain import explain

    found = explain(text)
    if as_json:
        _print_json(found)
    else:
        pages.show_explanations(found)
    return 0 if found else 1


def _print_json(found: object) -> None:
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
