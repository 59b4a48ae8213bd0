"""The plan finds the right tensor for every input, and names the place of every fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchship.errors import BadConfig, NotFound, TorchshipError
from torchship.pipeline import PipelineConfig, Plan, StageConfig, plan
from torchship.pipeline.config import convert, read
from torchship.pipeline.opening import describe_apart

BODIES = "tests.unit.pipeline.bodies"


def made(*stages: dict[str, Any], **more: Any) -> Plan:
    """A plan of stages whose `run` lies in the bodies."""
    return plan(config(*stages, **more), where="$.model[0]")


def config(*stages: dict[str, Any], **more: Any) -> PipelineConfig:
    """A pipeline of stages whose `run` lies in the bodies."""
    full = [{**stage, **({"run": f"{BODIES}:{stage['run']}"} if "run" in stage else {})} for stage in stages]
    return PipelineConfig("p", tuple(StageConfig(**stage) for stage in full), **more)


PARSE, DOUBLE, SCORE = {"run": "parse"}, {"run": "double"}, {"run": "score"}


def test_tensors_reach_the_stages_that_name_them() -> None:
    found = made(PARSE, DOUBLE, SCORE)
    assert [node.name for node in found.nodes] == ["parse", "double", "score"]
    assert found.nodes[1].takes == ("parse.numbers",)  # the only output before that fits
    assert found.nodes[2].takes == ("double.y", "parse.size")  # carried past the row stage
    assert found.nodes[2].after == (0, 1)
    assert found.nodes[1].keeps == ("double.y", "parse.size")
    assert str(found.signature) == "text:BYTES[1] -> score:FP32[1], rows:INT64[1]"
    assert not found.signature.batched
    assert found.max_batch == 1


def test_a_pipeline_of_row_stages_is_a_row_stage() -> None:
    found = made(DOUBLE, {"run": "add_up"})
    assert found.signature.batched
    assert found.max_batch == 2
    assert str(found.signature) == "x:FP32[-1,2] -> total:FP32[-1]"


def test_a_stage_can_take_the_output_of_any_earlier_one() -> None:
    found = made(PARSE, DOUBLE, {"run": "add_up", "inputs": {"x": "parse.numbers"}}, outputs=("y", "total"))
    assert found.nodes[2].takes == ("parse.numbers",)
    assert found.nodes[2].after == (0,)  # so it may run beside `double`
    assert found.outputs == ("double.y", "add_up.total")


def test_names_of_one_stage_used_twice_are_told_apart() -> None:
    found = made(PARSE, DOUBLE, {"run": "double", "inputs": {"x": "y"}, "outputs": {"y": "z"}}, outputs=("y", "z"))
    assert [node.name for node in found.nodes] == ["parse", "double", "double_2"]
    assert found.outputs == ("double.y", "double_2.y")


def test_parameters_are_merged_with_the_pipelines_defaults() -> None:
    found = made(PARSE, DOUBLE, {"run": "score", "parameters": {"weight": 2}}, parameters={"top": 1})
    assert {p.name: p.default for p in found.parameters} == {"weight": 2.0, "top": 1}
    assert found.nodes[2].defaults == {"weight": 2.0, "top": 1}


def test_request_inputs_can_be_declared() -> None:
    found = made({"run": "add_up"}, inputs=("x:FP32[-1,2]", "user:BYTES[1]"), outputs=("total", "user"))
    assert found.outputs == ("add_up.total", "request.user")


@pytest.mark.parametrize(
    ("stages", "more", "words"),
    [
        ((), {}, "$.model[0].stages: a pipeline needs"),
        (({},), {}, "$.model[0].stages[0]: the stage says nothing to run"),
        (({"run": "parse", "artifact": "x"},), {}, "$.model[0].stages[0]: the stage has run and artifact"),
        (({"run": "nope"},), {}, "$.model[0].stages[0]: 'tests.unit.pipeline.bodies:nope'"),
        (({"run": "undeclared"},), {}, "declares no signature"),
        ((PARSE, {"run": "double", "inputs": {"x": "size"}}), {}, "inputs: x:FP32[-1,2] cannot take parse.size"),
        ((PARSE, {"run": "double", "inputs": {"x": "nope"}}), {}, "stages[1].inputs.x: no earlier stage gives 'nope'"),
        ((PARSE, {"run": "double", "inputs": {"q": "size"}}), {}, "stages[1].inputs: the stage has no input ['q']"),
        ((DOUBLE, SCORE), {}, "stages[1].inputs: nothing alike is named 'size'"),
        ((PARSE, DOUBLE, {"run": "needs_rows"}), {}, "stages[2].inputs: double.y may have no rows"),
        ((PARSE, {"run": "double", "outputs": {"q": "z"}}), {}, "stages[1].outputs: the stage has no output ['q']"),
        ((PARSE, {"run": "double", "parameters": {"q": 1}}), {}, "stages[1].parameters: the stage has no parameter"),
        ((PARSE, {"run": "score", "parameters": {"weight": 11}, "inputs": {"y": "numbers"}}), {}, "0.0 to 10.0"),
        ((PARSE, {"run": "double", "options": {"q": 1}}), {}, "takes no options"),
        ((PARSE, {"run": "Name", "options": {"q": 1}}), {}, "stages[1]: options: Name has no option ['q']"),
        ((PARSE, {"run": "Name", "options": {"prefix": 1}}), {}, "stages[1]: options.prefix of Name: expected `str`"),
        (({"run": "parse", "copies": 0},), {}, "$.model[0].stages[0]: copies is 0"),
        (({"run": "parse", "max_batch": -1},), {}, "$.model[0].stages[0]: max_batch is -1"),
        (({"run": "parse", "device": "cuda"},), {}, "$.model[0].stages[0]: device: means nothing"),
        ((PARSE, {"run": "double", "name": "parse"}), {}, "stages[1].name: 'parse' is taken"),
        ((PARSE, {"run": "one_by_one"}, {"run": "add_up", "inputs": {"x": "numbers"}}), {}, "only the last stage"),
        ((PARSE,), {"outputs": ("nope",)}, "$.model[0].outputs[0]: no stage gives 'nope'"),
        ((PARSE,), {"parameters": {"nope": 1}}, "$.model[0].parameters: no stage has ['nope']"),
        ((PARSE,), {"inputs": ("text",)}, "$.model[0].inputs: 'text' is not a tensor"),
    ],
)  # fmt: skip
def test_faults_name_their_place(stages: tuple[dict[str, Any], ...], more: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig) as caught:
        made(*stages, **more)
    assert words in str(caught.value)


def test_a_missing_artifact_names_its_place(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"\$\.stages\[0\]: no artifact at"):
        plan(config({"artifact": str(tmp_path / "nope")}))


def test_describing_in_a_child_gives_the_same_plan() -> None:
    here = made(SCORE)
    apart = plan(config(SCORE), where="$.model[0]", describing=describe_apart)
    assert apart == here
    with pytest.raises(BadConfig, match=r"\$\.stages\[0\].*declares no signature"):
        plan(config({"run": "undeclared"}), describing=describe_apart)


def test_toml_is_read_with_paths_in_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "clever.toml"
    path.write_text(f'stages = [{{run = "{BODIES}:parse"}}, {{run = "{BODIES}:double"}}]\n')
    assert read(path).name == "clever"
    path.write_text(f'[[model]]\nname = "m"\nmax_wait = 3\nstages = [{{run = "{BODIES}:parse"}}]\n')
    assert read(path).name == "m"
    path.write_text('[[model]]\nname = "m"\nstages = [{runn = "x"}]\n')
    with pytest.raises(BadConfig, match=r"^\$\.model\[0\]\.stages\[0\]: .*runn"):
        read(path)
    for text in ("x = ", "[http]\nport = 1\n"):
        path.write_text(text)
        with pytest.raises(BadConfig, match=r"clever\.toml"):
            read(path)
    with pytest.raises(NotFound):
        read(tmp_path / "nope.toml")


def test_wrong_types_name_their_place() -> None:
    with pytest.raises(TorchshipError, match=r"^\$\.model\[2\]\.stages\[0\]\.copies: "):
        convert({"name": "x", "stages": [{"run": "a:b", "copies": "two"}]}, where="$.model[2]")


BIASED, NEEDS = {"run": "biased"}, {"run": "needs_bias"}


def test_an_input_is_optional_where_all_that_take_it_say_so() -> None:
    assert str(made(BIASED).signature) == "x:FP32[-1,2], bias?:FP32[-1,2] -> y:FP32[-1,2]"
    assert str(made(BIASED, NEEDS).signature) == "x:FP32[-1,2], bias:FP32[-1,2] -> z:FP32[-1,2]"
    again = made(BIASED, {"run": "biased", "inputs": {"x": "y"}, "outputs": {"y": "z"}})
    assert again.signature.inputs[1].optional
    assert again.nodes[1].takes == ("biased.y", "request.bias")
    declared = ("x:FP32[-1,2]", "bias:FP32[-1,2]")
    assert not made(BIASED, inputs=declared).signature.inputs[1].optional  # who declares it needed means it


def test_an_optional_input_is_fed_by_name_or_never() -> None:
    alone = made(BIASED, inputs=("x:FP32[-1,2]",))
    assert str(alone.signature) == "x:FP32[-1,2] -> y:FP32[-1,2]"
    assert str(alone.nodes[0].signature) == "x:FP32[-1,2] -> y:FP32[-1,2]"
    later = made(DOUBLE, {"run": "biased", "inputs": {"x": "x", "bias": "double.y"}, "outputs": {"y": "z"}})
    assert later.nodes[1].takes == ("request.x", "double.y")
    assert str(later.signature) == "x:FP32[-1,2] -> z:FP32[-1,2]"


@pytest.mark.parametrize(
    ("stages", "more", "words"),
    [
        ((BIASED, NEEDS), {"inputs": ("x:FP32[-1,2]", "bias?:FP32[-1,2]")}, "but stage 'needs_bias' needs it"),
        ((DOUBLE,), {"inputs": ("x?:FP32[-1,2]",)}, "but stage 'double' needs it"),
        ((BIASED,), {"outputs": ("y", "bias")}, "'bias' is an optional input, which may not be there"),
    ],
)
def test_what_may_not_be_there_is_refused_where_it_is_needed(
    stages: tuple[dict[str, Any], ...], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadConfig, match=words):
        made(*stages, **more)


def test_a_remote_stage_may_declare_optional_inputs() -> None:
    remote = {"remote": "grpc://127.0.0.1:1/m", "signature": "x?:FP32[1], text?:BYTES[1] -> y:FP32[1]"}
    assert str(made(remote).signature) == remote["signature"]
    with pytest.raises(BadConfig, match="every input is optional"):
        made(remote | {"signature": "x?:FP32[-1] -> y:FP32[-1]"})
