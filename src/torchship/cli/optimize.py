"""`torchship optimize TARGET`: search the best valid way to run a model here, and publish it."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchship.cli import _shown
from torchship.errors import NoWinner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchship.optimize.report import Report
    from torchship.optimize.trial import Trial

_EXAMPLES = """
\b
Examples:
  torchship optimize torchvision.models:resnet18 --input "image:FP32[-1,3,224,224]"
  torchship optimize train.py:build --weights best.pth --input "image:FP32[-1,3,224,224]"
  torchship optimize mypkg.model:build --input "ids:INT64[-1,seq:1..512]" --input "mask:INT64[-1,seq:1..512]" \\
      --data mypkg.data:batches --evaluate mypkg.data:accuracy --max-drop 0.003
  torchship optimize mypkg.model:net --input "image:FP32[-1,3,224,224]" --data photos/ --goal throughput --budget 5m
  torchship optimize mypkg.model:net --input "x:FP32[-1,16]" --data mypkg.data:pairs --prune 0.5 --budget 1h
  torchship optimize mypkg.model:net --input "x:FP32[-1,16]" --backends onnxruntime,openvino --json > report.json
"""


@click.command(epilog=_EXAMPLES)
@click.argument("target")
@click.option("--input", "inputs", multiple=True, metavar="SPEC",
              help='An input as "name:DTYPE[axes]"; -1 frees an axis, seq:1..512 names and bounds it. Repeat for more. '
                   "May be left out when --data gives real inputs.")  # fmt: skip
@click.option("--weights", metavar="FILE[#KEY]",
              help="A checkpoint to load into the module: .pth, .pt or .safetensors; KEY of several.")  # fmt: skip
@click.option("--data", metavar="MODULE:FUNCTION|FOLDER",
              help="Real inputs to calibrate and judge on: a function that yields batches, or pictures.")  # fmt: skip
@click.option(
    "--evaluate", metavar="MODULE:FUNCTION", help="Your metric: takes a stage, returns a number, higher is better."
)
@click.option(
    "--goal", type=click.Choice(["latency", "throughput", "size", "memory"]), default="latency", show_default=True
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="X",
    help="How much may be lost: of --evaluate, else of top-1, or of what the answers vary by [default: 0.01].",
)
@click.option("--strict", is_flag=True, help="Refuse what is not proved to lose no more than that.")
@click.option("--max-latency-p99", metavar="MS", help="Refuse candidates that are slower at batch 1: 12, 12ms, 0.5s.")
@click.option("--max-memory", metavar="SIZE", help="Refuse candidates that need more memory: 300MB, 1GiB.")
@click.option("--max-size", metavar="SIZE", help="Refuse candidates with larger files: 20MB.")
@click.option("--backends", metavar="A,B", help="Only these backends, besides eager.")
@click.option("--recipe", "recipes", multiple=True, metavar="FILE|JSON",
              help="Race these instead of the backends' proposals: a JSON or TOML file, or JSON itself.")  # fmt: skip
@click.option(
    "--budget", default="10m", show_default=True, metavar="TIME", help="Stop starting trials after: 90s, 10m, 1h."
)
@click.option(
    "--store", metavar="DIR", help="Where to publish [default: $TORCHSHIP_STORE or ~/.local/share/torchship/store]."
)
@click.option("--finetune", metavar="MODULE:FUNCTION",
              help="Your training loop(student, distill), for int8 that the guard refuses otherwise.")  # fmt: skip
@click.option("--prune", metavar="SHARE|TIME", is_flag=False, flag_value="0.5",
              help="Take channels out and train again, until so great a share of the multiplications is gone, or a "
                   "call takes no longer: 0.5, 2ms or 0.7,2ms [0.5 where no value is given].")  # fmt: skip
@click.option("--train", metavar="MODULE:FUNCTION",
              help="Your training(student, teacher, rows) after each round of --prune [distillation].")  # fmt: skip
@click.option("--name", metavar="NAME", help="Publish under this name [default: after the target].")
@click.option(
    "--labels",
    metavar="FILE|MODULE:NAME",
    help="Class names to be kept in the artifact: a file, one a line, or a list in Python.",
)
@click.option("--report", "report_dir", metavar="DIR", help="Also write report.html and report.json there.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Threads to run and measure with [all cores].")
@click.option("--device", default="cpu", show_default=True, help="Device to open candidates on: cpu, cuda ...")
@click.option(
    "--batched/--not-batched", default=None, help="Vouch that rows are independent, or forbid to join them [found out]."
)
@click.option("--no-publish", is_flag=True, help="Search and report only.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout; progress goes to stderr.")
def command(target: str, as_json: bool, report_dir: str | None, no_publish: bool, **given: Any) -> None:
    """Search the best valid way to run a model on this machine, and publish it.

    TARGET is module:attribute or file.py:attribute, an nn.Module or a function or class that returns one. Every
    backend's proposals are built, packed, re-opened in a fresh process, compared with eager fp32 and measured; the
    best valid one is published to the store. Ctrl-C ends the search and keeps what is done.
    """
    from torchship.optimize import search
    from torchship.optimize.targets import read_wish

    sys.path.insert(0, "")
    with redirect_stdout(sys.stderr) if as_json else nullcontext():  # what the user's code prints is no JSON
        wish = read_wish(target, **given)
        with _progress(quiet=as_json) as (show, step):
            report = search.optimize(**wish, publish=not no_publish, on_trial=show, on_step=step)
    if report_dir:
        report.save(report_dir)
    if as_json:
        path = "" if report.artifact is None else str(report.artifact.path)
        facts = {"artifact": path, "version": report.version, "winner": report.winner, "speedup": report.speedup}
        click.echo(msgspec.json.encode({**facts, "report": report.facts}).decode())
    else:
        _tell(report, report_dir, given["store"])
    if report.winner is None:
        if report.facts.interrupted:
            raise click.Abort
        raise NoWinner(report.facts.choice.reason, hint="see the table above, loosen the limits, or add --data")


@contextmanager
def _progress(*, quiet: bool) -> Iterator[tuple[Callable[[Trial, int, int], None], Callable[[str, int, int], None]]]:
    """A progress bar on stderr, and what is to be called as trials finish, and as training goes on: both print a line
    above the bar for what is done."""
    from torchship.optimize.report import line

    out = _shown.console(stderr=True, quiet=quiet and not sys.stderr.isatty())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("capturing the model", total=None)

        def show(trial: Trial, done: int, total: int) -> None:
            if trial.status != "skipped":  # they come in crowds, and the table tells them together
                out.print(line(trial), style={"refused": "yellow", "failed": "red"}.get(trial.status), markup=False)
            bar.update(task, description="trials", completed=done, total=total)

        def step(words: str, done: int, total: int) -> None:
            if done == total:
                out.print(f"         {words}", style="dim", markup=False)
            bar.update(task, description=words, completed=done, total=total)

        yield show, step


def _tell(report: Report, report_dir: str | None, store: str | None) -> None:
    """The table, the winner and why, and how to go on."""
    out = _shown.console()
    out.print(report.table())
    facts = report.facts
    for backend, reason in sorted(facts.left_out.items()):
        out.print(f"left out {backend}: {reason}", style="dim", markup=False)
    for note in facts.notes:
        out.print(f"note: {note}", markup=False)
    if facts.interrupted:
        out.print("interrupted: the winner is the best of what was done", style="yellow")
    if report.winner is None:
        return
    out.print(f"\nwinner: {report.winner.recipe.label}", style="bold green")
    out.print(f"why:    {facts.choice.reason}", markup=False)
    for note in report.winner.notes:
        out.print(f"note:   {note}", markup=False)
    if report.artifact is not None:
        where = report.artifact.path
        out.print(f"artifact: {where}\nreport:   {where / 'report' / 'report.html'}", soft_wrap=True)
        native = any(entry.kind == "native" for entry in report.artifact.manifest.files)
        words = f"{facts.name} --store {store}" if store else facts.name
        serve = f"torchship serve {words}{' --trust' if native else ''}"
        out.print(f"next:     torchship inspect {words}   |   {serve}", soft_wrap=True)
    if report_dir:
        out.print(f"report:   {report_dir}/report.html", soft_wrap=True)
