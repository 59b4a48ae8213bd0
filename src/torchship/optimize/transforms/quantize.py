"""int8 inside torch: linear layers by torchao (dynamic, weight-only), whole graphs by PT2E (static)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from torchship.errors import BuildFailed
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.plugins import missing
from torchship.recipe import Options, choice

if TYPE_CHECKING:
    import torch

    from torchship.lowering.paths import Rules

PRECISION = "int8"
NEEDS, TITLE = "torchao", "torch's own int8"
_SCHEMES = ("dynamic", "weight_only", "static")
OPTIONS = ("scheme", "exclude", "modules")


def apply(model: Model, *, options: Options) -> Model:
    """`scheme`: dynamic (linear layers, activations quantized as they come) | weight_only (linear layers) | static
    (convolutions too, calibrated; for torch.compile on x86). `exclude` and `modules` ({"head": "fp32"}) are path
    patterns of what stays in float, see `paths.rules`. Raises BadConfig, or BuildFailed with the quantizer's reason.
    """
    from torchship.lowering import paths
    from torchship.lowering.program import as_error

    scheme = choice(options, "scheme", _SCHEMES, of="quantize")
    if absent := missing(NEEDS):
        raise BuildFailed(f"quantize: {absent}")
    rules = paths.rules(options, narrow=("int8",), module=model.module)
    with as_error(BuildFailed, "torchao cannot quantize this model"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _static(model, rules) if scheme == "static" else _linear(model, scheme, rules)


def _linear(model: Model, scheme: str, rules: Rules) -> Model:
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    from torchao.utils import unwrap_tensor_subclass

    from torchship.lowering import surgery

    def wanted(module: torch.nn.Module, path: str) -> bool:
        # attention reads the weight of its own output layer directly, past any quantization
        return type(module) is torch.nn.Linear and not rules.spares(path)

    changed = surgery.copied(model)
    if not any(wanted(module, path) for path, module in changed.module.named_modules()):
        raise BuildFailed(
            "quantize: there is no linear layer to take to int8", hint='convolutions need scheme = "static"'
        )
    for module in changed.module.modules():
        if isinstance(module, torch.nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused path reads float weights
    config = Int8WeightOnlyConfig() if scheme == "weight_only" else Int8DynamicActivationInt8WeightConfig()
    quantize_(changed.module, config, filter_fn=wanted)
    return replace(changed, module=unwrap_tensor_subclass(changed.module))


def _static(model: Model, rules: Rules) -> Model:
    import torch
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    from torchship.lowering import program

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    for path, _ in model.module.named_modules():
        if path and rules.spares(path):
            quantizer.set_module_name_qconfig(path, None)
    prepared = prepare_pt2e(program.export(model).module(check_guards=False), quantizer)
    with torch.no_grad():
        for batch in model.calibration or model.examples:
            prepared(*model.torch_inputs(batch))
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    converted.eval = lambda: converted  # exporters call eval(), which exported graphs refuse
    return replace(model, module=converted)


def propose(model: Model, *, hardware: Hardware) -> list[Options]:
    """Dynamic and weight-only where there are linear layers."""
    linear = any(type(module).__name__ == "Linear" for module in model.module.modules())
    return [{"scheme": "dynamic"}, {"scheme": "weight_only"}] if linear else []
