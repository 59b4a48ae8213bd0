"""Half precision: under autocast, or weights and tensors throughout, with chosen submodules kept in fp32."""

from __future__ import annotations

from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options

OPTIONS = ("precision", "mode", "device", "keep", "modules")


def apply(model: Model, *, options: Options) -> Model:
    """`precision` bf16 | fp16, `mode` autocast | cast, `device` (cpu), `keep` (path patterns that stay in fp32), or
    `modules` ({"head": "fp32"}, see `paths.rules`). Raises BadConfig.
    """
    from torchship.lowering import paths, variants

    precision = str(options.get("precision", "bf16"))
    return variants.in_precision(
        model,
        precision,
        mode=str(options.get("mode", "autocast")),
        device=str(options.get("device", "cpu")).partition(":")[0],
        keep=paths.rules(options, narrow=(precision,), key="keep", module=model.module),
    )


def propose(model: Model, *, hardware: Hardware) -> list[Options]:
    """bf16 by autocast where the processor multiplies it in hardware."""
    fast = {"avx512_bf16", "amx_bf16"} & set(hardware.features)
    return [{"precision": "bf16", "mode": "autocast"}] if fast else []
