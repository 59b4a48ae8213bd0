"""Stands in for the library `tensorrt` 10 and 11: the calls that the backend makes, computed by ONNX Runtime.

It is as strict as the library: unknown attributes fail, shapes outside the profile are refused, tensors are read and
written at their addresses, and a plan opens with the version that wrote it. There is no card here: addresses are the
host's, and streams are numbers.
"""

from __future__ import annotations

import ctypes
import enum
import pickle
from pathlib import Path
from typing import Any

import numpy as np

__version__ = "11.4.0"
_STRONGLY_TYPED = 1
ALLOWED_FAULT = ""  # what the next build says instead of giving a plan


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32 = 7


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class _Config:
    """Builder options; strong typing leaves no flags for precisions."""

    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.limits: dict[MemoryPoolType, int] = {}
        self.builder_optimization_level = 3
        self.profiles: list[_Profile] = []

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.limits[pool] = size

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
        assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
        self.shapes[name] = (tuple(least), tuple(usual), tuple(most))


class _Layer:
    def __init__(self, name: str, kind: str) -> None:
        self.name, self.type, self.num_outputs = name, f"LayerType.{kind}", 1

    def get_output(self, place: int) -> Any:
        return type("Output", (), {"dtype": DataType.FLOAT})()


class _Network:
    def __init__(self, flags: int) -> None:
        self.strongly_typed = bool(flags & 1 << _STRONGLY_TYPED)
        self.graph = b""
        self.layers: list[_Layer] = []

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, place: int) -> _Layer:
        return self.layers[place]


class OnnxParser:
    def __init__(self, network: _Network, logger: ILogger) -> None:
        self._network, self.num_errors = network, 0

    def parse_from_file(self, path: str) -> bool:
        import onnx

        graph = onnx.load(path)
        self._network.graph = Path(path).read_bytes()
        self._network.layers = [_Layer(node.name, node.op_type.upper()) for node in graph.graph.node]
        return True

    def get_error(self, place: int) -> str:
        raise IndexError(place)


class Builder:
    last: Builder | None = None

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self.network: _Network | None = None
        self.config: _Config | None = None
        Builder.last = self

    def create_network(self, flags: int = 0) -> _Network:
        self.network = _Network(flags)
        return self.network

    def create_builder_config(self) -> _Config:
        self.config = _Config()
        return self.config

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        if ALLOWED_FAULT:
            self._logger.log(ILogger.ERROR, ALLOWED_FAULT)
            return None
        return pickle.dumps((__version__, network.graph, [profile.shapes for profile in config.profiles]))


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        version, graph, profiles = pickle.loads(plan)  # our own
        if version != __version__:
            self._logger.log(ILogger.ERROR, f"the plan is of version {version}")
            return None
        return _Engine(graph, profiles)


class _Engine:
    device_memory_size_v2 = 1024

    def __init__(self, graph: bytes, profiles: list[dict[str, Any]]) -> None:
        import onnxruntime as ort

        self.session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.profiles = profiles
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.contexts: list[_Context] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, place: int) -> str:
        return str([*self.inputs, *self.outputs][place])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> _Context:
        assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(_Context(self))
        return self.contexts[-1]


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.memory = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.memory = memory

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        least, _, most = self.engine.profiles[self.profile].get(name, (shape, shape, shape))
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in (*self.engine.inputs, *self.engine.outputs)
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        found = self._run({node.name: np.zeros(self.shapes[node.name], _dtype(node)) for node in self._nodes()})
        return tuple(found[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory
        self.streams.append(stream)
        feed = {n.name: _at(self.addresses[n.name], self.shapes[n.name], _dtype(n)) for n in self._nodes()}
        for name, answer in self._run(feed).items():
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(answer).ctypes.data, answer.nbytes)
        return True

    def _nodes(self) -> list[Any]:
        return list(self.engine.session.get_inputs())

    def _run(self, feed: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.engine.outputs, self.engine.session.run(self.engine.outputs, feed), strict=True))


def _dtype(node: Any) -> Any:
    return {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(float16)": np.float16}[node.type]


def _at(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)
