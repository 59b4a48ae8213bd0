"""Modules that export badly: the doctor names the line that is at fault, the construct, and an edit."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.optimize import doctor_patients
from torchship.doctor import edits, examination, failure, routes
from torchship.doctor.catalog import constructs
from torchship.doctor.diagnose import Diagnosis, diagnose
from torchship.doctor.examination import Examination, Seen, look
from torchship.doctor.failure import Failure, places_in
from torchship.doctor.findings import Finding
from torchship.doctor.routes import RouteAnswer
from torchship.doctor.subject import Subject, admit
from torchship.errors import BadConfig, CaptureFailed
from torchship.optimize.forkserver import Forkserver
from torchship.optimize.places import Place
from torchship.process import Outcome

_HERE = "tests.unit.optimize.doctor_patients"


def _subject(name: str) -> Subject:
    return admit(f"{_HERE}:{name}", ["x:FP32[-1,8]"])


def _answer(name: str, route: str) -> RouteAnswer:
    """One route in this process: the child's work without the child, which costs an import of torch each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = msgspec.to_builtins(routes.walk(_subject(name), route))
    return examination._answer(route, Outcome(value=value))


def _look(name: str) -> Seen:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return look(_subject(name))


def _findings(name: str) -> dict[str, Finding]:
    found = reversed(_look(name).findings)
    return {finding.name: finding for finding in found}  # the worst of one name: it comes first


def _fault_line(name: str) -> int:
    lines, first = inspect.getsourcelines(getattr(doctor_patients, name))
    return first + next(number for number, line in enumerate(lines) if "# FAULT" in line)


@pytest.mark.parametrize("route", ["export", "export strict", "onnx", "trace", "script", "compile"])
def test_a_healthy_module_goes_by_every_route(route: str) -> None:
    row = _answer("Healthy", route).row
    assert row.ok, row.summary
    assert row.error is not None
    assert row.error < 1e-4


@pytest.mark.parametrize(
    ("name", "route", "construct"),
    [
        ("DataIf", "export", "data-dependent if"),
        ("DataIf", "export strict", "data-dependent if"),
        ("DataIf", "onnx", "data-dependent if"),
        ("DataIf", "compile", "data-dependent if"),
        ("DataIf", "trace", "data-dependent if"),
        ("Item", "export", ".item()"),
        ("Item", "trace", ".item()"),
        ("Numpy", "export", "numpy inside the model"),
        ("Numpy", "trace", "numpy inside the model"),
        ("CustomFunction", "script", "custom autograd Function"),
        ("FixedBatch", "export strict", "size written into the code"),
        ("FixedBatch", "export", "size written into the code"),
        ("AssertsBatch", "export", "size written into the code"),
        ("AssertsBatch", "trace", "size written into the code"),
        ("Break", "compile", "user-inserted graph break"),
        ("Kwargs", "script", "Python that TorchScript cannot read"),
        ("Closure", "script", "Python that TorchScript cannot read"),
        ("Special", "onnx", "operator that ONNX does not have"),
        ("Halved", "trace", "loop as long as the data says"),
        ("Asserts", "export", "assertion on values"),
        ("Steps", "export", "loop over a free axis"),
        ("NoFake", "export", "custom operator without a fake"),
        ("Remembers", "trace", "side effect in Python"),
        ("Recurrent", "export", "recurrent layer over a free axis"),
    ],
)
def test_a_refusal_names_construct_and_line(name: str, route: str, construct: str) -> None:
    row = _answer(name, route).row
    assert not row.ok
    assert row.diagnosis is not None
    assert row.diagnosis.construct == construct
    place = row.diagnosis.place
    assert place is not None
    assert Path(place.file).name == "doctor_patients.py"
    assert place.line == _fault_line(name)
    assert row.diagnosis.edit


def test_a_loop_over_a_value_is_told_from_the_value() -> None:
    row = _answer("Item", "export strict").row
    assert row.diagnosis is not None
    assert row.diagnosis.construct == "loop as long as the data says"
    assert row.diagnosis.place is not None
    assert row.diagnosis.place.code == "for _ in range(count):"


def test_an_operator_without_onnx_is_named() -> None:
    row = _answer("Special", "onnx").row
    assert row.diagnosis is not None
    assert row.diagnosis.construct == "operator that ONNX does not have"
    assert "bessel_j0" in row.diagnosis.said


