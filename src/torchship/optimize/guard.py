"""The Guard: holds what a candidate was found to cost to what may be lost, and says so in one sentence.

Three verdicts: *proved* (with 95 % certainty over the choice of rows the cost is within `max_drop`), *plausible* (the
estimate is, but on too few rows of real data to prove it) and *refused*. What is measured is told in `judge`; the laws
that no number forgives in `laws`. Beside the cost each precision has a limit for the relative error of the worst row,
for answers that are no class scores and no embeddings (of fp32 for all): fp32 0.002, fp16, bf16 and tf32 0.08, int8 and
below 0.3. What is beyond it is no rounding of that precision, but another computation (decision 0015). A pruned module
is another computation, and made to be close on real rows alone: it has the limit of int8 there, none on made-up rows.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from torchship import plugins
from torchship.artifact.manifest import Evidence, Verdict
from torchship.optimize.judge import FEWEST_GROUPS, rows_needed
from torchship.recipe import PRUNE, Recipe

Precision: TypeAlias = Literal["fp32", "half", "int8"]
LAW_LIMITS: dict[Precision, float] = {"fp32": 1e-3, "half": 0.04, "int8": 0.04}
DRIFT: dict[Precision, float] = {"fp32": 2e-3, "half": 0.08, "int8": 0.3}
_SATURATED = 2.0  # made-up rows may leave the ranges that int8 was calibrated on: so many times more is no fault
_HALF_WORDS = ("fp16", "f16", "tf32", "half")
_INT8_WORDS = ("int8", "int4", "fp8", "quant", "prune")
_WHAT = {
    "top-1": "points of top-1",
    "neighbours": "points of the nearest neighbours' closeness",
    "equality": "points of equal values",
    "variation": "% of what the answers vary by",
}


class Guard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits that a candidate must keep.

    `max_drop`: the most that may be lost, of the user's metric in its own unit (higher is better), else of the measure
    that fits the outputs: 0.01 is one point of top-1, or one hundredth of what the answers vary by. `strict`: refuse
    what is not proved. `error`, `cosine`, `top1`: where set, the largest relative L2 error of an output, the smallest
    cosine similarity, the smallest share of rows with the reference's arg-max. `enabled=False` measures, but refuses
    only wrong shapes and NaN.
    """

    error: float | None = None
    cosine: float | None = None
    top1: float | None = None
    max_drop: float = 0.01
    strict: bool = False
    enabled: bool = True


def precision_of(recipe: Recipe) -> Precision:
    """`fp32`, `half` or `int8`: the coarsest that a recipe's plugins say to compute in, or are told to by options."""
    plugged = [("backends", recipe.backend, recipe.options)]
    plugged += [("transforms", step.transform, step.options) for step in recipe.transforms]
    words = ""
    for kind, name, options in plugged:
        words += f" {plugins.fact(kind, name, 'PRECISION', '')} {' '.join(map(str, options.values()))}".lower()
    if any(word in words for word in _INT8_WORDS):
        return "int8"
    return "half" if any(word in words for word in _HALF_WORDS) else "fp32"


def judge(found: Verdict, *, guard: Guard, recipe: Recipe) -> Verdict:
    """The verdict on a measured difference. Pure: the same numbers and limits give the same verdict."""
    evidence = found.evidence or Evidence()
    if found.evidence is None and not found.passed:
        return found
    reasons = _broken_limits(found, evidence, guard, recipe) if guard.enabled else []
    same = found.error == 0 and evidence.drift == 0 and evidence.made == 0 and evidence.measure != "metric"
    enough = bool(evidence.measure) and evidence.groups >= FEWEST_GROUPS
    proved = same or (enough and evidence.bound <= guard.max_drop + 1e-12)
    if guard.enabled and guard.strict and not proved and not reasons:
        reasons.append(f"only plausible: {sentence(found, evidence, guard=guard)}")
    state: Literal["proved", "plausible", "refused"] = "refused" if reasons else "proved" if proved else "plausible"
    judged = msgspec.structs.replace(evidence, state=state)
    told = "; ".join(reasons) or f"{sentence(found, judged, guard=guard)}"
    return msgspec.structs.replace(found, passed=not reasons, reason=told, evidence=judged)


