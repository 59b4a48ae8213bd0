"""Channels-last memory for pictures and volumes, which convolutions of half precision and int8 run on; or plain."""

from __future__ import annotations

from torchship.errors import BadConfig
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options

OPTIONS = ("layout",)


def apply(model: Model, *, options: Options) -> Model:
    """`layout` channels_last (the default) | contiguous. Raises BadConfig."""
    from torchship.lowering import variants

    layout = options.get("layout", "channels_last")
    if layout not in ("channels_last", "contiguous"):
        raise BadConfig(f"layout {layout!r} is unknown", hint="use channels_last or contiguous")
    return variants.laid_out(model, last=layout == "channels_last")


def propose(model: Model, *, hardware: Hardware) -> list[Options]:
    """Where an input has four axes."""
    return [{"layout": "channels_last"}] if any(len(spec.shape) == 4 for spec in model.signature.inputs) else []
