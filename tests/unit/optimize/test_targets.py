"""The command line's words: targets, data, recipes, times and sizes, each with its own clear fault."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from torchship.cli.optimize import command
from torchship.errors import BadConfig, NotFound
from torchship.optimize import facts, page, targets
from torchship.optimize.choose import Choice, Constraints
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe, Step
from torchship.stages.images import Classify
from torchship.tensors import TensorSpec


def make() -> nn.Module:
    return nn.Linear(4, 2)


def fails() -> nn.Module:
    return 3  # type: ignore[return-value]


def needs(width: int) -> nn.Module:
    return nn.Linear(width, 2)


class Talks(nn.Linear):
    """Prints whenever it runs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        print("running")
        return super().forward(input)


def talks() -> nn.Module:
    print("making")
    return Talks(4, 2)


def breaks() -> nn.Module:
    raise ValueError("no weights")


net = nn.Linear(4, 2)
HERE = __name__


def test_a_target_is_a_module_or_makes_one() -> None:
    assert isinstance(targets.module_at(f"{HERE}:make"), nn.Linear)
    assert targets.module_at(f"{HERE}:net") is net


@pytest.mark.parametrize(
    ("target", "fault", "words"),
    [
        ("resnet18", BadConfig, "is not module:attribute"),
        ("no.such.module:x", NotFound, "cannot be imported"),
        (f"{HERE}:absent", NotFound, "cannot be imported"),
        (f"{HERE}:HERE", BadConfig, "is of type str"),
        (f"{HERE}:fails", BadConfig, "of type int"),
        (f"{HERE}:needs", BadConfig, "needs arguments: TypeError"),
        (f"{HERE}:breaks", BadConfig, r"fails when it is called: ValueError: no weights .*test_targets.py:\d+: raise"),
    ],
)
def test_a_wrong_target_is_named(target: str, fault: type[Exception], words: str) -> None:
    with pytest.raises(fault, match=words):
        targets.module_at(target)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("class A(", "SyntaxError"),
        ("import sys\nsys.exit('usage')", "SystemExit: usage"),
        ("1 / 0", "file.py:1: 1 / 0"),
    ],
)
def test_a_file_that_cannot_be_imported(code: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_file.py").write_text(code)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(BadConfig, match=f"fails when it is imported: .*{words}") as caught:
        targets.module_at(f"{tmp_path}/broken_file.py:net")
    assert "__main__" in caught.value.hint


def test_a_row_is_run_again_by_the_words_that_concern_it() -> None:
    given = targets.read_wish(
        f"{HERE}:make", weights=None, inputs=["x:FP32[-1,4]"], data=None, evaluate=None, finetune=None,
        backends="openvino", recipes=['{"backend": "openvino"}'], budget="5s", name=None, labels=None,
        max_latency_p99="3ms", max_memory=None, max_size=None, goal="size", threads=2, device="cpu", batched=True,
    )  # fmt: skip
    start = f"torchship optimize {HERE}:make --input 'x:FP32[-1,4]'"
    assert given["command"].startswith(f"{start} --recipe '{{")
    assert given["command"].endswith(
        "--backends openvino --max-latency-p99 3ms --budget 5s --goal size --threads 2 --batched"
    )
    asked = facts.Facts(
        name="net", created="", torchship="", source="", signature="", hardware="", fingerprint="", threads=2,
        device="cpu", goal="size", constraints=Constraints(), trials=(), choice=Choice(None, (), ""),
        command=given["command"],
    )  # fmt: skip
    tuned = Recipe("openvino", {"precision": "int8"}, (Step("finetune"), Step("fuse")))
    again = page.reproduce(asked, Trial(tuned, "ok"))
    assert again.startswith(
        f"{start} --max-latency-p99 3ms --goal size --threads 2 --batched --no-publish --recipe '{{"
    )
    assert targets.recipes_at(shlex.split(again)[-1]) == [Recipe("openvino", {"precision": "int8"}, (Step("fuse"),))]


@pytest.mark.parametrize(("text", "found"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("7", 7), (" 2 min ", 120)])
def test_times(text: str, found: float) -> None:
    assert targets.seconds(text, what="--budget") == found


@pytest.mark.parametrize(("text", "found"), [("300MB", 300_000_000), ("1GiB", 2**30), ("12", 12), ("1.5kb", 1500)])
def test_sizes(text: str, found: int) -> None:
    assert targets.size(text, what="--max-size") == found


@pytest.mark.parametrize("text", ["soon", "10 parsecs", "", "-3s"])
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadConfig, match="--budget") as caught:
        targets.seconds(text, what="--budget")
    assert "10m" in caught.value.hint


def test_memory_without_a_unit_is_refused() -> None:
    assert targets.memory("90MB", what="--max-memory") == 90_000_000
    with pytest.raises(BadConfig, match="--max-memory: 90 is 90 bytes") as caught:
        targets.memory("90", what="--max-memory")
    assert "300MB" in caught.value.hint


def test_labels_behind_the_inputs_of_a_sample_are_no_inputs() -> None:
    class Two(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    x, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    one = torch.nn.Linear(3, 2)
    for sample, found in (((x, labels), 1), ([x, labels], 1), ((x,), 1)):
        assert len(targets.without_labels(sample, one)) == found
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)]
    assert targets.without_labels(images, one) is images, "a list of pictures is one argument"
    assert targets.without_labels(x, one) is x
    assert len(targets.without_labels((x, x, labels), Two())) == 2
    assert len(targets.without_labels((x, x), Two())) == 2


def test_milliseconds() -> None:
    assert targets.milliseconds("0.5s", what="--max-latency-p99") == 500
    assert targets.milliseconds("12ms", what="--max-latency-p99") == 12


