"""The routes by which a module can leave Python; each is walked in a child process and its result is compared."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from torchship.doctor import failure, suspects
from torchship.doctor.failure import Failure
from torchship.doctor.subject import Subject, admit, call, worst_error
from torchship.optimize.places import Place, is_installed, is_users, place_at

_TOLERANCE = 2e-3


class Break(msgspec.Struct, frozen=True):
    """One graph break of torch.compile, with the user's lines, innermost last."""

    reason: str
    places: tuple[Place, ...] = ()


class RouteOutcome(msgspec.Struct, frozen=True):
    """How a route went. `error` is the relative output error, on other data than it was exported with too.

    `suspects` are constructs that the user's source holds, for errors that name no line.
    """

    route: str
    failure: Failure | None = None
    error: float | None = None
    wrong: str = ""
    breaks: tuple[Break, ...] = ()
    graphs: int = 0
    suspects: tuple[tuple[str, Place], ...] = ()


def walk(given: Any, *, subject: Subject | None = None) -> Any:
    """A child's work: one route of one Case, as plain data. Whatever the route does is a finding."""
    for name in ("torch", "torch.onnx", "torch._dynamo", "torch.export"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    subject = subject or admit(given)
    name = given["part"]
    outcome = _compile(subject) if name == "compile" else _walk(subject, name)
    found = tuple(suspects.scan(subject.module)) if outcome.failure or outcome.wrong else ()
    return msgspec.to_builtins(msgspec.structs.replace(outcome, suspects=found))


def refused(name: str, fault: BaseException) -> Any:
    """The outcome of a route whose subject could not be brought up, as plain data."""
    return msgspec.to_builtins(RouteOutcome(name, failure.of(fault)))


def _walk(subject: Subject, name: str) -> RouteOutcome:
    try:
        with _quiet():
            shipped = ROUTES[name](subject)
    except Exception as fault:
        return RouteOutcome(name, failure.of(fault))
    found = _compared(subject, name, shipped)
    decided = [place for place in getattr(subject.model.module, "decided", ()) if not is_installed(place.file)]
    if name == "trace" and decided and not found.wrong and found.failure is None:
        words = f"traces, but freezes what this example decided at {decided[0]}"
        return msgspec.structs.replace(found, wrong=words)
    return found


def _compared(subject: Subject, name: str, shipped: Callable[..., Any]) -> RouteOutcome:
    """The exported program against the module itself, on the example and on data that it has not seen."""
    worst = 0.0
    looks = (
        ("on its own example", subject.tensors),
        ("on other data", subject.mirrored),
        ("on other data", subject.unseen),
    )
    for where, draw in looks:
        tensors = draw()
        try:
            torch.manual_seed(0)
            expected = call(subject.model.module, tensors)
        except Exception:
            return RouteOutcome(name, error=worst)  # the module itself refuses these inputs: its findings say so
        torch.manual_seed(0)
        try:
            error = worst_error(expected, call(shipped, tensors))
        except Exception as fault:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            return RouteOutcome(name, failure.of(fault), wrong=f"exports, but fails {where} (shapes {shapes})")
        worst = max(worst, error)
        if error > _TOLERANCE:
            return RouteOutcome(name, error=worst if worst != float("inf") else None, wrong=_wrong(error, where))
    return RouteOutcome(name, error=worst)


def _wrong(error: float, where: str) -> str:
    much = "its outputs have another shape" if error == float("inf") else f"its outputs are off by {error:.2g}"
    return f"exports, but {much} {where}"


def _export(subject: Subject, *, strict: bool) -> Any:
    model = subject.model
    exported = torch.export.export(
        model.module, subject.tensors(), dynamic_shapes=model.dynamic_shapes(ceiling=64), strict=strict
    )
    return exported.module()


def _trace(subject: Subject) -> Any:
    return torch.jit.trace(subject.model.module, subject.tensors(), check_trace=False)  # type: ignore[no-untyped-call]


def _script(subject: Subject) -> Any:
    """The user's own module: TorchScript reads source code, and cannot read the flat frame around it."""
    flat: Any = subject.model.module
    scripted = torch.jit.script(flat.inner)

    def run(*tensors: torch.Tensor) -> Any:
        from torchship.lowering.tree import follow

        args, kwargs = flat.frame.fill(tensors)
        output = scripted(*args, **kwargs)
        try:
            return tuple(follow(output, path) for path in flat.paths)
        except (LookupError, TypeError, AttributeError) as fault:
            raise TypeError("TorchScript packs the outputs another way than the module does") from fault

    return run


def _onnx(subject: Subject) -> Any:
    import onnxruntime

    model = subject.model
    with tempfile.TemporaryDirectory(prefix="torchship-doctor-") as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model.module,
            subject.tensors(),
            path,
            dynamo=True,
            dynamic_shapes=model.dynamic_shapes(ceiling=64),
            verbose=False,
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(*tensors: torch.Tensor) -> Any:
        feeds = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), tensors, strict=True)}
        return tuple(torch.from_numpy(array) for array in session.run(None, feeds))

    return run


ROUTES: dict[str, Callable[[Subject], Any]] = {
    "export": lambda subject: _export(subject, strict=False),
    "export strict": lambda subject: _export(subject, strict=True),
    "onnx": _onnx,
    "trace": _trace,
    "script": _script,
}
ROUTE_NAMES = (*ROUTES, "compile")
OPENS = {
    "export": "aoti, executorch, int8 by PT2E",
    "export strict": "the same, with Python's side effects checked",
    "onnx": "onnxruntime, openvino, tensorrt",
    "trace": "torchscript",
    "script": "torchscript with control flow kept",
    "compile": "inductor in one graph",
}


def _compile(subject: Subject) -> RouteOutcome:
    """torch.compile: the whole module in one graph, and every place where the graph breaks."""
    module, tensors = subject.model.module, subject.tensors()
    try:
        with _quiet():
            found = torch._dynamo.explain(module)(*(tensor.clone() for tensor in tensors))
            breaks = tuple(Break(_reason(reason), _users(reason.user_stack)) for reason in found.break_reasons)
            graphs = int(found.graph_count)
    except Exception as fault:
        return RouteOutcome("compile", failure.of(fault))
    torch._dynamo.reset()
    try:
        with _quiet():
            whole = torch.compile(module, fullgraph=True, backend="eager")
            call(whole, tensors)
    except Exception as fault:
        return RouteOutcome("compile", failure.of(fault), breaks=breaks, graphs=graphs)
    compared = _compared(subject, "compile", whole)
    return msgspec.structs.replace(compared, breaks=breaks, graphs=graphs)


def _reason(reason: Any) -> str:
    return str(reason.reason)[:1500]


def _users(stack: Any) -> tuple[Place, ...]:
    found = [place_at(frame.filename, frame.lineno or 0, frame.name) for frame in stack]
    return tuple(place for place in found if is_users(place.file))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print progress and logs; only what they raise is of interest."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
