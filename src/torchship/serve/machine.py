"""What the machine does, for the metrics: processor and memory from the kernel, GPUs from their driver where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import psutil

from torchship import hardware


class Gauge(NamedTuple):
    """One number under Triton's name; `labels` are `key="value"` pairs, or empty."""

    name: str
    about: str
    value: float
    labels: str = ""


def gauges() -> Iterator[Gauge]:
    """All that can be told here. Triton measures the processor between two looks at it; so does this."""
    memory = hardware.memory()
    yield Gauge("nv_cpu_utilization", "Share of the processor in use since the last look", psutil.cpu_percent() / 100)
    yield Gauge("nv_cpu_memory_total_bytes", "Memory that the server may use", memory)
    yield Gauge("nv_cpu_memory_used_bytes", "Memory in use", memory - hardware.free_memory())
    yield from _gpus()


@cache
def _driver() -> Any:
    """NVIDIA's management library, opened once; None where it, its package `nvidia-ml-py` or a GPU is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    return pynvml


def _gpus() -> Iterator[Gauge]:
    nvml = _driver()
    for index in range(nvml.nvmlDeviceGetCount() if nvml else 0):
        yield from _gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index))


def _gpu(nvml: Any, device: Any) -> Iterator[Gauge]:
    label = f'gpu_uuid="{nvml.nvmlDeviceGetUUID(device)}"'
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    readings: dict[str, tuple[str, Callable[[], float]]] = {
        "nv_gpu_utilization": ("Share of the GPU in use", lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100),
        "nv_gpu_memory_total_bytes": ("Memory of the GPU", lambda: memory.total),
        "nv_gpu_memory_used_bytes": ("Memory of the GPU in use", lambda: memory.used),
        "nv_gpu_power_usage": ("Watts", lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1e3),
        "nv_gpu_power_limit": ("Watts at most", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1e3),
        "nv_energy_consumption": ("Joules", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3),
    }
    for name, (about, read) in readings.items():
        try:
            yield Gauge(name, about, read(), label)
        except nvml.NVMLError:
            continue  # this one cannot tell
