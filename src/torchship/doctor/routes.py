"""The routes by which a module can leave Python; each is walked in a child process and its result is compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from torchship.doctor import failure, source
from torchship.doctor.catalog import tables
from torchship.doctor.diagnose import Diagnosis, Suspects, diagnose, suspected
from torchship.doctor.failure import Failure
from torchship.doctor.subject import Subject, call, worst_error
from torchship.lowering.program import quiet
from torchship.lowering.tree import follow
from torchship.optimize.places import is_installed, is_users, place_at

_TOLERANCE = 2e-3


class RouteRow(msgspec.Struct, frozen=True):
    """One route: `ok` when it exports and agrees with the module; else why, and what to do.

    `error` is the relative output error, on other data than it was exported with too.
    """

    route: str
    ok: bool
    opens: str
    summary: str = ""
    error: float | None = None
    diagnosis: Diagnosis | None = None
    seconds: float = 0.0


class RouteAnswer(msgspec.Struct, frozen=True):
    """What is found on one route; of torch.compile also how many graphs there are, and where they break."""

    row: RouteRow
    breaks: list[Diagnosis] = []
    graphs: int = 0


def walk(subject: Subject, name: str) -> RouteAnswer:
    """Take a module by one route. Whatever the route does is a finding."""
    fault: Failure | None = None
    error: float | None = None
    breaks: list[Failure] = []
    wrong, graphs = "", 0
    try:
        with quiet():
            if name == "compile":
                graphs, breaks = _graphs(subject)
            shipped = ROUTES[name](subject)
    except Exception as raised:
        fault = failure.of(raised)
    else:
        error, wrong, fault = _compared(subject, shipped)
        decided = [place for place in getattr(subject.model.module, "decided", ()) if not is_installed(place.file)]
        if name == "trace" and decided and not wrong:
            wrong = f"traces, but freezes what this example decided at {decided[0]}"
    suspects: Suspects = tuple(source.scan(subject.module)) if fault or wrong else ()
    opens = tables().routes[name]
    if fault or wrong:
        diagnosis = diagnose(fault, suspects=suspects) if fault else suspected(suspects)
        row = RouteRow(name, False, opens, wrong or (diagnosis.words if diagnosis else ""), error, diagnosis)
    else:
        summary = f"with fullgraph=True; in {graphs} graphs without" if graphs > 1 else "in 1 graph"
        row = RouteRow(name, True, opens, summary if name == "compile" else "", error)
    return RouteAnswer(row, [diagnose(found, suspects=suspects) for found in breaks], graphs)


def _compared(subject: Subject, shipped: Callable[..., Any]) -> tuple[float | None, str, Failure | None]:
    """The exported program against the module itself, on the example and on data that it has not seen.

    The error, what is wrong, and the failure behind that.
    """
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
            return worst, "", None  # the module itself refuses these inputs: its findings say so
        torch.manual_seed(0)
        try:
            error = worst_error(expected, call(shipped, tensors))
        except Exception as fault:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            return None, f"exports, but fails {where} (shapes {shapes})", failure.of(fault)
        worst = max(worst, error)
        if error == float("inf"):
            return None, f"exports, but its outputs have another shape {where}", None
        if error > _TOLERANCE:
            return worst, f"exports, but its outputs are off by {error:.2g} {where}", None
    return worst, "", None


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


def _compile(subject: Subject) -> Any:
    """The whole module in one graph."""
    whole = torch.compile(subject.model.module, fullgraph=True, backend="eager")
    call(whole, subject.tensors())
    return whole


ROUTES: dict[str, Callable[[Subject], Any]] = {
    "export": lambda subject: _export(subject, strict=False),
    "export strict": lambda subject: _export(subject, strict=True),
    "onnx": _onnx,
    "trace": _trace,
    "script": _script,
    "compile": _compile,
}


def _graphs(subject: Subject) -> tuple[int, list[Failure]]:
    """How many graphs torch.compile makes, and why they break where they do."""
    found = torch._dynamo.explain(subject.model.module)(*(tensor.clone() for tensor in subject.tensors()))
    torch._dynamo.reset()
    breaks = []
    for why in found.break_reasons:
        places = [place_at(frame.filename, frame.lineno or 0, frame.name) for frame in why.user_stack]
        users = tuple(place for place in places if is_users(place.file))
        breaks.append(Failure("", f"{str(why.reason)[:1500]}\ngraph break", users))
    return int(found.graph_count), breaks
