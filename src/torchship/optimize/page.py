"""The report as one self-contained page: table, Pareto plots, batch curves, failures; no network, dark and light."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

import msgspec

from torchship.optimize import finetune, plots
from torchship.optimize.facts import (
    Facts,
    at_batch,
    best_rate,
    cells,
    eager_of,
    has_won,
    left_in_float,
    megabytes,
    ms_text,
    ordered,
    outside_of,
)
from torchship.optimize.guard import HOPELESS
from torchship.optimize.trial import Trial

_HEADS = ("recipe", "b1 p50", "p99", "b8 p50", "p99", "rows/s", "MB", "peak MB", "error", "agreement", "speed-up")

_NOT_ITS_OWN = {
    "--recipe",
    "--backends",
    "--budget",
    "--store",
    "--name",
    "--labels",
}  # words of the search, not of one row


def render(facts: Facts) -> str:
    """HTML of a report; loads nothing from anywhere."""
    style = Path(__file__).with_name("page.css").read_text()
    title = f"{escape(facts.name)} - torchship report"
    parts = [_header(facts), _tiles(facts), _table(facts), _plots(facts), _sensitivity(facts), _troubles(facts)]
    body = "".join([*parts, _commands(facts), _circumstances(facts)])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def _colours(facts: Facts) -> dict[str, int]:
    """A colour for each backend; eager is always grey."""
    backends = dict.fromkeys(trial.recipe.backend for trial in facts.trials if trial.recipe.backend != "eager")
    return {"eager": 0} | {name: 1 + index % (plots.COLOURS - 1) for index, name in enumerate(backends)}


def _header(facts: Facts) -> str:
    choice = facts.choice
    if choice.winner is None:
        verdict = f'<p style="color:var(--bad)">No winner: {escape(choice.reason)}</p>'
    else:
        label = escape(facts.trials[choice.winner].recipe.label)
        verdict = f"<p><b>{label}</b> wins for {escape(facts.goal)}: {escape(choice.reason)}.</p>"
    note = '<p style="color:var(--warn)">The search was interrupted.</p>' if facts.interrupted else ""
    return f'<h1>{escape(facts.name)}</h1><p class="soft"><code>{escape(facts.signature)}</code></p>{verdict}{note}'


def _tiles(facts: Facts) -> str:
    if facts.choice.winner is None:
        return ""
    trial, eager = facts.trials[facts.choice.winner], eager_of(facts)
    timing, verdict = trial.timing, trial.verdict
    if timing is None or verdict is None:
        return ""
    first = timing.curve[0]
    tiles = [(f"{ms_text(first.p50_ms)} ms", f"p50 at batch 1 (p99 {ms_text(first.p99_ms)})")]
    if eager is not None and eager.timing is not None:
        tiles.insert(0, (f"{eager.timing.curve[0].p50_ms / first.p50_ms:.1f}x", "faster than eager at batch 1"))
        tiles.append((f"{best_rate(trial):,.0f}/s", f"rows at best ({best_rate(trial) / best_rate(eager):.1f}x eager)"))
        tiles.append((f"{megabytes(timing.file_size)} MB", f"on disk (eager {megabytes(eager.timing.file_size)} MB)"))
    tiles.append((f"{timing.peak_memory / 1e6:.0f} MB", "peak memory of the process, up to batch 8"))
    if verdict.metric is not None and verdict.reference_metric is not None:
        tiles.append((f"{verdict.metric:.4g}", f"your metric (eager {verdict.reference_metric:.4g})"))
    elif verdict.top1 is not None:
        tiles.append((f"{verdict.top1:.1%}", f"top-1 agreement on {facts.rows} rows"))
    tiles.append((f"{verdict.error:.2g}", "relative output error"))
    return '<div class="tiles">' + "".join(_tile(*tile) for tile in tiles) + "</div>"


def _tile(value: str, what: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'


def _table(facts: Facts) -> str:
    eager, colours = eager_of(facts), _colours(facts)
    base = eager.timing.curve[0].p50_ms if eager and eager.timing else 0.0
    rows = []
    for trial in ordered(facts):
        if trial.status == "skipped":
            continue  # they have no numbers: they are told below
        won = has_won(facts, trial)
        label, *others, remark = cells(trial, base=base, outside=outside_of(facts, trial), won=won)
        key = f'<i class="key" style="--c:var(--c{colours[trial.recipe.backend]})"></i>'
        remark = "; ".join(word for word in (remark, *trial.notes) if word)
        below = f"<small>{escape(remark)}</small>" if remark else ""
        cols = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        kind = "won" if won else trial.status
        rows.append(f'<tr class="{kind}"><td>{key}{escape(label)}{below}</td>{cols}</tr>')
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    return (
        f'<h2>Trials</h2><div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        '</div><p class="soft">Latencies in milliseconds; b1 and b8 are batch sizes; error is relative L2 against '
        "eager fp32; each candidate was packed, opened from disk in a fresh process, judged and measured there.</p>"
    )


def _plots(facts: Facts) -> str:
    measured = [trial for trial in facts.trials if trial.timing and trial.timing.curve and trial.verdict]
    if not measured:
        return ""
    errors = [t.verdict.error for t in measured if t.verdict and 0 < t.verdict.error < HOPELESS]
    floor = min(errors, default=1e-7) / 3
    by_error, by_size = _pareto(facts, measured, floor), _sizes(facts, measured)
    rates, calls = _curves(facts, measured, rate=True), _curves(facts, measured, rate=False)
    cards = [
        _card("Latency against error", by_error, "Left and low is better. Ring: winner. Hollow: refused."),
        _card("Latency against size", by_size, "Size of all files of the artifact. Left and low is better."),
        _card("Throughput by batch size", rates, "Rows a second; the thick line is the winner."),
        _card("Latency by batch size", calls, "Median of one call; the thick line is the winner."),
    ]
    names = "".join(
        f'<span><i class="key" style="--c:var(--c{colour})"></i>{escape(backend)}</span>'
        for backend, colour in _colours(facts).items()
        if any(trial.recipe.backend == backend for trial in measured)
    )
    return f'<h2>Plots</h2><p class="legend">{names}</p><div class="plots">{"".join(cards)}</div>'


def _card(title: str, svg: str, words: str) -> str:
    return f'<div class="plot"><h3>{escape(title)}</h3>{svg}<p class="soft">{escape(words)}</p></div>' if svg else ""


def _pareto(facts: Facts, measured: Sequence[Trial], floor: float) -> str:
    dots = [
        _dot(facts, trial, max(trial.verdict.error, floor))
        for trial in measured
        if trial.verdict and trial.verdict.error < HOPELESS
    ]
    return plots.scatter(dots, x_title="p50 at batch 1, ms", y_title="relative output error")


def _sizes(facts: Facts, measured: Sequence[Trial]) -> str:
    dots = [_dot(facts, trial, trial.timing.file_size / 1e6) for trial in measured if trial.timing]
    return plots.scatter(dots, x_title="p50 at batch 1, ms", y_title="size, MB")


def _dot(facts: Facts, trial: Trial, y: float) -> plots.Dot:
    assert trial.timing is not None  # noqa: S101  # only measured trials are drawn
    x = trial.timing.curve[0].p50_ms
    label = f"{trial.recipe.label}: {ms_text(x)} ms, {plots.number(y)}"
    colour = _colours(facts)[trial.recipe.backend]
    return plots.Dot(x, y, label, colour, strong=has_won(facts, trial), hollow=trial.status != "ok")


def _curves(facts: Facts, measured: Sequence[Trial], *, rate: bool) -> str:
    series = [
        plots.Series(
            trial.recipe.label,
            [(point.batch, point.rows_per_s if rate else point.p50_ms) for point in trial.timing.curve],
            _colours(facts)[trial.recipe.backend],
            strong=has_won(facts, trial),
        )
        for trial in measured
        if trial.timing and at_batch(trial, 8)
    ]
    return plots.lines(series, x_title="batch size", y_title="rows/s" if rate else "p50, ms")


def _sensitivity(facts: Facts) -> str:
    if not facts.sensitivity:
        return ""
    kept = {path for trial in facts.trials if trial.status == "ok" for path in left_in_float(trial.recipe)}
    worst = sorted(facts.sensitivity, key=lambda item: item[1])[:24]
    svg = plots.bars([(name, value, name in kept) for name, value in worst], unit="dB")
    words = "Signal to quantization noise of single layers, the most sensitive first; marked: kept in floating point."
    return f'<h2>Sensitivity to int8</h2><div class="plots">{_card("Layers", svg, words)}</div>'


def _troubles(facts: Facts) -> str:
    items = [
        _trouble(trial.recipe.label, trial.failure, trial.log)
        for trial in ordered(facts)
        if trial.status in ("refused", "failed")
    ]
    reasons = dict.fromkeys(trial.failure for trial in facts.trials if trial.status == "skipped")
    for reason in reasons:
        skipped = [trial.recipe.label for trial in facts.trials if (trial.status, trial.failure) == ("skipped", reason)]
        items.append(_trouble(f"{len(skipped)} not tried", f"{reason}: {', '.join(skipped)}", ""))
    items += [_trouble(name, reason, "") for name, reason in sorted(facts.left_out.items())]
    if not items:
        return ""
    return f'<h2>What was refused, failed or left out</h2><div class="wide">{"".join(items)}</div>'


def _trouble(label: str, reason: str, log: str) -> str:
    words = f"<b>{escape(label)}</b>: {escape(reason)}"
    if not log:
        return f'<div class="item">{words}</div>'
    return f'<details class="item"><summary>{words}</summary><pre>{escape(log)}</pre></details>'


def reproduce(facts: Facts, trial: Trial) -> str:
    """One command (or call, for a search from Python) that runs one row again."""
    steps = tuple(step for step in trial.recipe.transforms if step.transform != finetune.STEP)  # --finetune takes it
    recipe = msgspec.json.encode(msgspec.structs.replace(trial.recipe, transforms=steps)).decode()
    if facts.command:
        words = shlex.split(facts.command)
        kept = [word for before, word in pairwise(["", *words]) if not {before, word} & _NOT_ITS_OWN]
        return shlex.join([*kept, "--no-publish", "--recipe", recipe])
    return f"torchship.optimize(module, example_inputs, recipes=[msgspec.json.decode({recipe!r}, type=Recipe)])"


def _commands(facts: Facts) -> str:
    items = [
        f'<details class="item"><summary>{escape(trial.recipe.label)}</summary>'
        f"<pre>{escape(reproduce(facts, trial))}</pre></details>"
        for trial in ordered(facts)
    ]
    whole = f"<pre>{escape(facts.command)}</pre>" if facts.command else ""
    return f'<h2>Run it again</h2>{whole}<div class="wide">{"".join(items)}</div>'


def _circumstances(facts: Facts) -> str:
    versions = {"torchship": facts.torchship, **facts.packages}
    pairs = [
        ("machine", facts.hardware),
        ("threads", str(facts.threads)),
        ("device", facts.device),
        ("source", facts.source),
        ("when", f"{facts.created}, {facts.seconds:.0f} s"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("judged on", f"{facts.rows} rows"),
        *(("note", note) for note in facts.notes),
    ]
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in pairs)
    return f'<h2>Circumstances</h2><div class="wide"><dl>{rows}</dl></div>'
