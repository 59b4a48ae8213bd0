"""int8 of ONNX files: exclusion by path, bias correction; and the ranking of layers by noise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.contracts.test_backends import error, expected, picture, sentence, tensors_of
from torchship.backends import eager, executorch, onnxruntime, openvino
from torchship.errors import BadConfig
from torchship.lowering import onnx_graph, onnx_int8, paths
from torchship.model import Model
from torchship.optimize.capture import capture
from torchship.optimize.sensitivity import noise_db, round_signed, round_unsigned, sensitivity
from torchship.recipe import Options
from torchship.tensors import TensorSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


def quantized_ops(path: Path) -> list[str]:
    """Kinds of the nodes that read a dequantized weight."""
    graph = onnx.load(str(path)).graph
    made = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    return sorted(
        n.op_type for n in graph.node if len(n.input) > 1 and n.input[1] in made and "Linear" not in n.op_type
    )


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, ["Add", "Conv", "Conv", "Gemm"]),
        ({"exclude": ["head"]}, ["Add", "Conv", "Conv"]),
        ({"modules": {"b*": "fp32"}, "ops": "heavy"}, ["Conv", "Gemm"]),
        ({"modules": {"*": "fp32", "h*": "int8"}}, ["Gemm"]),
        ({"exclude": ["*"]}, []),
        ({"modules": {"*": "fp32", "stem": "int8"}, "ops": "heavy"}, ["Conv"]),  # its norm is folded into it
    ],
)
def test_modules_are_left_out_by_their_paths(options: Options, left: list[str], tmp_path: Path) -> None:
    onnxruntime.build(picture(), options={"precision": "int8", **options}, out=tmp_path)
    assert quantized_ops(tmp_path / "model.onnx") == left


def test_answers_that_no_int8_node_reads_stay_exact(tmp_path: Path) -> None:
    onnxruntime.build(picture(), options={"precision": "int8"}, out=tmp_path)
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert [node.op_type for node in graph.node if node.output[0] == "logits"] == ["Gemm"]


class Causal(nn.Module):
    """Attention in which no position may look ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.full((5, 5), float("-inf")).triu(1)
        found: torch.Tensor = (self.q(x) @ self.k(x).transpose(1, 2) / 8**0.5 + mask).softmax(-1) @ self.v(x)
        return found


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_masks_of_attention_stay_in_float(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = capture(Causal(), [TensorSpec.parse("x:FP32[-1,5,8]")], calibration=[torch.randn(8, 5, 8)])
    options: Options = {"precision": "int8", "range": method}
    onnxruntime.build(model, options=options, out=tmp_path)
    stage = onnxruntime.open(tmp_path, signature=model.signature, options=options, threads=1)
    x = np.random.default_rng(1).standard_normal((2, 5, 8), np.float32)
    ahead = np.concatenate([x[:, :3], -x[:, 3:]], axis=1)
    found, other = stage({"x": x})["output"], stage({"x": ahead})["output"]
    assert np.array_equal(found[:, :3], other[:, :3])
    assert error({"output": found}, expected(model, {"x": x})) < 0.15
    assert "MatMul" in quantized_ops(tmp_path / "model.onnx")


class Pooled(nn.Module):
    """Linear layers around a mean over the rows of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.first(x)).mean(1))
        return out


def test_openvino_scales_behind_a_mean_along_the_right_axis(tmp_path: Path) -> None:
    rows = [np.random.default_rng(i).normal(size=(8, 7, 12)).astype(np.float32) for i in range(8)]
    model = capture(Pooled().eval(), torch.randn(2, 7, 12), calibration=rows)
    options: Options = {"precision": "int8", "transformer": True}
    openvino.build(model, options=options, out=tmp_path)
    stage = openvino.open(tmp_path, signature=model.signature, options=options, threads=1)
    given = {model.signature.inputs[0].name: rows[0]}
    assert error(stage(given), expected(model, given)) < 0.05


def test_openvino_spends_no_levels_on_values_that_a_leaky_activation_does_not_have(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.LeakyReLU(0.1), nn.Conv2d(16, 16, 3), nn.LeakyReLU(0.1), nn.Conv2d(16, 8, 1)]
    rows = [np.random.default_rng(at).normal(size=(4, 3, 24, 24)).astype(np.float32) for at in range(8)]
    model = capture(nn.Sequential(*layers).eval(), torch.randn(2, 3, 24, 24), calibration=rows)
    given, errors = {model.signature.inputs[0].name: rows[0]}, []
    for name, chosen in {"by itself": {}, "symmetric": {"preset": "performance"}}.items():
        options: Options = {"precision": "int8", **chosen}
        (folder := tmp_path / name).mkdir()
        openvino.build(model, options=options, out=folder)
        stage = openvino.open(folder, signature=model.signature, options=options, threads=1)
        errors.append(error(stage(given), expected(model, given)))
    assert errors[0] < 0.9 * errors[1]


def test_executorch_plans_for_more_than_fifteen_rows(tmp_path: Path) -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model = capture(body.eval(), torch.randn(2, 3, 8, 8))
    executorch.build(model, options={}, out=tmp_path)
    stage = executorch.open(tmp_path, signature=model.signature, options={}, threads=1)
    given = {model.signature.inputs[0].name: np.ones((stage.max_batch, 3, 8, 8), np.float32)}
    assert stage.max_batch > 15
    assert error(stage(given), expected(model, given)) < 1e-4


def test_openvino_leaves_out_the_same_modules(tmp_path: Path) -> None:
    model, given = picture(), tensors_of("picture", 3)
    errors = []
    for index, exclude in enumerate([[], ["head", "stem"], ["*"]]):
        folder = tmp_path / str(index)
        folder.mkdir()
        options: Options = {"precision": "int8", "exclude": list(exclude)}
        openvino.build(model, options=options, out=folder)
        stage = openvino.open(folder, signature=model.signature, options=options, threads=1)
        errors.append(error(stage(given), expected(model, given)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_of_a_tables_patterns_the_longest_that_fits_decides() -> None:
    table: Options = {"modules": {"*": "fp32", "backbone.*": "int8", "backbone.stem": "fp32"}, "exclude": ["*.last"]}
    backbone = nn.ModuleDict({"mid": nn.Identity(), "stem": nn.Sequential(nn.Identity()), "last": nn.Identity()})
    parts = nn.ModuleDict({"head": nn.Identity(), "backbone": backbone})
    rules = paths.rules(table, narrow=("int8",), module=parts)
    spared = [p for p in ("head", "inner.backbone.mid", "backbone.stem.conv", "backbone.last") if rules.spares(p)]
    assert spared == ["head", "backbone.stem.conv", "backbone.last"]
    with pytest.raises(BadConfig, match="'head' is 'int4'"):
        paths.rules({"modules": {"head": "int4"}}, narrow=("int8",), module=parts)


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        (onnxruntime, {"precision": "int8", "exclude": ["haed"]}),
        (onnxruntime, {"precision": "dynamic_int8", "exclude": ["haed"]}),
        (onnxruntime, {"precision": "fp16", "keep": ["haed"]}),
        (openvino, {"precision": "int8", "modules": {"haed": "fp32"}}),
        (openvino, {"precision": "int8_weights", "modules": {"haed.*": "fp32"}}),
        (executorch, {"precision": "int8", "exclude": ["haed"]}),
        (eager, {"precision": "bf16", "keep": ["haed"]}),
    ],
)
def test_a_pattern_that_fits_no_module_is_an_error(backend: Any, options: Options, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="'haed") as caught:
        backend.build(picture(), options=options, out=tmp_path)
    assert "head" in caught.value.hint


@pytest.mark.parametrize(("backend", "precision"), [(onnxruntime, "fp32"), (openvino, "bf16"), (executorch, "fp32")])
def test_patterns_are_refused_where_nothing_could_follow_them(backend: Any, precision: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="treats all modules alike"):
        backend.build(picture(), options={"precision": precision, "modules": {"head": "fp32"}}, out=tmp_path)


def test_wrong_options_are_named(tmp_path: Path) -> None:
    wrong: list[Options] = [{"ops": "few"}, {"range": "magic"}, {"exclude": "head"}, {"percentile": "high"}]
    for options in wrong:
        with pytest.raises(BadConfig):
            onnxruntime.build(picture(), options={"precision": "int8", **options}, out=tmp_path)


def test_the_exporter_tells_where_nodes_come_from_and_nothing_about_the_builder(tmp_path: Path) -> None:
    onnx_graph.write(picture(), tmp_path / "m.onnx")
    graph = onnx.load(str(tmp_path / "m.onnx"))
    assert {"body", "head"} <= {paths.user_path(path) for path in onnx_graph.module_paths(graph).values()}
    assert b".py" not in (tmp_path / "m.onnx").read_bytes()


def test_bias_correction_takes_the_mean_shift_away(tmp_path: Path) -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    weight = random.normal(size=(4, 3, 3, 3)).astype(np.float32)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], name="conv")
    shapes = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, channels, 8, 8])
        for name, channels in (("x", 3), ("y", 4))
    ]
    inside = onnx.helper.make_graph([node], "g", shapes[:1], shapes[1:], [onnx.numpy_helper.from_array(weight, "w")])
    graph = onnx.helper.make_model(inside, opset_imports=[onnx.helper.make_opsetid("", 18)])
    mean = np.array([1.0, 2.0, -3.0])
    assert onnx_int8.inputs_of_layers(graph) == {"x": 1}
    onnx_int8.correct(graph, {"x": mean})
    bias = onnx.numpy_helper.to_array(graph.graph.initializer[-1])
    shift = (onnx_int8.rounding_of(weight).sum((2, 3)) * mean).sum(1)
    assert np.allclose(bias, -shift, atol=1e-6)
    assert np.abs(shift).max() > 1e-3
    onnx.checker.check_model(graph)


def test_bias_correction_reaches_matrix_products_and_spares_what_stays_in_float(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(torch.relu(self.first(x)))
            return out

    torch.manual_seed(0)
    rows = [np.random.default_rng(i).uniform(1, 2, (4, 5, 8)).astype(np.float32) for i in range(4)]
    model = capture(Rows().eval(), torch.rand(2, 5, 8), calibration=rows)
    onnx_graph.write(model, tmp_path / "m.onnx")
    graph = onnx.load(str(tmp_path / "m.onnx"))
    assert [node.op_type for node in graph.graph.node].count("MatMul") == 2
    skip = onnx_int8.excluded(graph, {"exclude": ["second"]}, module=model.module)
    wanted = onnx_int8.inputs_of_layers(graph, skip=skip)
    assert len(wanted) == 1
    mean = np.concatenate(rows).mean((0, 1))
    onnx_int8.correct(graph, dict.fromkeys(wanted, mean), skip=skip)
    onnx.checker.check_model(graph)
    found = [t.name for t in graph.graph.initializer if "_corrected_" in t.name]
    assert len(found) == 1
    assert "first" in found[0]
    by_channel, by_tensor = (onnx_int8.rounding_of(np.diag([1.0, 0.003]), per_channel=one) for one in (True, False))
    assert abs(by_channel).max() < 1e-9 < 1e-3 < abs(by_tensor).max()


def test_rounding_matches_eight_bits() -> None:
    values = torch.tensor([[0.0, 1.0, 2.54], [-1.0, 0.5, 0.25]])
    assert torch.allclose(round_signed(values, axis=0)[0], torch.tensor([0.0, 1.0, 2.54]), atol=1e-6)
    assert len(set(round_unsigned(values).flatten().tolist())) <= 256
    assert noise_db(values, values) == 200
    assert noise_db(values, values * 1.1) == pytest.approx(20, abs=1e-3)
    assert noise_db(values, values * float("nan")) == -200


def test_the_worst_layer_is_ranked_first() -> None:
    model = picture()
    state = model.module.state_dict()
    state["body.weight"][0] *= 3000  # one channel dwarfs the others of its tensor, which then drown in rounding
    state["head.weight"][:, 0] *= 1e-4
    ranked = sensitivity(model, rows=4)
    assert {layer.path for layer in ranked} == {"stem", "body", "head"}
    assert ranked[0].path == "head"  # reads the tensor with the dwarfing channel
    assert ranked[0].db < 30 < ranked[-1].db


def test_the_ranking_goes_by_the_scales_of_the_recipe() -> None:
    model = picture()
    state = model.module.state_dict()
    state["body.weight"][0] *= 100  # one scale for all of it drowns the other channels, one for each does not
    by_channel, by_tensor = ({n.path: n.layer_db for n in sensitivity(model, per_channel=c)} for c in (True, False))
    assert by_tensor["body"] < by_channel["body"] - 0.1
    assert by_tensor["head"] < by_channel["head"] + 1


def test_recurrent_layers_and_the_module_itself_are_ranked() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.LSTM(6, 8, batch_first=True)
            self.weight = nn.Parameter(torch.randn(8, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.memory(x)[0][:, -1] @ self.weight
            return out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # export tells of the weights that an LSTM lists twice
        ranked = sensitivity(capture(Own().eval(), torch.randn(4, 5, 6)))
    assert {layer.path for layer in ranked} == {"memory", ""}
    assert all(10 < layer.db < 80 for layer in ranked)
    assert paths.matches("inner", [""])
    assert not paths.matches("inner.memory", [""])


def test_the_ranking_covers_every_layer_when_there_is_no_time() -> None:
    ranked = sensitivity(sentence(), seconds=0)
    assert [layer.output_db for layer in ranked] == [None, None]
    assert [layer.layer_db for layer in ranked] == sorted(layer.layer_db for layer in ranked)


def test_patterns_reach_into_submodules_and_through_wrappers() -> None:
    assert paths.matches("flat.inner.layer4.0.conv1", ["layer4"])
    assert paths.matches("inner.layer4.0.conv1", ["layer*.conv1"])
    assert not paths.matches("inner.layer4.0.conv1", ["layer", "conv1", "inner"])
    assert paths.user_path("inner") == ""


def test_dynamic_int8_leaves_out_by_path_too(tmp_path: Path) -> None:
    model: Model = picture()
    for exclude, count in (([], 1), (["head"], 0)):
        onnxruntime.build(model, options={"precision": "dynamic_int8", "exclude": list(exclude)}, out=tmp_path)
        kinds = [node.op_type for node in onnx.load(str(tmp_path / "model.onnx")).graph.node]
        assert kinds.count("MatMulInteger") == count
        assert "ConvInteger" not in kinds
    assert onnx_int8.HEAVY[0] == "Conv"
