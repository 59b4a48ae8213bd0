"""What the server tells about a model: metadata, configuration and statistics, as Triton's clients expect them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torchship.pipeline.planning import Plan
from torchship.serve.engine.line import Line
from torchship.stage import Parameter
from torchship.tensors import TensorSpec

_TYPES = {"BYTES": "TYPE_STRING"}


def metadata(plan: Plan, *, name: str, versions: Sequence[str]) -> dict[str, Any]:
    """The model's metadata; `parameters` lists what a request may set."""
    return {
        "name": name,
        "versions": list(versions),
        "platform": "torchship",
        "inputs": [_tensor(spec) for spec in plan.signature.inputs],
        "outputs": [_tensor(spec) for spec in plan.signature.outputs],
        "parameters": {
            parameter.name: {
                "default": parameter.default,
                **_bounds(parameter),
                **({"description": parameter.about} if parameter.about else {}),
            }
            for parameter in plan.parameters
        },
    }


def _bounds(parameter: Parameter) -> dict[str, float]:
    whole = isinstance(parameter.default, int)
    found = {"minimum": parameter.low, "maximum": parameter.high}
    return {name: int(bound) if whole else bound for name, bound in found.items() if bound is not None}


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.dtype, "shape": spec.wire_shape}


def configuration(line: Line, *, name: str) -> dict[str, Any]:
    """The model's configuration: batch axis left out of `dims` where the model is batched, as Triton does.

    A pipeline cuts the rows of a request for each of its stages, so that only the queue bounds them.
    """
    plan = line.plan
    batched = plan.signature.batched

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        dims = spec.wire_shape[1:] if batched else spec.wire_shape
        return {"name": spec.name, "data_type": _TYPES.get(spec.dtype, f"TYPE_{spec.dtype}"), "dims": dims}

    scheduler: dict[str, Any] = {"dynamic_batching": {"max_queue_delay_microseconds": int(line.limits.max_wait * 1e6)}}
    if any(node.sequential for node in line.nodes):
        scheduler = {"sequence_batching": {"max_sequence_idle_microseconds": int(line.limits.sequence_idle * 1e6)}}
    return {
        "name": name,
        "platform": "torchship",
        "backend": "torchship",
        "max_batch_size": (plan.max_batch if len(plan.nodes) == 1 else line.limits.queue_rows) if batched else 0,
        "input": [tensor(spec) | _format(spec, batched) | _optional(spec) for spec in plan.signature.inputs],
        "output": [tensor(spec) for spec in plan.signature.outputs],
        **scheduler,
        "instance_group": [
            {"name": node.station.name, "kind": "KIND_CPU", "count": node.station.copies} for node in line.nodes
        ],
        "model_transaction_policy": {"decoupled": plan.streams},
    }


def _optional(spec: TensorSpec) -> dict[str, bool]:
    return {"optional": True} if spec.optional else {}


def _format(spec: TensorSpec, batched: bool) -> dict[str, str]:
    """Where the channels of a picture are: clients that prepare pictures ask for it."""
    dims = spec.shape[1:] if batched else spec.shape
    if len(dims) != 3 or spec.dtype == "BYTES":
        return {}
    channels = (1, 3)
    return (
        {"format": "FORMAT_NCHW"} if dims[0] in channels else {"format": "FORMAT_NHWC"} if dims[2] in channels else {}
    )


def statistics(line: Line, *, name: str, version: str) -> dict[str, Any]:
    """One entry of `model_stats`; durations in nanoseconds, summed over requests."""
    meter = line.meter
    stations = [node.station.meter for node in line.nodes]

    def duration(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": int(seconds * 1e9)}

    last = time.time() - (time.monotonic() - meter.last) if meter.last else 0.0
    batches: dict[int, list[Any]] = {}
    for station in stations:
        for size, batch in station.batches.items():
            batches.setdefault(size, []).append(batch)
    return {
        "name": name,
        "version": version,
        "last_inference": int(last * 1e3),
        "inference_count": meter.rows,
        "execution_count": line.executions,
        "inference_stats": {
            "success": duration(meter.success, meter.seconds),
            "fail": duration(meter.failed, meter.failed_seconds),
            "queue": duration(meter.success, sum(station.queued for station in stations)),
            "compute_input": duration(meter.success, sum(station.packing for station in stations)),
            "compute_infer": duration(meter.success, sum(station.running for station in stations)),
            "compute_output": duration(meter.success, sum(station.passing for station in stations)),
            "cache_hit": duration(0, 0.0),
            "cache_miss": duration(0, 0.0),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": duration(sum(b.calls for b in found), sum(b.packing for b in found)),
                "compute_infer": duration(sum(b.calls for b in found), sum(b.running for b in found)),
                "compute_output": duration(sum(b.calls for b in found), sum(b.passing for b in found)),
            }
            for size, found in sorted(batches.items())
        ],
        "memory_usage": [],
        "response_stats": {},
    }