def test_recipes_from_json_and_files(tmp_path: Path) -> None:
    wanted = Recipe("onnxruntime", {"precision": "int8", "exclude": ["head.*"]}, (Step("precision", {"mode": "cast"}),))
    text = (
        '{"backend": "onnxruntime", "options": {"precision": "int8", "exclude": ["head.*"]},'
        ' "transforms": [{"transform": "precision", "options": {"mode": "cast"}}]}'
    )
    assert targets.recipes_at(text) == [wanted]
    (tmp_path / "r.json").write_text(f"[{text}]")
    assert targets.recipes_at(str(tmp_path / "r.json")) == [wanted]
    (tmp_path / "r.toml").write_text(
        '[[recipe]]\nbackend = "onnxruntime"\n[recipe.options]\nprecision = "int8"\nexclude = ["head.*"]\n'
        '[[recipe.transforms]]\ntransform = "precision"\noptions = {mode = "cast"}\n'
        '[[recipe]]\nbackend = "eager"\n'
    )
    assert targets.recipes_at(str(tmp_path / "r.toml")) == [wanted, Recipe("eager")]
    with pytest.raises(BadConfig, match="backen"):
        targets.recipes_at('{"backen": "x"}')
    with pytest.raises(NotFound, match="no file"):
        targets.recipes_at("nowhere.toml")


def test_a_folder_of_pictures_becomes_rows(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (40, 30 + index), (255, 0, 0)).save(tmp_path / f"{index}.png")
    rows = list(targets.data_at(str(tmp_path), specs=[TensorSpec.parse("image:FP32[-1,3,16,16]")]))
    assert [row.shape for row in rows] == [(3, 16, 16)] * 3
    assert rows[0].dtype == np.float32
    np.testing.assert_allclose(rows[0][:, 0, 0], [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-5)
    raw = next(iter(targets.data_at(str(tmp_path), specs=[TensorSpec.parse("image:UINT8[-1,3,16,16]")])))
    assert raw.max() == 255
    with pytest.raises(BadConfig, match="folder of pictures"):
        targets.data_at(str(tmp_path), specs=[TensorSpec.parse("ids:INT64[-1,16]")])


def test_a_folder_of_pictures_is_read_as_the_server_reads_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(np.stack([ramp, ramp // 2, ramp[::-1]], 2)).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)).save(tmp_path / "b.png")
    (tmp_path / "._b.png").write_bytes(b"a Mac's note")
    (tmp_path / "c.png").write_bytes(b"no picture")
    served = [(tmp_path / name).read_bytes() for name in ("a.jpg", "b.png")]
    wanted = Classify(size=[16, 24])(np.array([*served, None], object)[:2])
    rows = list(targets.data_at(str(tmp_path), specs=[TensorSpec.parse("image:FP32[-1,3,16,24]")]))
    np.testing.assert_array_equal(np.stack(rows), wanted)
    assert "c.png is left out" in caplog.text


def batches_then_a_fault() -> Iterator[torch.Tensor]:
    yield torch.ones(2, 4)
    raise OSError("the disk is gone")


def no_batches() -> Iterator[torch.Tensor]:
    return iter(())


@pytest.mark.parametrize(
    ("target", "fault", "words"),
    [
        ("nowhere", NotFound, "--data: no folder nowhere"),
        (f"{HERE}:batches_then_a_fault", BadConfig, r"fails: OSError: the disk is gone .*test_targets.py:\d+: raise"),
        (f"{HERE}:net", BadConfig, "fails: TypeError"),
        (f"{HERE}:no_batches", BadConfig, "gives no batch"),
        (f"{HERE}:fails", BadConfig, "gives a int"),
    ],
)
def test_wrong_data_is_named(target: str, fault: type[Exception], words: str) -> None:
    with pytest.raises(fault, match=words):
        targets.data_at(target, specs=[TensorSpec.parse("x:FP32[-1,4]")])


def test_a_misspelt_name_is_put_right() -> None:
    with pytest.raises(NotFound, match="no attribute 'mkae'") as caught:
        targets.module_at(f"{HERE}:mkae")
    assert caught.value.hint == "did you mean make?"
    with pytest.raises(NotFound, match="no attribute 'zzzz'") as caught:
        targets.module_at(f"{HERE}:zzzz")
    assert caught.value.hint.endswith("test_targets.py defines no such name")


def test_help_shows_examples_and_bad_words_exit_with_2() -> None:
    runner = CliRunner()
    text = runner.invoke(command, ["--help"]).output
    assert '--input "image:FP32[-1,3,224,224]"' in text
    assert "--max-latency-p99" in text
    assert runner.invoke(command, [f"{HERE}:make", "--goal", "speed"]).exit_code == 2
    found = runner.invoke(command, [f"{HERE}:make", "--input", "x:FP32[-1,4]", "--budget", "soon"])
    assert isinstance(found.exception, BadConfig)
    found = runner.invoke(command, [f"{HERE}:make"])
    assert isinstance(found.exception, BadConfig)
    assert "--data" in found.exception.hint


def test_the_command_prints_json_alone_on_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSHIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    runner = CliRunner()
    given = [f"{HERE}:talks", "--input", "x:FP32[-1,4]", "--backends", "onnxruntime", "--json"]
    given += ["--store", str(tmp_path)]
    found = runner.invoke(command, [*given, "--report", str(tmp_path / "report")])
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert [folder.name for folder in Path(told["artifact"]).parent.iterdir() if folder.is_dir()] == [
        str(told["version"])
    ]
    assert Path(told["artifact"], "manifest.json").is_file()
    assert told["report"]["command"].startswith("torchship optimize")
    assert (tmp_path / "report" / "report.html").is_file()
    assert torch.is_grad_enabled()
