"""`torchship doctor`: what this machine can run, why a model does not export, and what a failure means."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from torchship.cli._shown import console, human_size, print_json, table
from torchship.doctor.diagnose import Diagnosis
from torchship.doctor.explain import Explanation, explain
from torchship.doctor.machine import Machine, examine
from torchship.errors import Unavailable

if TYPE_CHECKING:
    from torchship.doctor.examination import Examination

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red", "info": "dim"}

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
def command(**given: Any) -> int:
    """Say what this machine can run; or why a model does not export; or what a failure means.

    Without TARGET: the machine, its features, and which backends run here. With TARGET (module:attribute, an
    nn.Module or a function that returns one): every export route is tried in a process of its own, and each refusal
    is explained with your line and a proposed edit.

    \b
    Exit codes: 0 the machine was examined, the model is healthy, or the failure was explained
                1 neither torch.export nor ONNX takes the model, something gives wrong results, or nothing is known
    """
    page: Callable[[Any], Iterator[RenderableType]]
    if given["log"] is not None:
        found: Any = explain(given["log"].read())
        page, code = _explanations, 0 if found else 1
    elif given["target"] is not None:
        found = _examined(given["target"], given["inputs"], given["routes"], given["timeout"])
        page, code = _examination, 0 if found.healthy else 1
    else:
        found, page, code = examine(), _machine, 0
    if given["as_json"]:
        print_json(found)
    else:
        out = console()
        for part in page(found):
            out.print(part, crop=False)
    return code


def _examined(target: str, inputs: tuple[str, ...], names: str | None, timeout: float) -> Examination:
    if find_spec("torch") is None:
        raise Unavailable("a model can only be examined where torch is", hint="pip install torch onnx onnxscript")
    from torchship.doctor.examination import diagnose_target
    from torchship.doctor.routes import ROUTES

    sys.path.insert(0, "")
    routes = tuple(ROUTES) if names is None else tuple(part.strip() for part in names.split(","))
    with console(stderr=True).status(f"examining the module: {', '.join(routes)}") as status:
        return diagnose_target(
            target, inputs=inputs, routes=routes, timeout=timeout, on_step=lambda name: status.update(f"{name} is done")
        )


def _machine(found: Machine) -> Iterator[RenderableType]:
    """The machine, its features, its backends."""
    packages = ", ".join(f"{name} {number}" for name, number in found.packages.items())
    facts = [(Text(fact.name, "bold"), Text(fact.value, _COLOURS[fact.level])) for fact in found.facts]
    facts += [(Text("packages", "bold"), Text(packages or "-")), (Text("fingerprint", "bold"), Text(found.fingerprint))]
    yield from (table(("", ""), facts, title="This machine"), "")
    features = [
        (f.name if f.device == "cpu" else f"{f.name} ({f.device})", _yes(f.present, no="dim"), f.use)
        for f in found.features
    ]
    yield from (table(("feature", "here", "good for"), features, title="Features"), "")
    backends = [(row.name, _yes(not row.reason, no="yellow"), row.reason) for row in found.backends]
    yield table(("backend", "runs here", "why not"), backends, title="Backends")
    checks = [(c.name, _yes(not c.fault, no="red"), f"{c.seconds:.1f} s", c.fault or c.said) for c in found.checks]
    if checks:
        yield from ("", table(("step", "works", "took", "what was seen"), checks, title="Self-test of the card"))
    yield from _listed("Advice", found.advice)


def _examination(found: Examination) -> Iterator[RenderableType]:
    """Routes, refusals with edits, breaks, findings, costs."""
    yield f"[bold]{escape(found.target)}[/]  {escape(found.signature)}\n"
    rows = []
    for row in found.routes:
        seen = row.summary or (f"outputs agree to {row.error:.1g}" if row.error is not None else "")
        if row.diagnosis is not None and seen == row.diagnosis.words:
            seen = row.diagnosis.construct  # its words follow below
        rows.append((row.route, _yes(row.ok, no="red"), row.opens, seen))
    yield table(("route", "takes it", "opens the way to", "what was seen"), rows, title="Routes out of Python")
    yield from _refusals(found)
    if found.findings:
        yield "\n[bold]Findings"
    places: dict[tuple[str, str, str], str] = {}
    for finding in found.findings:
        key = (finding.level, finding.name, finding.words + (f"; {finding.edit}" if finding.edit else ""))
        places[key] = places.get(key, "") + (f"\nat {finding.place}: {finding.place.code}" if finding.place else "")
    for (level, name, words), where in places.items():
        yield _hang(f"[{_COLOURS[level]}]{level:4}[/] ", f"[bold]{escape(name)}[/]: {escape(words + where)}", indent=2)
    yield from _cost(found)
    yield "\n[bold green]healthy" if found.healthy else "\n[bold yellow]needs care: see above"


def _refusals(found: Examination) -> Iterator[RenderableType]:
    """Equal diagnoses of several routes are told once; graph breaks only where no route told the same."""
    told: dict[tuple[str, str], tuple[list[str], Diagnosis]] = {}
    for row in found.routes:
        if row.diagnosis is not None:
            told.setdefault(_what(row.diagnosis), ([], row.diagnosis))[0].append(row.route)
    if told:
        yield "\n[bold]Why not, and what to change"
    for names, diagnosis in told.values():
        yield from _diagnosis(", ".join(names), diagnosis)
    breaks = {_what(diagnosis): diagnosis for diagnosis in reversed(found.breaks)}
    if breaks:
        yield f"\n[bold]Graph breaks[/] ({found.graphs} graph{'s' if found.graphs != 1 else ''})"
    for number, (what, diagnosis) in enumerate(reversed(breaks.items()), start=1):
        if what in told:
            yield Text(f"  {number}: {what[0]} at {what[1]}, see above")
        else:
            yield from _diagnosis(f"{number}", diagnosis)


def _what(diagnosis: Diagnosis) -> tuple[str, str]:
    return diagnosis.construct, str(diagnosis.place)


def _diagnosis(title: str, diagnosis: Diagnosis) -> Iterator[RenderableType]:
    yield f"  [bold]{escape(title)}[/]: [cyan]{escape(diagnosis.construct)}"
    yield _hang("why  ", escape(diagnosis.words), indent=6)
    for word, place in (("at", diagnosis.place), ("from", diagnosis.called)):
        if place is not None:
            yield _whole(f"      {word:4} {place}: {place.code}")
    yield _hang("do   ", escape(diagnosis.edit), indent=6)
    for mark, colour, text in (("-", "red", diagnosis.old), ("+", "green", diagnosis.new)):
        yield from (_whole(f"           {mark} {line}", colour) for line in text.splitlines())
    if diagnosis.said:
        yield _hang("said ", f"[dim]{escape(diagnosis.said)}[/]", indent=6)


def _cost(found: Examination) -> Iterator[RenderableType]:
    yield from (Text(f"\nnote: {note}") for note in found.notes)
    cost = found.cost
    if cost is None:
        return
    kind = f" ({cost.convolution:.0f} % convolutions, {cost.product:.0f} % matrix products)" if cost.flops else ""
    yield (
        f"\n[bold]Cost of one row[/]: {_many(cost.flops)}FLOP = {_many(cost.flops / 2)}MAC{kind}, "
        f"{_many(cost.parameters).strip()} parameters ({human_size(cost.weight_bytes)}), "
        f"{human_size(cost.activations)} of activations at once"
    )
    yield from _listed("What this machine has for it", cost.usable)


def _explanations(found: list[Explanation]) -> Iterator[RenderableType]:
    """Failures of a log, what they mean and what to do."""
    if not found:
        yield "nothing in there is a failure that torchship knows"
    for explanation in found:
        yield f"[bold red]{escape(explanation.name)}[/]: {escape(explanation.words)}"
        yield _whole(f"  seen: {explanation.line}", "dim")
        yield from (_hang("- ", escape(line), indent=2) for line in explanation.mend)


def _yes(is_so: bool, *, no: str) -> Text:
    """`yes` in green, or `no` in its colour."""
    return Text("yes", "green") if is_so else Text("no", no)


def _listed(title: str, lines: Iterable[str]) -> Iterator[RenderableType]:
    if lines:
        yield f"\n[bold]{title}"
    yield from (_hang("- ", escape(line), indent=2) for line in lines)


def _hang(head: str, words: str, *, indent: int) -> RenderableType:
    """Markup after a head of its own; wrapped lines stay right of the head."""
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(head, words)
    return Padding(grid, (0, 0, 0, indent))


def _whole(text: str, style: str = "") -> RenderableType:
    """A line that is not broken, so that it can be copied."""
    return Group(Text(text, style, no_wrap=True, overflow="ignore"))  # a bare text would lose that in print


def _many(count: float) -> str:
    """4.1 G, 25.6 M, 72."""
    for limit, word in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {word}"
    return f"{count:.0f} "
