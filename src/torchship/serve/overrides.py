"""What a caller who loads a model may change of its configuration, in the words of Triton's model configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from torchship import hardware
from torchship.errors import BadInput
from torchship.serve.config import ModelConfig


class _Batching(msgspec.Struct, forbid_unknown_fields=True):
    max_queue_delay_microseconds: int = 0


class _Group(msgspec.Struct):
    count: int = 1


class _Wish(msgspec.Struct):
    max_batch_size: int | None = None
    dynamic_batching: _Batching | None = None
    instance_group: list[_Group] | None = None


_ROWS = 4096
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
