"""Metrics in Prometheus' text format: Triton's names where it has one, our own for what it does not tell.

Of lines and their stations, and of the machine: processor and memory from the kernel, GPUs from their driver.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import psutil

from torchship import hardware
from torchship.serve.engine.line import Line
from torchship.serve.engine.station import Station
from torchship.serve.metrics import BUCKETS_MS, LineMeter, peak

_EXACT = 64
_HISTOGRAM = "nv_inference_first_response_histogram_ms"
_Labels = tuple[tuple[str, str], ...]
_Samples = Iterator[tuple[_Labels, float]]


def _failures(line: Line) -> _Samples:
    for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER"):
        yield (("reason", reason),), line.meter.failures.get(reason, 0)


def _batches(station: Station) -> _Samples:
    """Above 64 rows sizes are told as the power of two that holds them: a label has few values."""
    counts: Counter[int] = Counter()
    for size, batch in sorted(station.meter.batches.items()):
        counts[size if size <= _EXACT else 1 << (size - 1).bit_length()] += batch.calls
    for size, calls in counts.items():
        yield (("rows", str(size)),), calls


def _seconds(station: Station) -> _Samples:
    yield (), sum(batch.running for batch in station.meter.batches.values())


def _ready(station: Station) -> _Samples:
    yield (), sum(replica.state == "ready" for replica in station.replicas)


def _spare(station: Station) -> _Samples:
    yield (), sum(replica.state == "ready" for replica in station.processes) - next(_ready(station))[1]


# Name, kind, meaning, and where a line has it: by a function, or where `_value` finds it; for what is in _us, seconds.
_OF_LINES: tuple[tuple[str, str, str, Any], ...] = (
    ("nv_inference_request_success", "counter", "Requests answered", "meter.success"),
    ("nv_inference_request_failure", "counter", "Requests without an answer, by reason", _failures),
    ("nv_inference_count", "counter", "Rows answered", "meter.rows"),
    ("nv_inference_exec_count", "counter", "Calls of the model, each with a batch", "executions"),
    ("nv_inference_pending_request_count", "gauge", "Requests on the line", "admission.jobs"),
    ("nv_inference_request_duration_us", "counter", "From arrival to answer, summed over requests", "meter.seconds"),
    ("nv_inference_queue_duration_us", "counter", "Waiting, summed over requests", "stations.meter.queued"),
    ("nv_inference_compute_input_duration_us", "counter", "Handing over, summed", "stations.meter.packing"),
    ("nv_inference_compute_infer_duration_us", "counter", "Running, summed over requests", "stations.meter.running"),
    (
        "nv_inference_compute_output_duration_us",
        "counter",
        "Collecting, summed over requests",
        "stations.meter.passing",
    ),
)
_OF_STATIONS: tuple[tuple[str, str, str, Any], ...] = (
    ("torchship_queue_rows", "gauge", "Rows that wait", "queue.rows"),
    ("torchship_stage_rows_total", "counter", "Rows run", "meter.rows"),
    ("torchship_stage_calls_total", "counter", "Calls", "meter.calls"),
    ("torchship_stage_seconds_total", "counter", "Seconds that calls took", _seconds),
    ("torchship_batches_total", "counter", "Calls by their number of rows", _batches),
    ("torchship_worker_restarts_total", "counter", "Workers replaced", "meter.restarts"),
    ("torchship_workers_ready", "gauge", "Workers that can take a batch", _ready),
    ("torchship_workers_spare", "gauge", "Workers that have opened and wait to take another's place", _spare),
    ("torchship_arena_slots", "gauge", "Slots of shared memory", "replicas.slots"),
    ("torchship_arena_slots_used", "gauge", "Slots with a batch", "replicas.in_flight"),
    ("torchship_arena_bytes", "gauge", "Shared memory reserved", "processes.shared"),
    ("torchship_workers_resident_bytes", "gauge", "Memory of the workers", "processes.size"),
)


def _value(thing: Any, path: str) -> float:
    """What a path of attributes leads to: of a list, the sum over its items; of a queue at its end, the length."""
    if isinstance(thing, list):
        return sum([_value(one, path) for one in thing])
    name, _, rest = path.partition(".")
    found = getattr(thing, name)
    return _value(found, rest) if rest else len(found) if isinstance(found, deque) else found


def render(lines: Mapping[tuple[str, str], Line], more: Iterable[Metric] = ()) -> str:
    """Everything about these lines, by model and version, and `more`."""
    text: list[str] = []
    places = [((("model", model), ("version", version)), line) for (model, version), line in lines.items()]
    stations = [((*where, ("stage", one.name)), one) for where, line in places for one in line.stations]
    for families, things in ((_OF_LINES, places), (_OF_STATIONS, stations)):
        for name, kind, about, read in families:
            text += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            for where, thing in things:
                if isinstance(read, str):
                    value = _value(thing, read)
                    text.append(_sample(name, where, round(1e6 * value) if name.endswith("_us") else value))
                else:
                    text += [_sample(name, (*where, *labels), value) for labels, value in read(thing)]
    text += [f"# HELP {_HISTOGRAM} From arrival to the answer", f"# TYPE {_HISTOGRAM} histogram"]
    for where, line in places:
        text += _histogram(where, line.meter)
    for name, found in groupby(sorted([*gauges(), *more], key=attrgetter("name")), key=attrgetter("name")):
        for place, metric in enumerate(found):
            text += [f"# HELP {name} {metric.about}", f"# TYPE {name} {metric.kind}"] * (not place)
            text.append(_sample(name, metric.labels, metric.value) if metric.labels else f"{name} {metric.value}")
    return "\n".join(text) + "\n"


def _histogram(labels: _Labels, meter: LineMeter) -> Iterable[str]:
    total = 0
    for bound, count in zip((*map(str, BUCKETS_MS), "+Inf"), meter.histogram, strict=True):
        total += count
        yield _sample(f"{_HISTOGRAM}_bucket", (*labels, ("le", bound)), total)
    yield _sample(f"{_HISTOGRAM}_sum", labels, round(meter.seconds * 1e3, 3))
    yield _sample(f"{_HISTOGRAM}_count", labels, total)


def _sample(name: str, labels: _Labels, value: float) -> str:
    escaped = [(key, text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for key, text in labels]
    inside = ",".join([f'{key}="{text}"' for key, text in escaped])
    return f"{name}{{{inside}}} {value:g}" if isinstance(value, float) else f"{name}{{{inside}}} {value}"


class Metric(NamedTuple):
    """One number under a name; those of one name share `about` and `kind`."""

    name: str
    about: str
    value: float
    labels: _Labels = ()
    kind: Literal["gauge", "counter"] = "gauge"


def gauges() -> Iterator[Metric]:
    """All that can be told here. Triton measures the processor between two looks at it; so does this."""
    memory = hardware.memory()
    yield Metric("nv_cpu_utilization", "Share of the processor in use since the last look", psutil.cpu_percent() / 100)
    yield Metric("nv_cpu_memory_total_bytes", "Memory that the server may use", memory)
    yield Metric("nv_cpu_memory_used_bytes", "Memory in use", memory - hardware.free_memory())
    if peak.most:
        yield Metric("torchship_server_memory_bytes", "Memory of all processes of this server", peak.now)
        yield Metric("torchship_server_peak_memory_bytes", "The most that it has held", peak.most)
    nvml = _driver()
    for index in range(nvml.nvmlDeviceGetCount() if nvml else 0):
        yield from _gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index))


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


def _gpu(nvml: Any, device: Any) -> Iterator[Metric]:
    label = (("gpu_uuid", nvml.nvmlDeviceGetUUID(device)),)
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
            yield Metric(name, about, read(), label)
        except nvml.NVMLError:
            continue  # this one cannot tell
