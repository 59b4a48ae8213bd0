"""How the command line shows sizes, times, tables and the facts of an artifact."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from torchship.artifact import Artifact
    from torchship.tensors import Signature


def console() -> Console:
    """A console on stdout that neither colours numbers nor wraps them away when it is piped: COLUMNS, or 140."""
    from rich.console import Console

    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"  # rich alone would keep bold
    found = Console(highlight=False, soft_wrap=False, color_system=colours)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=140)


def human_size(count: float) -> str:
    """Bytes for readers: 512 B, 1.4 MB (decimal, as file systems count)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", right: str = "") -> Any:
    """A plain table; columns whose names are in `right` (separated by blanks) are aligned to the right."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    found = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        found.add_column(column, justify="right" if column in right.split() else "left", overflow="fold")
    for row in rows:
        found.add_row(*(escape(str(cell)) for cell in row))
    return Group(f"[bold]{escape(title)}[/bold]", found) if title else found  # a table's own title wraps at its width


def show_signature(out: Console, signature: Signature) -> None:
    """Inputs and outputs, one a line."""
    sides = [("input", spec) for spec in signature.inputs] + [("output", spec) for spec in signature.outputs]
    rows = [
        (side, spec.name + "?" * spec.optional, spec.dtype, "[" + ", ".join(map(str, spec.shape)) + "]")
        for side, spec in sides
    ]
    kind = "rows of axis 0 may be batched" if signature.batched else "one job at a time"
    out.print(table(("", "name", "datatype", "shape"), rows, title=f"Signature ({kind})"), "")


def show_artifact(out: Console, artifact: Artifact) -> None:
    """Everything the manifest says, for readers."""
    from torchship import hardware

    manifest = artifact.manifest
    made = manifest.provenance
    same = "this machine" if manifest.fingerprint == hardware.here().fingerprint else "another machine"
    facts = [
        ("name", manifest.name),
        ("path", artifact.path),
        ("kind", manifest.kind),
        ("recipe", manifest.recipe.label),
        ("max batch", manifest.max_batch),
        ("size", human_size(artifact.size)),
        ("source", made.source),
        ("created", f"{made.created} by torchship {made.torchship}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in made.packages.items()) or "-"),
        ("measured on", f"{manifest.hardware} ({same})"),
    ]
    facts.append(("signature", _signature(artifact)))
    if manifest.fallback:
        facts.append(("fallback", manifest.fallback.label))
    if manifest.labels:
        few = ", ".join(manifest.labels[:3])
        facts.append(("labels", f"{len(manifest.labels)} ({few}{', ...' if len(manifest.labels) > 3 else ''})"))
    out.print(table(("", ""), facts), "")
    show_signature(out, manifest.signature)
    if manifest.kind == "pipeline":
        _show_stages(out, artifact)
    _show_measured(out, artifact)
    native = any(entry.kind == "native" for entry in manifest.files)
    rows = [(entry.path, human_size(entry.size), entry.kind, entry.sha256[:16]) for entry in manifest.files]
    title = "Files (native code: opens only with --trust or a trusted signature)" if native else "Files"
    out.print(table(("path", "size", "kind", "sha256"), rows, title=title, right="size"))


def _show_stages(out: Console, artifact: Artifact) -> None:
    from torchship.pipeline.config import read_artifact

    stages = read_artifact(artifact, trust=True).stages  # nothing is opened
    rows = [(i, s.name or "-", s.run or s.artifact or s.remote, s.options or "-") for i, s in enumerate(stages, 1)]
    out.print(table(("", "name", "runs", "options"), rows, title="Stages"), "")


def _signature(artifact: Artifact) -> str:
    from torchship.artifact import signing

    try:
        found = signing.signer(artifact.path, digest=artifact.digest)
    except ImportError:
        return "cannot be checked: pip install cryptography"
    if not found:
        return "none"
    name = signing.trusted_keys().get(found)
    return f"by {name}, which is trusted" if name else f"by {found[:16]}..., which is not trusted"


def _show_measured(out: Console, artifact: Artifact) -> None:
    timing, verdict = artifact.manifest.timing, artifact.manifest.verdict
    if timing:
        rows = [
            (p.batch, f"{p.p50_ms:.2f}", f"{p.p90_ms:.2f}", f"{p.p99_ms:.2f}", f"{p.rows_per_s:,.0f}")
            for p in timing.curve
        ]
        columns = ("batch", "p50 ms", "p90 ms", "p99 ms", "rows/s")
        title = f"Measured with {timing.threads} threads: loads in {timing.load_s:.2f} s, peak memory "
        out.print(table(columns, rows, title=title + human_size(timing.peak_memory), right="batch rows/s"), "")
    if verdict:
        facts: list[tuple[str, object]] = [
            ("verdict", f"{'passed' if verdict.passed else 'refused'}{f': {verdict.reason}' if verdict.reason else ''}")
        ]
        facts += [("largest relative error", f"{verdict.error:.2e}"), ("cosine", f"{verdict.cosine:.6f}")]
        if verdict.top1 is not None:
            facts.append(("same top-1", f"{verdict.top1:.2%}"))
        if verdict.metric is not None:
            facts.append(("your metric", f"{verdict.metric:.4f} (reference {verdict.reference_metric})"))
        out.print(table(("", ""), facts, title="Guard: against the fp32 reference"), "")
