"""The Service: all that a protocol sees of the server. `submit` is synchronous, so that a request costs no Task."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeAlias

import torchship
from torchship.errors import BadInput, StageFailed, TorchshipError, Unsupported
from torchship.serve import describe, prometheus
from torchship.serve.catalog import Catalog
from torchship.serve.engine.line import Line
from torchship.serve.engine.queue import Job
from torchship.serve.tracing import Traces
from torchship.stage import Value
from torchship.tensors import Tensors, TensorSpec
from torchship.wire.messages import Request, Response, WantedOutput

_log = logging.getLogger("torchship.serve")
Answer: TypeAlias = Callable[[Any, Request, Response | Exception], None]
_LAST = 1 << 31  # the priority of what nobody waits for
_EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "generate",
    "logging",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "sequence",
    "statistics",
    "system_shared_memory",
    "trace",
]


class Service:
    """Models by name, behind requests and responses."""

    def __init__(
        self, catalog: Catalog, *, name: str = "triton", control: bool = False, traces: Traces | None = None
    ) -> None:
        """`name` is what callers are told; `control`: they may load and unload models."""
        self._name = name
        self._traces = traces
        self.catalog = catalog
        self.draining = False
        self.measured: list[Callable[[], Iterable[prometheus.Metric]]] = []  # beside the lines: of mounts
        self._control = control
        self._loop = asyncio.get_running_loop()

    @property
    def ready(self) -> bool:
        """Whether every model that should be served answers."""
        entries = self.catalog.entries.values()
        return not self.draining and all(entry.current is not None and entry.current.ready for entry in entries)

    def submit(self, request: Request) -> asyncio.Future[Response]:
        """Begin one inference. It may raise at once: NotFound, BadInput, Busy, Unavailable, Unsupported."""
        future: asyncio.Future[Response] = self._loop.create_future()
        self.start(request, _settle, future).gone = future.cancelled
        return future

    def start(self, request: Request, answer: Answer, whom: Any) -> Job:
        """The same without a future: `answer(whom, request, response or error)` is called once, perhaps at once."""
        line, version = self.catalog.line(request.model, request.version)
        if line.streams:
            raise Unsupported(f"model {request.model!r} streams its answers", hint="call it by a streaming protocol")
        if request.outputs:
            _check_outputs(line, request)
        values = line.validator.values(request.parameters) if request.parameters else {}
        context = (answer, whom, request, version, self._traces)
        job = Job(request.inputs, _reply, values, time.monotonic(), request.priority or line.limits.priority, context)
        if self._traces is not None and self._traces.wanted(request):
            job.spans = []
        line.start(job, request.deadline)
        if not request.version and (shadow := self.catalog.entries[request.model].shadow) is not None:
            with suppress(TorchshipError):  # nobody waits for its answer, and its faults are only counted
                copy = Job(request.inputs, lambda job: None, dict(values), time.monotonic(), _LAST)
                shadow.start(copy, request.deadline)
        return job

    async def stream(self, request: Request) -> AsyncGenerator[Response, None]:
        """All answers of a model that streams, or the one answer of one that does not."""
        line, version = self.catalog.line(request.model, request.version)
        if not line.streams:
            yield await self.submit(request)
            return
        _check_outputs(line, request)
        answers = line.stream(
            request.inputs, parameters=request.parameters, deadline=request.deadline, priority=request.priority
        )
        async with aclosing(answers):
            async for tensors in answers:
                outputs = _wanted(tensors, request) if request.outputs else tensors
                yield Response(request.model, version, outputs, request.id)

    async def infer(
        self, model: str, inputs: Tensors, *, parameters: Mapping[str, Value] = {}, outputs: Sequence[str] = ()
    ) -> Tensors:
        """One inference for code in this process: the `outputs` that are named, else all. Raises what submit raises."""
        request = Request(model, inputs, parameters=dict(parameters), outputs=tuple(map(WantedOutput, outputs)))
        return (await self.submit(request)).outputs

    def inputs(self, name: str, version: str = "") -> tuple[TensorSpec, ...]:
        """What a model takes. Raises NotFound, Unavailable."""
        return self.catalog.line(name, version)[0].plan.signature.inputs

    def streams(self, name: str, version: str = "") -> bool:
        """Whether a model gives any number of answers to a request. Raises NotFound, Unavailable."""
        return self.catalog.line(name, version)[0].streams

    def server_metadata(self) -> dict[str, Any]:
        """`name`, `version`, `extensions`."""
        return {"name": self._name, "version": torchship.__version__, "extensions": _EXTENSIONS}

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether this model answers now. Raises NotFound."""
        entry = self.catalog.entry(name)
        if not version:
            return not self.draining and entry.current is not None and entry.current.ready
        found = entry.versions.get(version)
        return not self.draining and found is not None and found.line is not None and found.line.ready

    def model_metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """`name`, `versions`, `platform`, `inputs`, `outputs` and, beyond the protocol, `parameters`."""
        line, _ = self.catalog.line(name, version)
        versions = [found.name for found in self.catalog.entry(name).versions.values() if found.line is not None]
        return describe.metadata(line.plan, name=name, versions=versions)

    def model_config(self, name: str, version: str = "") -> dict[str, Any]:
        """Triton's model configuration, as far as it has a meaning here."""
        line, _ = self.catalog.line(name, version)
        return describe.configuration(line, name=name)

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """`model_stats` as in Triton's statistics extension, of one model or of all."""
        if name:
            self.catalog.line(name, version)
        return {
            "model_stats": [
                describe.statistics(line, name=model, version=found)
                for (model, found), line in self.catalog.lines().items()
                if name in ("", model) and version in ("", found)
            ]
        }

    def metrics(self) -> str:
        """Everything measured, in Prometheus' text format."""
        return prometheus.render(self.catalog.lines(), [metric for read in self.measured for metric in read()])

    def repository_index(self, *, ready: object = False) -> list[dict[str, Any]]:
        """`name`, `version`, `state` and `reason` of every known model version. Raises BadInput for an odd `ready`."""
        if type(ready) is not bool:
            raise BadInput(f"ready is {ready!r:.60}, expected true or false")
        return [
            {"name": name, "version": version.name, "state": version.state, "reason": version.reason}
            for name, entry in self.catalog.entries.items()
            for version in entry.versions.values()
            if not ready or version.state == "READY"
        ]

    async def repository_load(self, name: str, parameters: Any) -> None:
        """Open (or reload) a model and wait for it; the parameter `config` changes how it runs until the next load.

        Raises Unsupported where model control is off, BadInput, and what the model raises that does not open.
        """
        self._check_control(parameters)
        try:
            config = self.catalog.entry(name).given
            describe.check_parameters(parameters)
            if "config" in parameters:
                current = self.catalog.entry(name).current
                told = describe.configuration(current, name=name) if current else {}  # what callers see now
                config = describe.overridden(config, parameters["config"], told=told)
            await self.catalog.load(config)
        except TorchshipError as fault:
            fault.args = (f"failed to load '{name}': {fault}",)  # the words that Triton's clients look for
            raise

    async def repository_unload(self, name: str, parameters: Any) -> None:
        """Drain and close a model. Raises Unsupported where model control is off, BadInput."""
        self._check_control(parameters)
        await self.catalog.unload(name)

    def _check_control(self, parameters: Any) -> None:
        if not isinstance(parameters, Mapping):
            raise BadInput("parameters is not an object")
        if not self._control:
            raise Unsupported("model control is off", hint="set repository = true in [control]")


