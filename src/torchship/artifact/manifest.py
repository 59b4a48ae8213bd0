"""The manifest of an artifact: everything that is known about it, as plain JSON."""

from __future__ import annotations

from typing import Literal

import msgspec

from torchship.recipe import Recipe
from torchship.tensors import Signature

FORMAT = 1


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the artifact. `native` files are someone's machine code and open only with trust."""

    path: str
    sha256: str
    size: int
    kind: Literal["data", "native"] = "data"


class BatchPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One point of the latency curve, as measured: milliseconds per call, rows per second."""

    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    rows_per_s: float


class ServedMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a whole server took under load: `peak` bytes of all its processes, in batches of at most `max_batch` rows,
    with the model in a thread of the server (`one_process`) or in a process of its own."""

    peak: int
    max_batch: int
    one_process: bool


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a fresh process measured; `peak_memory` and `file_size` in bytes, `load_s` in seconds.

    `served`: where memory mattered, what a whole server took, which `peak_memory` then is too.
    """

    curve: tuple[BatchPoint, ...]
    load_s: float
    peak_memory: int
    file_size: int
    threads: int
    served: ServedMemory | None = None


class Evidence(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a candidate costs, and how sure that is.

    `state`: proved (the bound is within what may be lost), plausible (the estimate is, but the rows are too few) or
    refused. `measure`: top-1, neighbours, equality, variation or metric; empty where the rows allow none. `cost` is the
    estimate and `bound` what it lies under with 95 % certainty over the choice of rows, both in the unit of the measure
    (0.01 is one point), on `rows` rows of real data in `groups` groups. `spread`: standard deviation of a row's cost;
    `events` groups hold flips, at `event` each. `drift`: relative error of the worst row, `value_drift` the same
    without class scores and embeddings; `made` of made-up rows. `broken`: what no number forgives, a law or a row or
    channel that is lost.
    """

    state: Literal["", "proved", "plausible", "refused"] = ""
    measure: str = ""
    output: str = ""
    cost: float = 0.0
    bound: float = 0.0
    rows: int = 0
    groups: int = 0
    spread: float = 0.0
    events: int = 0
    event: float = 0.0
    drift: float = 0.0
    value_drift: float = 0.0
    made: float = 0.0
    broken: str = ""


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the guard found: agreement with the fp32 reference, and the user's metric where there is one.

    `error` is the largest relative L2 error over the outputs, `cosine` the smallest cosine similarity,
    `top1` the share of rows with the reference's arg-max (None where no output is a classifier's).
    `metric` and `reference_metric` are the user's own. `reason` says in one sentence what the candidate costs, or why
    it is refused. `evidence` stays in the report; an artifact keeps the sentence, which older readers know.
    `clear_top1` and `clear_rows` are read from older artifacts only.
    """

    passed: bool
    error: float
    cosine: float
    top1: float | None = None
    metric: float | None = None
    reference_metric: float | None = None
    reason: str = ""
    clear_top1: float | None = None
    clear_rows: int = 0
    evidence: Evidence | None = None


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an artifact comes from: torchship and package versions, time (ISO, UTC), model."""

    torchship: str
    created: str
    source: str
    model_hash: str
    packages: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `manifest.json`.

    `recipe` made the files under `backend/`; `fallback`, where there is one, those under `fallback/`, which open on
    any machine. `hardware` is a line for readers, `fingerprint` says where the timings hold, and `family` where native
    files may be opened.
    `labels` names the classes of a classifier, where known.
    """

    format: int
    name: str
    signature: Signature
    recipe: Recipe
    files: tuple[FileEntry, ...]
    provenance: Provenance
    hardware: str
    fingerprint: str
    max_batch: int
    kind: Literal["model", "pipeline"] = "model"
    family: str = ""
    fallback: Recipe | None = None
    timing: Timing | None = None
    verdict: Verdict | None = None
    labels: tuple[str, ...] = ()
