"""Text: tokens as the tokenizer makes them, padded to a common length; means that the mask decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples.text.model import weights_folder
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from torchship.errors import BadConfig, BadInput, NotFound
from torchship.pipeline import Composed, PipelineConfig, StageConfig, pack_pipeline, plan, plan_target
from torchship.stage import FunctionStage
from torchship.stages.text import Tokenize, pool
from torchship.tensors import Array

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "hello", "world"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A real little tokenizer."""
    made: Any = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = str(tmp_path / "tokenizer.json")
    made.save(path)
    return path


def texts(*items: bytes) -> Array:
    """A BYTES tensor."""
    found = np.empty(len(items), object)
    found[:] = items
    return found


def test_tokens(file: str) -> None:
    ids, mask, types = Tokenize(tokenizer=file, multiple=4)(texts(b"hello world", b"a b hello"))
    assert ids.tolist() == [[2, 6, 7, 3, 0, 0, 0, 0], [2, 4, 5, 6, 3, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert types.sum() == 0
    ids, _, _ = Tokenize(tokenizer=file, multiple=1, max_length=4)(texts(b"a a a a a a"))
    assert ids.tolist() == [[2, 4, 4, 3]]
    assert Tokenize(tokenizer=file, multiple=1)(texts("héllo".encode()))[0].tolist() == [[2, 1, 3]]
    assert "tokens:1..16" in Tokenize.declare(max_length=10)


SIX = ["a b a b a b", "hello", "a"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cut", ["left", "right"])
@pytest.mark.parametrize("padding", [{}, {"length": 12}, {"pad_to_multiple_of": 8}, {"pad_type_id": 3}])
def test_the_file_is_followed_as_the_library_follows_it(
    file: str, side: str, cut: str, padding: dict[str, int]
) -> None:
    made: Any = Tokenizer.from_file(file)
    made.enable_padding(direction=side, pad_id=5, pad_token="b", **padding)
    made.enable_truncation(5, direction=cut)
    made.save(file)
    wanted = made.encode_batch(SIX)
    found = Tokenize(tokenizer=file, multiple=1)(texts(*(text.encode() for text in SIX)))
    for array, name in zip(found, ("ids", "attention_mask", "type_ids"), strict=True):
        assert array.tolist() == [getattr(one, name) for one in wanted]
    longest = len(wanted[0].ids)
    assert f"tokens:1..{max(longest, 5)}]" in Tokenize.declare(tokenizer=file, multiple=1)


def test_options_go_before_the_file(file: str) -> None:
    made: Any = Tokenizer.from_file(file)
    made.enable_truncation(3)
    made.save(file)
    assert Tokenize(tokenizer=file, multiple=1)(texts(b"a b"))[0].tolist() == [[2, 4, 3]]
    assert Tokenize(tokenizer=file, multiple=1, max_length=4)(texts(b"a b"))[0].tolist() == [[2, 4, 5, 3]]
    with pytest.raises(BadConfig, match="max_length is 2, the tokenizer adds 2"):
        Tokenize(tokenizer=file, max_length=2)


# Between [CLS] and [SEP], by the plain-Python BertTokenizer of transformers 4.44.2 with MiniLM's vocabulary.
REFERENCE = {
    "": [],
    " \t\r\n": [],
    "Héllo Wörld ÀÉÎÕÜ": [7592, 2088, 29347, 3695, 2226],
    "e\u0301 combining \u0327c": [1041, 11566, 1039],
    "中文字符测试": [1746, 1861, 100, 100, 100, 100],
    "ひら 한국어": [1673, 30211, 1469, 30006, 30021, 29991, 30014, 30020, 29999, 30008],
    "😀 👩\u200d👩\u200d👧 🇩🇪": [100, 100, 100],
    "a" * 101: [100],
    "zero\u200bwidth\u200djoin\ufeffbom": [5717, 9148, 11927, 2232, 5558, 2378, 5092, 2213],
    "soft\u00adhyphen null\x00byte \ufffd": [3730, 10536, 8458, 2368, 19701, 3762, 2618],
    "[CLS] [sep] [MASK]": [101, 1031, 19802, 1033, 103],
    "\u0130stanbul \u0131I \u1e9eß Σς": [9960, 1104, 2072, 1096, 19310, 1173, 19579],
    "\ufb01ne Ⅷ ½ ™ \uff21\uff22\uff23\uff11": [1984, 2638, 100, 1092, 1580, 100],
    "العربية": [1270, 23673, 29830, 17149, 29816, 14498, 19433],
    "don't $1,000.50 C++": [2123, 1005, 1056, 1002, 1015, 1010, 2199, 1012, 2753, 1039, 1009, 1009],
    "##ing": [1001, 1001, 13749],
    "a\u2028b\u00a0c\u3000d": [1037, 1038, 1039, 1040],
    "a " * 5000: [1037] * 254,
}  # fmt: skip


def test_minilms_tokens_are_those_of_the_reference() -> None:
    stage = Tokenize(tokenizer=str(weights_folder() / "tokenizer.json"), max_length=256)
    ids, mask, _ = stage(texts(*(text.encode() for text in REFERENCE)))
    for row, wanted in enumerate(REFERENCE.values()):
        assert ids[row, : mask[row].sum()].tolist() == [101, *wanted, 102], list(REFERENCE)[row][:20]
        assert not ids[row, mask[row].sum() :].any()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text", "row 1 holds str, expected bytes"),
        (b"\xff", "row 1 is not UTF-8 (byte 0)"),
        (b"a" * 11, "row 1 has 11 bytes, at most 10"),
    ],
)
def test_bad_texts_are_named(file: str, text: Any, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        Tokenize(tokenizer=file, max_bytes=10)(texts(b"a", text))
    assert words in str(caught.value)


def test_bad_tokenizers(tmp_path: Path, file: str) -> None:
    with pytest.raises(NotFound):
        Tokenize(tokenizer=str(tmp_path / "nope"))
    (tmp_path / "bad").write_text("{}")
    with pytest.raises(BadConfig):
        Tokenize(tokenizer=str(tmp_path / "bad"))
    with pytest.raises(BadConfig):
        Tokenize(tokenizer=file, multiple=0)


def test_pooling_ignores_padding() -> None:
    hidden = np.array([[[3, 0], [0, 4], [100, 100]], [[0, 2], [100, 100], [100, 100]]], np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 0]], np.int64)
    stage = FunctionStage(pool)
    given: dict[str, Array] = {"hidden": hidden, "attention_mask": mask}
    np.testing.assert_allclose(stage(given, {"normalize": False})["vectors"], np.array([[1.5, 2], [0, 2]]))
    np.testing.assert_allclose(stage(given)["vectors"], np.array([[0.6, 0.8], [0, 1]]), rtol=1e-6)


def test_the_tokenizer_travels_with_the_pipeline(file: str, tmp_path: Path) -> None:
    stages = (StageConfig(run="torchship.stages.text:Tokenize", options={"tokenizer": file, "multiple": 1}),)
    pack_pipeline(plan(PipelineConfig("tokens", stages)), tmp_path / "p")
    Path(file).unlink()
    composed = Composed(plan_target(tmp_path / "p"))  # no trust is needed
    assert composed({"text": texts(b"a")})["input_ids"].tolist() == [[2, 4, 3]]