def test_graph_breaks_carry_the_users_lines() -> None:
    found = _answer("SideEffect", "compile")
    assert found.graphs == 2
    (broken,) = found.breaks
    assert broken.place is not None
    assert broken.place.code.startswith("print(")


@pytest.mark.parametrize(
    ("name", "finding", "level"),
    [
        ("InPlaceView", "writes into its input", "warn"),
        ("Random", "unstable output", "bad"),
        ("SideEffect", "side effect in Python", "warn"),
        ("DataIf", "data-dependent if", "warn"),
        ("Odd", "train mode", "warn"),
        ("Odd", "shared module", "warn"),
        ("Odd", "loose tensor", "warn"),
        ("Odd", "non-contiguous weights", "info"),
        ("Odd", "huge constant", "warn"),
        ("Odd", "dropout that eval() cannot switch off", "warn"),
        ("ViewOnly", "non-contiguous input", "warn"),
        ("Double", "float64 weights", "warn"),
        ("FixedBatch", "axes", "warn"),
        ("Remembers", "unstable output", "bad"),
        ("NeverEval", "train mode", "bad"),
        ("NeverEval", "module used twice", "info"),
    ],
)
def test_findings_about_the_module_itself(name: str, finding: str, level: str) -> None:
    assert _findings(name)[finding].level == level


@pytest.mark.parametrize(
    ("name", "finding"), [("InPlaceView", "writes into its input"), ("Remembers", "unstable output")]
)
def test_findings_name_the_line(name: str, finding: str) -> None:
    place = _findings(name)[finding].place
    assert place is not None
    assert place.line == _fault_line(name)


def test_a_healthy_module_has_no_findings_and_its_cost_is_exact() -> None:
    seen = _look("Healthy")
    assert seen.findings == []
    assert seen.cost is not None
    assert seen.cost.flops == 2 * (8 * 16 + 16 * 4)
    assert seen.cost.parameters == 8 * 16 + 16 + 16 * 4 + 4
    assert seen.cost.product == 100.0
    assert seen.cost.activations == 2 * 16 * 4  # the hidden layer before and after the ReLU


@pytest.mark.parametrize(
    ("name", "weights"), [("Recurrent", 4 * 4 * (8 + 4)), ("Encoder", 8 * 24 + 8 * 8 + 2 * 8 * 16)]
)
def test_fused_layers_cost_what_their_weights_say(name: str, weights: int) -> None:
    seen = _look(name)
    assert seen.cost is not None
    assert seen.cost.flops * seen.cost.rows >= 2 * 2 * weights  # two rows; attention between rows comes on top
    assert seen.cost.product == 100.0


def test_what_cannot_even_run_is_an_error_with_line_and_edit() -> None:
    with pytest.raises(CaptureFailed) as raised:
        _subject("WrongDtype")
    with pytest.raises(CaptureFailed, match=r"doctor_patients\.py:\d+") as caught:
        examination._seen(Outcome(msgspec.to_builtins(Seen(failed=failure.of(raised.value)))))
    assert "module.float()" in caught.value.hint


def test_a_crash_costs_one_row() -> None:
    routes_given = ["trace", "script"]
    found = examination.diagnose_target(f"{_HERE}:Crash", inputs=["x:FP32[-1,8]"], routes=routes_given, timeout=120)
    assert isinstance(found, Examination)
    trace, script = found.routes
    assert not trace.ok
    assert "SIGSEGV" in trace.summary
    assert "SIGSEGV" not in script.summary
    assert script.ok or script.diagnosis is not None
    assert not found.healthy


def test_a_hang_costs_one_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Forkserver, target: str, *, argument: Any, timeout: float, **_: Any) -> Outcome:
        if argument[-1] == "trace":
            return Outcome(fault=f"did not finish within {timeout:.0f} s")
        seen = (
            {"row": {"route": "onnx", "ok": True, "opens": ""}} if argument[-1] == "onnx" else {"signature": "x -> y"}
        )
        return Outcome(seen, seconds=2.0)

    monkeypatch.setattr(Forkserver, "run", run)
    steps: list[str] = []
    found = examination.diagnose_target(
        "x:y", inputs=["x:FP32[-1,8]"], routes=["trace", "onnx"], timeout=5, on_step=steps.append
    )
    trace, onnx = found.routes
    assert (trace.ok, trace.summary) == (False, "the exporter did not finish within 5 s")
    assert (onnx.ok, onnx.seconds) == (True, 2.0)
    assert found.signature == "x -> y"
    assert steps == ["module", "trace", "onnx"]


