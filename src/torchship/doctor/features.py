"""What the features of processors and GPUs are good for, and which of them this machine has."""

from __future__ import annotations

import msgspec

from torchship.hardware import Gpu, Hardware

_X86 = {
    "avx2": "fp32 in 8 lanes: the floor of every CPU backend",
    "avx512f": "fp32 in 16 lanes",
    "avx512_vnni": "int8 products in one instruction: 2 to 4x over fp32 for convolutions and linear layers",
    "avx_vnni": "int8 products in 8 lanes, on processors without AVX-512",
    "avx512_bf16": "bf16 products: about 2x over fp32 with half of the memory traffic",
    "avx512_fp16": "fp16 arithmetic",
    "amx_int8": "int8 matrix tiles: the fastest int8 on Xeon, up to 8x VNNI for large layers",
    "amx_bf16": "bf16 matrix tiles: makes bf16 a rival of int8 without calibration",
}
_ARM = {
    "asimddp": "int8 dot products: 2 to 4x over fp32",
    "i8mm": "int8 matrix products: about twice the dot product",
    "bf16": "bf16 matrix products",
    "sve": "vectors wider than 128 bits",
    "sve2": "wide vectors for integers too",
}
# NVIDIA CUDA C++ Programming Guide, table "Tensor Core data types", by compute capability
_TENSOR_CORES = (
    (7.0, "fp16", "Tensor Cores for fp16: autocast or half, channels-last for convolutions"),
    (7.2, "int8", "Tensor Cores for int8: needs calibrated static quantization"),
    (8.0, "bf16/tf32", "Tensor Cores for bf16, and tf32 for fp32 models (`set_float32_matmul_precision`)"),
    (8.9, "fp8", "Tensor Cores for fp8"),
    (10.0, "fp4", "Tensor Cores for fp4"),
)


class Feature(msgspec.Struct, frozen=True):
    """One hardware feature: whether this machine has it, and what it is good for."""

    name: str
    present: bool
    use: str
    device: str = "cpu"


def of(hardware: Hardware) -> list[Feature]:
    """All features that matter on this architecture, present or not."""
    table = (
        _X86 if hardware.machine in ("x86_64", "AMD64") else _ARM if hardware.machine in ("aarch64", "arm64") else {}
    )
    found = [Feature(name, name in hardware.features, use) for name, use in table.items()]
    for gpu in hardware.gpus:
        found += tensor_cores(gpu)
    return found


def tensor_cores(gpu: Gpu) -> list[Feature]:
    """The number formats of a card's Tensor Cores, by its compute capability."""
    try:
        capability = float(gpu.capability)
    except ValueError:
        return []
    return [Feature(kind, capability >= first, use, gpu.name) for first, kind, use in _TENSOR_CORES]


def fast_formats(hardware: Hardware) -> dict[str, str]:
    """Which of int8, bf16 and fp16 this machine computes faster than fp32, each with the feature that does it."""
    rows = (
        ("int8", ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")),
        ("bf16", ("amx_bf16", "avx512_bf16", "bf16")),
        ("fp16", ("avx512_fp16",)),
    )
    found = {kind: next((f for f in features if f in hardware.features), "") for kind, features in rows}
    for gpu in hardware.gpus:
        for feature in tensor_cores(gpu):
            for kind in feature.name.split("/"):
                if feature.present and kind in found:
                    found[kind] = f"Tensor Cores of {gpu.name}"
    return {kind: by for kind, by in found.items() if by}
