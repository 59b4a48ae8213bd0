"""Compares a pipeline's tensors, also those inside it, with what the code that trained the model gives."""

from __future__ import annotations

import msgspec

from torchship.artifact import Store
from torchship.artifact.recheck import faults
from torchship.difference import relative_error
from torchship.errors import BadConfig, GuardRefused
from torchship.pipeline.composed import Composed
from torchship.pipeline.planning import Plan, plan
from torchship.tensors import FLOATS, Tensors


def check_parity(
    made: Plan, *, inputs: Tensors, expected: Tensors, store: Store | None = None, tolerance: float = 1e-3
) -> dict[str, float]:
    """Run the pipeline on `inputs` and compare every tensor that `expected` names, such as `pixels` of a stage.

    Returns the relative L2 error of each floating-point tensor. Raises GuardRefused when one is above `tolerance`,
    BadConfig for a tensor that no stage gives.
    """
    if not expected:
        raise BadConfig("nothing is expected", hint="name at least one tensor of the pipeline")
    config = msgspec.structs.replace(made.config, outputs=tuple(expected))
    composed = Composed(plan(config, store), store)
    try:
        found = composed(inputs)
    finally:
        composed.close()
    names = {spec.name: name for spec, name in zip(composed.signature.outputs, expected, strict=True)}
    wanted = {inner: expected[name] for inner, name in names.items()}
    for inner, fault in faults(composed.signature, wanted, found, allowed=tolerance).items():
        raise GuardRefused(
            f"{names[inner]!r} {fault}: the pipeline does not do what was expected",
            hint="compare size, interpolation, crop, mean, std and colour order with the training code",
        )
    floats = {spec.name for spec in composed.signature.outputs if spec.dtype in FLOATS}
    return {names[inner]: relative_error(wanted[inner], found[inner]) for inner in wanted if inner in floats}
