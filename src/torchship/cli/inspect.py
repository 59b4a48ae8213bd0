"""`torchship inspect ARTIFACT`: what an artifact holds and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import click

from torchship import hardware, home, plugins
from torchship.artifact import Artifact, Store, archive, open_artifact, signing
from torchship.cli import _shown
from torchship.cli._shown import human_size, table


@click.command(
    epilog="""\b
Examples:
  torchship inspect resnet18
  torchship inspect resnet18@3 --store runs/store
  torchship inspect downloads/resnet18.zip --json | jq .manifest.recipe
"""
)
@click.argument("target", metavar="ARTIFACT")
@click.option("--store", default=None, metavar="DIR", help="Where names are looked up.")
@click.option("--no-verify", is_flag=True, help="Read the manifest only; hash no files.")
@click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON to stdout.")
def command(*, target: str, store: str | None, no_verify: bool, as_json: bool) -> None:
    """Show what an artifact holds and what was measured, after checking every file.

    ARTIFACT is a name in the store (resnet18, resnet18@3), a folder, or an archive of one (.tar, .tar.gz, .zip).
    """
    with ExitStack() as stack:
        if target.lower().endswith(archive.SUFFIXES) and home.expand(target).is_file():
            artifact = stack.enter_context(archive.extracted(target))
        else:
            artifact = open_artifact(Store(store).resolve(target), verify=not no_verify)
        if as_json:
            _shown.print_json({"path": str(artifact.path), "size": artifact.size, "manifest": artifact.manifest})
            return
        out = _shown.console()
        for number, shown in enumerate(_tables(artifact)):
            if number:
                out.print()
            out.print(shown)


def _tables(artifact: Artifact) -> Iterator[Any]:
    """Everything the manifest says, for readers."""
    manifest = artifact.manifest
    yield table(("", ""), _facts(artifact))
    sides = [("input", spec) for spec in manifest.signature.inputs]
    sides += [("output", spec) for spec in manifest.signature.outputs]
    specs = [
        (side, spec.name + "?" * spec.optional, spec.dtype, "[" + ", ".join(map(str, spec.shape)) + "]")
        for side, spec in sides
    ]
    kind = "rows of axis 0 may be batched" if manifest.signature.batched else "one job at a time"
    yield table(("", "name", "datatype", "shape"), specs, title=f"Signature ({kind})")
    if manifest.kind == "pipeline":
        from torchship.pipeline.config import read_artifact

        nodes = enumerate(read_artifact(artifact, trust=True).stages, 1)  # nothing is opened
        stages = [(i, s.name or "-", s.run or s.artifact or s.remote, s.options or "-") for i, s in nodes]
        yield table(("", "name", "runs", "options"), stages, title="Stages")
    yield from _measured(artifact)
    native = any(entry.kind == "native" for entry in manifest.files)
    files = [(entry.path, human_size(entry.size), entry.kind, entry.sha256[:16]) for entry in manifest.files]
    title = "Files (native code: opens only with --trust or a trusted signature)" if native else "Files"
    yield table(("path", "size", "kind", "sha256"), files, title=title, right=["size"])


def _facts(artifact: Artifact) -> Iterator[tuple[str, object]]:
    manifest, made = artifact.manifest, artifact.manifest.provenance
    same = "this machine" if manifest.fingerprint == hardware.here().fingerprint else "another machine"
    yield "name", manifest.name
    yield "path", artifact.path
    yield "kind", manifest.kind
    yield "recipe", manifest.recipe.label
    yield "max batch", manifest.max_batch
    if (described := plugins.fact("backends", manifest.recipe.backend, "described")) is not None:
        yield "engine", described(artifact.path / "backend")
    yield "size", human_size(artifact.size)
    yield "source", made.source
    yield "created", f"{made.created} by torchship {made.torchship}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in made.packages.items()) or "-"
    yield "measured on", f"{manifest.hardware} ({same})"
    yield "signature", _signature(artifact)
    if manifest.fallback:
        yield "fallback", manifest.fallback.label
    if manifest.labels:
        few = ", ".join(manifest.labels[:3])
        yield "labels", f"{len(manifest.labels)} ({few}{', ...' if len(manifest.labels) > 3 else ''})"


def _signature(artifact: Artifact) -> str:
    try:
        found = signing.signer(artifact.path, digest=artifact.digest)
    except ImportError:
        return "cannot be checked: pip install cryptography"
    if not found:
        return "none"
    name = signing.trusted_keys().get(found)
    return f"by {name}, which is trusted" if name else f"by {found[:16]}..., which is not trusted"


def _measured(artifact: Artifact) -> Iterator[Any]:
    timing, verdict = artifact.manifest.timing, artifact.manifest.verdict
    if timing:
        rows = [
            (p.batch, f"{p.p50_ms:.2f}", f"{p.p90_ms:.2f}", f"{p.p99_ms:.2f}", f"{p.rows_per_s:,.0f}")
            for p in timing.curve
        ]
        columns = ("batch", "p50 ms", "p90 ms", "p99 ms", "rows/s")
        title = f"Measured with {timing.threads} threads: loads in {timing.load_s:.2f} s, peak memory "
        if served := timing.served:
            title = title.replace("peak", f"a whole server in batches of {served.max_batch}'s peak")
        yield table(columns, rows, title=title + human_size(timing.peak_memory), right=["batch", "rows/s"])
    if verdict:
        reason = f": {verdict.reason}" if verdict.reason else ""
        facts = [
            ("verdict", f"{'passed' if verdict.passed else 'refused'}{reason}"),
            ("largest relative error", f"{verdict.error:.2e}"),
            ("cosine", f"{verdict.cosine:.6f}"),
        ]
        if verdict.top1 is not None:
            facts.append(("same top-1", f"{verdict.top1:.2%}"))
        if verdict.metric is not None:
            facts.append(("your metric", f"{verdict.metric:.4f} (reference {verdict.reference_metric})"))
        yield table(("", ""), facts, title="Guard: against the fp32 reference")