def _broken_limits(found: Verdict, evidence: Evidence, guard: Guard, recipe: Recipe) -> list[str]:
    pruned, by_metric = any(step.transform == PRUNE for step in recipe.transforms), found.metric is not None
    precision: Precision = "int8" if pruned else precision_of(recipe)
    reasons = [evidence.broken] if evidence.broken else []
    if found.metric is not None and found.reference_metric is not None:
        drop, both = found.reference_metric - found.metric, f"{found.reference_metric:.4g} to {found.metric:.4g}"
        if drop > guard.max_drop + 1e-12:
            reasons.append(f"the metric fell by {drop:.4g} ({both}), more than {guard.max_drop:g}")
    elif evidence.cost > guard.max_drop + 1e-12 and evidence.measure:
        about, most_allowed = (_amount(evidence, value) for value in (evidence.cost, guard.max_drop))
        reasons.append(f"output {evidence.output!r} costs about {about}, more than {most_allowed}")
    if guard.error is None and not by_metric:
        limit = DRIFT[precision]
        drift = evidence.drift if precision == "fp32" else evidence.value_drift
        most = limit * (_SATURATED if precision == "int8" and evidence.measure else 1.0)
        if drift > limit:
            kind = "what is pruned" if pruned else precision
            reasons.append(f"the worst row has a relative error of {drift:.3g}, above {limit:g} for {kind}")
        elif evidence.made > most and not pruned:
            reasons.append(f"made-up rows have a relative error of {evidence.made:.3g}, above {most:g} for {precision}")
    elif guard.error is not None and found.error > guard.error:
        reasons.append(f"output error {found.error:.3g} is above {guard.error:g}")
    if guard.cosine is not None and found.cosine < guard.cosine:
        reasons.append(f"cosine {found.cosine:.4f} is below {guard.cosine:g}")
    if guard.top1 is not None and found.top1 is not None and found.top1 < guard.top1:
        reasons.append(f"top-1 agreement {found.top1:.3f} is below {guard.top1:g}")
    return reasons


def sentence(found: Verdict, evidence: Evidence, *, guard: Guard) -> str:
    """What a candidate costs and how sure that is, in one sentence without its full stop."""
    rows = f"{evidence.rows} rows" if evidence.rows != 1 else "1 row"
    bound, proved = _amount(evidence, evidence.bound), evidence.state == "proved"
    if found.metric is not None and found.reference_metric is not None:
        drop = found.reference_metric - found.metric
        claim = f"your metric falls by {drop:.4g}" if drop > 0 else f"your metric does not fall ({found.metric:.4g})"
        if evidence.measure != "metric":
            return f"{claim}: plausible; return one value for each row and it can be proved"
        noise = " (less than the noise of these rows)" if 0 < drop < evidence.bound - evidence.cost else ""
        claim += f"{noise}, at most by {evidence.bound:.4g}"
    elif proved and found.error == 0:
        return "answers exactly as the original does"
    elif not evidence.measure:
        return f"off by {evidence.drift:.2g} at most on {rows}: plausible; 64 rows of real data or more would prove it"
    else:
        rows += f" in {evidence.groups} groups" if evidence.groups < evidence.rows else ""
        about = _amount(evidence, evidence.cost)
        claim = f"costs at most {bound}" if proved else f"costs about {about} and at most {bound}"
    if proved:
        return f"{claim}, proved on {rows}{' without labels' if evidence.measure == 'top-1' else ''}"
    needed = rows_needed(evidence, most=guard.max_drop)
    more = f"; about {needed} rows like these would prove it" if needed else ""
    return f"{claim} on {rows}: plausible{more}"


def _amount(evidence: Evidence, value: float) -> str:
    return f"{100 * value:.2g} {_WHAT.get(evidence.measure, evidence.measure)}"
