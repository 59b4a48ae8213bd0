"""What the server tells about a model, as Triton's clients expect it: metadata, configuration and statistics; and what
a caller who loads the model may change of its configuration."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from torchship import hardware
from torchship.errors import BadInput
from torchship.pipeline.planning import Plan
from torchship.serve.config import ModelConfig
from torchship.serve.engine.line import Line
from torchship.serve.metrics import BatchMeter, StationMeter
from torchship.tensors import TensorSpec

_TYPES = {"BYTES": "TYPE_STRING"}
_ROWS = 4096


def metadata(plan: Plan, *, name: str, versions: Sequence[str]) -> dict[str, Any]:
    """The model's metadata; `parameters` lists what a request may set."""
    inputs, outputs = (
        [{"name": spec.name, "datatype": spec.dtype, "shape": spec.wire_shape} for spec in side]
        for side in (plan.signature.inputs, plan.signature.outputs)
    )
    parameters: dict[str, dict[str, Any]] = {}
    for known in plan.parameters:
        parameters[known.name] = told = {"default": known.default}
        for key, bound in (("minimum", known.low), ("maximum", known.high)):
            if bound is not None:
                told[key] = int(bound) if isinstance(known.default, int) else bound
        if known.about:
            told["description"] = known.about
    return {
        "name": name,
        "versions": list(versions),
        "platform": "torchship",
        "inputs": inputs,
        "outputs": outputs,
        "parameters": parameters,
    }


def configuration(line: Line, *, name: str) -> dict[str, Any]:
    """The model's configuration: batch axis left out of `dims` where the model is batched, as Triton does.

    A pipeline cuts the rows of a request for each of its stages, so that only the queue bounds them.
    """
    plan, limits = line.plan, line.limits
    batched = plan.signature.batched

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        dims = spec.wire_shape[1:] if batched else spec.wire_shape
        return {"name": spec.name, "data_type": _TYPES.get(spec.dtype, f"TYPE_{spec.dtype}"), "dims": dims}

    def given(spec: TensorSpec) -> dict[str, Any]:
        found = tensor(spec)
        dims = found["dims"]
        if len(dims) == 3 and spec.dtype != "BYTES" and (dims[0] in (1, 3) or dims[2] in (1, 3)):
            # clients that prepare pictures ask where their channels are
            found["format"] = "FORMAT_NCHW" if dims[0] in (1, 3) else "FORMAT_NHWC"
        return found | ({"optional": True} if spec.optional else {})

    scheduler: dict[str, Any] = {"dynamic_batching": {"max_queue_delay_microseconds": int(limits.max_wait * 1e6)}}
    if any(node.sequential for node in line.nodes):
        scheduler = {"sequence_batching": {"max_sequence_idle_microseconds": int(limits.sequence_idle * 1e6)}}
    return {
        "name": name,
        "platform": "torchship",
        "backend": "torchship",
        "max_batch_size": (plan.max_batch if len(plan.nodes) == 1 else limits.queue_rows) if batched else 0,
        "input": [given(spec) for spec in plan.signature.inputs],
        "output": [tensor(spec) for spec in plan.signature.outputs],
        **scheduler,
        "instance_group": [
            {"name": station.name, "kind": "KIND_CPU", "count": station.copies} for station in line.stations
        ],
        "model_transaction_policy": {"decoupled": plan.streams},
    }


def statistics(line: Line, *, name: str, version: str) -> dict[str, Any]:
    """One entry of `model_stats`; durations in nanoseconds, summed over requests."""
    meter = line.meter
    stations = [station.meter for station in line.stations]
    last = time.time() - (time.monotonic() - meter.last) if meter.last else 0.0
    batches: dict[int, list[BatchMeter]] = {}
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
            "success": _duration(meter.success, meter.seconds),
            "fail": _duration(meter.failed, meter.failed_seconds),
            "queue": _duration(meter.success, sum(station.queued for station in stations)),
            **_computing(meter.success, stations),
            "cache_hit": _duration(0, 0.0),
            "cache_miss": _duration(0, 0.0),
        },
        "batch_stats": [
            {"batch_size": size, **_computing(sum(batch.calls for batch in found), found)}
            for size, found in sorted(batches.items())
        ],
        "memory_usage": [],
        "response_stats": {},
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * 1e9)}


def _computing(count: int, meters: Sequence[StationMeter | BatchMeter]) -> dict[str, dict[str, int]]:
    """What was spent on writing inputs, running, and collecting outputs."""
    return {
        "compute_input": _duration(count, sum(meter.packing for meter in meters)),
        "compute_infer": _duration(count, sum(meter.running for meter in meters)),
        "compute_output": _duration(count, sum(meter.passing for meter in meters)),
    }


class _Batching(msgspec.Struct, forbid_unknown_fields=True):
    max_queue_delay_microseconds: int = 0


class _Group(msgspec.Struct):
    count: int = 1


class _Wish(msgspec.Struct):
    max_batch_size: int | None = None
    dynamic_batching: _Batching | None = None
    instance_group: list[_Group] | None = None


_KNOWN = {field.name for field in msgspec.structs.fields(_Wish)}


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raise BadInput for a parameter of a load that is not `config`."""
    for name in parameters:
        if name.startswith("file:"):
            raise BadInput(f"Invalid file path {name[:60]!r}: files are not taken", hint="publish them into the store")
        if name != "config":
            raise BadInput(f"unknown parameter {name[:60]!r}", hint="config is the only one")


def overridden(config: ModelConfig, text: Any, *, told: Mapping[str, Any]) -> ModelConfig:
    """`config` with what the JSON `text` changes: batch size, batching delay, number of processes.

    `told` is the configuration that callers see now: what they send back unchanged is no change. Raises BadInput.
    """
    if not isinstance(text, str):
        raise BadInput(f"config is {type(text).__name__}, expected a string of JSON")
    try:
        fields = msgspec.json.decode(text, type=dict[str, Any])
        wish = msgspec.convert({name: fields[name] for name in _KNOWN & fields.keys()}, _Wish, strict=False)
    except (msgspec.MsgspecError, RecursionError, ValueError) as fault:
        raise BadInput(f"config: {fault}", hint='a model configuration as JSON, as in {"max_batch_size": 16}') from None
    for name in sorted(fields.keys() - _KNOWN):
        if fields[name] != told.get(name):
            raise BadInput(f"config: {name[:60]!r} cannot be changed", hint=f"these can: {', '.join(sorted(_KNOWN))}")
    changes: dict[str, Any] = {}
    if wish.max_batch_size is not None and wish.max_batch_size != told.get("max_batch_size"):
        if config.stages:
            raise BadInput("config: the stages of a pipeline have batch sizes of their own")
        changes["max_batch"] = wish.max_batch_size
    if wish.dynamic_batching is not None:
        changes["max_wait"] = wish.dynamic_batching.max_queue_delay_microseconds / 1e6
    if wish.instance_group and fields["instance_group"] != told.get("instance_group"):
        changes["copies"] = wish.instance_group[0].count
    most = {"max_batch": _ROWS, "copies": max(config.copies, 2 * hardware.cores()), "max_wait": 10}
    for name, value in changes.items():
        if not (0 if name == "max_wait" else 1) <= value <= most[name]:
            raise BadInput(f"config: {name} {value} is out of bounds", hint=f"at most {most[name]}")
    return msgspec.structs.replace(config, **changes)