def _reply(job: Job) -> None:
    """Tell the caller how a job has ended."""
    answer, whom, request, version, traces = job.context
    job.context = None  # it knows the caller, who may know the job
    trace = ""
    if job.spans is not None:
        try:
            trace = traces.record(job, request, version)
        except Exception:  # whatever is wrong with that, its caller gets the answer
            _log.exception("request %s cannot be traced", request.id or "-")
    if job.fault is not None:
        if isinstance(job.fault, StageFailed):
            facts = {"model": request.model, "version": version, "request": request.id}
            _log.warning("model %s: request %s: %s", request.model, request.id or "-", job.fault, extra=facts)
        answer(whom, request, job.fault)
        return
    outputs = _wanted(job.tensors, request) if request.outputs else job.tensors
    answer(whom, request, Response(request.model, version, outputs, request.id, {}, trace))


def _settle(future: asyncio.Future[Response], request: Request, end: Response | Exception) -> None:
    """Put the end of a job into the caller's future."""
    if future.done():
        return
    if isinstance(end, Response):
        future.set_result(end)
    else:
        future.set_exception(end)


def _check_outputs(line: Line, request: Request) -> None:
    known = [spec.name for spec in line.plan.signature.outputs]
    for wanted in request.outputs:
        if wanted.name not in known:
            raise BadInput(
                f"unexpected inference output '{wanted.name}' for model '{request.model}'",
                hint=f"its outputs are {', '.join(known)}",
            )
        if wanted.classification:
            wanted.labels = line.plan.labels


def _wanted(tensors: Mapping[str, Any], request: Request) -> Mapping[str, Any]:
    return {wanted.name: tensors[wanted.name] for wanted in request.outputs}
