"""Half precision: under autocast, or weights and tensors throughout, with chosen submodules kept in fp32."""

from __future__ import annotations

from torchship.errors import BadConfig
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options


def apply(model: Model, *, options: Options) -> Model:
    """`precision` bf16 | fp16, `mode` autocast | cast, `device` (cpu), `keep` (path patterns that stay in fp32), or
    `modules` ({"head": "fp32"}). Raises BadConfig.
    """
    from torchship.lowering import variants

    keep, modules = options.get("keep") or [], options.get("modules") or {}
    if not isinstance(keep, list) or not isinstance(modules, dict):
        raise BadConfig("precision: keep wants a list of path patterns, modules a table of pattern = setting")
    keep = [*keep, *(pattern for pattern, setting in modules.items() if setting == "fp32")]
    return variants.in_precision(
        model,
        str(options.get("precision", "bf16")),
        mode=str(options.get("mode", "autocast")),
        device=str(options.get("device", "cpu")).partition(":")[0],
        keep=keep,
    )


def propose(model: Model, *, hardware: Hardware) -> list[Options]:
    """bf16 by autocast where the processor multiplies it in hardware."""
    fast = {"avx512_bf16", "amx_bf16"} & set(hardware.features)
    return [{"precision": "bf16", "mode": "autocast"}] if fast else []