def test_a_child_that_says_nothing_is_a_row_with_its_last_words() -> None:
    lost = Outcome(fault="did not finish within 5 s", log="converting\nstill converting")
    assert examination._answer("onnx", lost).row.summary == "the exporter did not finish within 5 s (still converting)"


@pytest.mark.parametrize(
    ("inputs", "wanted", "words"),
    [(["x"], ["export"], "not a tensor"), ([], ["export"], "no inputs"), (["x:FP32[-1,8]"], ["fax"], "unknown route")],
)
def test_wrong_use_is_refused(inputs: list[str], wanted: list[str], words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        examination.diagnose_target(f"{_HERE}:Healthy", inputs=inputs, routes=wanted)


_BRANCHES = """
def forward(x, y):
    if x.sum() > 0:
        y = x * 2
    if y.mean().item() > 1:
        z = y
    else:
        z = x
    if len(x) > 3:
        return x
    scale = float(z.max().item())
    print(scale)
    z = z.view(2, 8)
    z.mul_(3)
    z = (z if z.any() else x) + 1
    if z.any() and x.any():
        z = x
    if z.any():
        z, x = x, z
    return z
"""


@pytest.mark.parametrize(
    ("line", "construct", "new"),
    [
        (3, "data-dependent if", "y = torch.where(x.sum() > 0, x * 2, y)"),
        (5, "data-dependent if", "z = torch.where(y.mean() > 1, y, x)"),
        (9, "data-dependent if", ""),
        (11, ".item()", "scale = z.max()"),
        (13, "size written into the code", "z = z.view(-1, 8)"),
        (14, "in-place write on a view", "z = z.mul(3)"),
        (15, "data-dependent if", "z = torch.where(z.any(), z, x) + 1"),
        (16, "data-dependent if", ""),
        (18, "data-dependent if", ""),
        (99, ".item()", ""),
    ],
)
def test_edits_rewrite_one_statement(tmp_path: Path, line: int, construct: str, new: str) -> None:
    path = tmp_path / "user.py"
    path.write_text(_BRANCHES)
    assert edits.propose(str(path), line, rewrite=constructs()[construct].rewrite)[1] == new


def test_what_should_go_has_no_new_source(tmp_path: Path) -> None:
    path = tmp_path / "user.py"
    path.write_text(_BRANCHES)
    assert edits.propose(str(path), 12, rewrite=constructs()["print or logging"].rewrite) == ("print(scale)", "")


def test_places_are_found_in_every_spelling() -> None:
    text = f'File "{__file__}", line 3, in forward\n  x\nCaused by: ({__file__}:7 in forward)\n'
    assert [(place.line, place.function) for place in places_in(text)] == [(3, "forward"), (7, "forward")]


def test_an_unknown_error_says_so_and_keeps_its_words() -> None:
    found = diagnose(Failure("ValueError", "ValueError: the moon is full", (Place(__file__, 1, "forward", "x"),)))
    assert isinstance(found, Diagnosis)
    assert found.construct == "unknown"
    assert "the moon is full" in found.said


def test_a_line_in_an_installed_package_is_not_the_users_to_edit() -> None:
    import torchvision

    place = Place(str(Path(torchvision.__file__)), 1, "forward", "if x.sum() > 0:")
    found = diagnose(Failure("Unsupported", "Unsupported: Data-dependent branching", (place,)))
    assert "installed package" in found.edit


@pytest.mark.parametrize(
    "said",
    [
        "RuntimeError: Expected all tensors to be on the same device, but got mask is on cpu",
        "RuntimeError: Unhandled FakeTensor Device Propagation for aten.add.Tensor, found two different devices",
    ],
)
def test_a_tensor_left_on_the_processor_is_named(said: str) -> None:
    found = diagnose(Failure("RuntimeError", said, (Place("net.py", 3, "", "return x + torch.full((4, 4), 1.0)"),)))
    assert (found.construct, found.place.line if found.place else 0) == ("tensor on another device", 3)
    assert "device=x.device" in found.edit
