"""Every row of the doctor's catalog is found in its own case, and nothing else is proposed for it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from torch import Tensor, nn, no_grad

from torchship.doctor import edits, findings, machine, routes, source
from torchship.doctor.catalog import Row, RowTest, constructs, tables
from torchship.doctor.diagnose import Diagnosis, diagnose, suspected
from torchship.doctor.explain import explain
from torchship.doctor.failure import Failure
from torchship.doctor.subject import admit
from torchship.optimize.places import Place

_HEAD = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\n\n"
_CONSTRUCTS = list(constructs().values())


def _named(row: Row) -> str:
    return row.key or row.name


def _read(row: Row, test: RowTest, folder: Path) -> list[Diagnosis]:
    """What the doctor makes of the module in a row's case: on its route, or from the source alone."""
    name = f"case_{re.sub(r'[^a-z]', '_', row.name)}"
    text = _HEAD + test.source
    (folder / f"{name}.py").write_text(text)
    (line,) = (number for number, code in enumerate(text.splitlines(), 1) if "# FAULT" in code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = admit(f"{name}:Model", ["x:FP32[-1,8]"])
        suspects = list(source.scan(subject.module))
        found = routes.walk(subject, test.route).row.diagnosis if test.route else None
    places = [(suspect, place.line) for suspect, place in suspects]
    assert not row.source or (row.name, line) in places
    if not test.route:
        assert places == [(row.name, line)]
        frozen = suspected(suspects)
        assert row.freezes == (frozen is not None)
        return [frozen] if frozen else []
    assert found is not None
    assert found.place is not None
    assert (Path(found.place.file).stem, found.place.line) == (name, line)
    return [found]


@pytest.mark.parametrize("row", _CONSTRUCTS, ids=_named)
def test_a_construct_is_found_in_its_case(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    test = row.test
    assert test is not None
    assert test.route or test.text or row.source
    found = _read(row, test, tmp_path) if test.source else []
    if test.text:
        places = (Place("net.py", 3, "forward", test.code),) if test.code else ()
        found.append(diagnose(Failure("", test.text, places)))
    for diagnosis in found:
        assert (diagnosis.construct, diagnosis.words) == (row.name, row.why)
        assert [other.name for other in _CONSTRUCTS if other.edit in diagnosis.edit] == [row.name]


@pytest.mark.parametrize("row", tables().failure, ids=_named)
def test_a_failure_is_recognised_by_its_own_log(row: Row) -> None:
    assert row.test is not None
    first = explain(f"INFO starting\n{row.test.text}\n")[0]
    assert (first.name, first.words) == (row.name, row.why)
    assert first.line in row.test.text
    plain = [words for words in row.fix if not re.search(r"\{[\w ]+\}", words)]
    assert plain
    assert first.mend[-len(plain) :] == plain


def test_names_are_unique_and_rewrites_exist() -> None:
    for rows in (tables().construct, tables().finding, tables().failure):
        assert len({_named(row) for row in rows}) == len(rows)
    assert {row.rewrite for row in _CONSTRUCTS} == {"", *edits.REWRITES}


def test_every_finding_and_every_advice_is_asked_for() -> None:
    code = Path(findings.__file__).read_text() + Path(machine.__file__).read_text()
    wanted = [*map(_named, tables().finding), *tables().advice]
    assert [name for name in wanted if f'"{name}"' not in code] == []


def test_a_decorated_forward_is_read_where_it_is_written() -> None:
    class Decorated(nn.Module):
        @no_grad()
        def forward(self, x: Tensor) -> Tensor:
            print("called")  # FAULT
            return x

    ((name, place),) = source.scan(Decorated())
    assert name == "print or logging"
    assert (Path(place.file), place.code) == (Path(__file__), 'print("called")  # FAULT')
