"""Which device a recipe runs on, and what torch is told about precision and layout there."""

from __future__ import annotations

from torchship.errors import BadConfig
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
OPTIONS = ("device", "precision", "mode", "channels_last", "keep", "modules")


def of(options: Options, *, device: str = "cpu") -> str:
    """The device that the caller names, else the recipe's own, else the processor."""
    return device if device != "cpu" else str(options.get("device", "cpu"))


def kind(device: str) -> str:
    """`cuda` for `cuda:1`."""
    return device.partition(":")[0]


def shaped(model: Model, options: Options) -> Model:
    """The model as the options want it.

    `precision` fp32 | tf32 | bf16 | fp16; `mode` autocast (the default on the processor) or cast (the default
    elsewhere); `channels_last`; `keep` and `modules` (what stays in fp32, see `paths.rules`). Raises BadConfig.
    """
    from torchship.lowering import paths, variants

    precision = str(options.get("precision", "fp32"))
    if precision not in PRECISIONS:
        raise BadConfig(f"precision {precision!r} is unknown here", hint=f"use one of {', '.join(PRECISIONS)}")
    if options.get("channels_last"):
        model = variants.laid_out(model, last=True)
    keep = paths.rules(options, narrow=(precision,), key="keep", module=model.module)
    target = kind(of(options))
    mode = str(options.get("mode") or ("autocast" if target == "cpu" else "cast"))
    narrow = "fp32" if precision == "tf32" else precision
    return variants.in_precision(model, narrow, mode=mode, device=target, keep=keep)


def has_bf16(hardware: Hardware) -> bool:
    """Whether the processor multiplies bf16 in hardware."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(hardware.features))


def pictures(model: Model) -> bool:
    """Whether an input looks like pictures, for which channels-last memory pays."""
    return any(len(spec.shape) == 4 for spec in model.signature.inputs)
