"""Composed runs the plan: carried tensors, chunks, no rows, parameters, faults that name their stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.pipeline.test_plan import DOUBLE, PARSE, SCORE, made
from torchship.errors import BadConfig, BadInput, StageFailed
from torchship.pipeline import Composed, PipelineConfig, StageConfig, plan
from torchship.pipeline.opening import open_stage
from torchship.stage import Stage


def text(content: str) -> dict[str, Any]:
    """A request."""
    return {"text": np.array([content.encode()], object)}


def test_one_job_from_end_to_end() -> None:
    composed = Composed(made(PARSE, DOUBLE, SCORE))
    answer = composed(text("1,2,3,4,5"))  # five rows through a stage that takes two
    assert answer["rows"].tolist() == [5]
    assert answer["score"].tolist() == [2 * (1 + 1 + 2 + 4 + 3 + 9) + 9]
    assert composed(text("1,2,3,4,5"), {"weight": 0, "top": 1})["score"].tolist() == [4]
    composed.close()
    composed.close()


def test_no_rows_pass_by_the_model() -> None:
    answer = Composed(made(PARSE, DOUBLE, SCORE))(text(",,"))
    assert answer["rows"].tolist() == [0]
    assert answer["score"].tolist() == [2]


def test_a_classes_options_and_bytes() -> None:
    composed = Composed(made(PARSE, DOUBLE, {"run": "Name", "options": {"prefix": "is "}}))
    assert composed(text("1,.5"))["name"].tolist() == [b"is a", b"is a"]
    assert composed(text("3"))["name"].tolist() == [b"is b"]


def test_streams_answer_after_answer() -> None:
    composed = Composed(made(PARSE, DOUBLE, {"run": "one_by_one"}))
    answers = list(composed.stream(text("1,2,3,4"), {"most": 2}))
    assert [answer["turn"].tolist() for answer in answers] == [[0], [1]]
    assert len(list(Composed(made(PARSE, DOUBLE)).stream(text("1")))) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("loses_rows", "stage 'loses_rows': output 'y' has shape [1, 2] for 2 rows"),
        ("wrong_dtype", "stage 'wrong_dtype': gave 'y' as FP64[2, 2]"),
        ("raises", "stage 'raises' raised ZeroDivisionError: the user's own mistake"),
    ],
)
def test_faults_name_their_stage(body: str, words: str) -> None:
    composed = Composed(made(PARSE, {"run": body}))
    with pytest.raises(StageFailed) as caught:
        composed(text("1,2"))
    assert words in str(caught.value)


def test_a_parameter_out_of_bounds_is_bad_input() -> None:
    with pytest.raises(BadInput, match="'weight' is 11"):
        Composed(made(PARSE, DOUBLE, SCORE))(text("1"), {"weight": 11})


def test_what_was_opened_is_closed_when_a_later_stage_fails_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def opening(config: StageConfig, store: object) -> Stage:
        if config.run.endswith("score"):
            raise StageFailed("no")
        stage = open_stage(config)
        stage.close = lambda: closed.append(config.run)  # type: ignore[method-assign]
        return stage

    monkeypatch.setattr("torchship.pipeline.composed.open_stage", opening)
    with pytest.raises(StageFailed):
        Composed(made(PARSE, DOUBLE, SCORE))
    assert [run.split(":")[1] for run in closed] == ["double", "parse"]


def test_branches_run_at_the_same_time_and_meet_again() -> None:
    branch = {"inputs": {"x": "parse.numbers"}}
    found = made(PARSE, {"run": "left", **branch}, {"run": "right", **branch}, {"run": "both"})
    assert found.nodes[3].after == (1, 2)
    composed = Composed(found)
    for _ in range(3):
        assert composed(text("2,3"))["both"].tolist() == [[3, 15], [8, 80]]
    composed.close()


def test_a_fault_in_a_branch_names_its_stage_and_leaves_all_well() -> None:
    branch = {"inputs": {"x": "parse.numbers"}}
    composed = Composed(made(PARSE, DOUBLE, {"run": "raises", **branch, "outputs": {"y": "z"}}, outputs=("y", "z")))
    for _ in range(2):
        with pytest.raises(StageFailed, match="stage 'raises' raised ZeroDivisionError"):
            composed(text("1,2,3"))
    composed.close()


def test_a_class_that_cannot_be_made_and_a_module_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_stage.py").write_text("1 / 0\n")
    (tmp_path / "fussy_stage.py").write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nfrom torchship import stage\n"
        "if TYPE_CHECKING:\n    from numpy.typing import NDArray\n"
        "@stage('x:FP32[1] -> y:FP32[1]')\nclass Fussy:\n    def __init__(self): raise OSError('no such camera')\n"
        "    def __call__(self, x: NDArray): return x\n"
        "@stage('x:FP32[1] -> y:FP32[1]')\nclass Silent: pass\n"
        "@stage('x:FP32[1] -> y:FP32[1]')\ndef hidden(x: NDArray, *, n: NDArray = 1): return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadConfig, match=r"'broken_stage:x' cannot be imported: ZeroDivisionError"):
        plan(PipelineConfig("p", (StageConfig(run="broken_stage:x"),)))
    found = plan(PipelineConfig("p", (StageConfig(run="fussy_stage:Fussy"),)))
    with pytest.raises(StageFailed, match="fussy_stage:Fussy cannot be made: OSError: no such camera"):
        Composed(found)
    with pytest.raises(BadConfig, match="parameter 'n': its annotation 'NDArray' cannot be read"):
        plan(PipelineConfig("p", (StageConfig(run="fussy_stage:hidden"),)))
    with pytest.raises(BadConfig, match="Silent has no __call__"):
        plan(PipelineConfig("p", (StageConfig(run="fussy_stage:Silent"),)))
