"""Recipe, plugins, hardware, errors: small floors under everything."""

from __future__ import annotations

import msgspec
import pytest

import torchship
from torchship import hardware, plugins
from torchship.errors import BadConfig, BadInput
from torchship.recipe import Recipe, Step


def test_a_recipe_is_plain_data_with_a_stable_key() -> None:
    recipe = Recipe("onnxruntime", {"precision": "int8", "a": 1}, (Step("fuse"),))
    same = Recipe("onnxruntime", {"a": 1, "precision": "int8"}, (Step("fuse"),))
    assert recipe.key == same.key
    assert recipe.key != Recipe("onnxruntime").key
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=Recipe) == recipe
    assert recipe.label == "onnxruntime a=1 precision=int8 + fuse"


def test_plugins_are_found_by_file_name() -> None:
    assert "eager" in plugins.names("backends")
    with pytest.raises(BadConfig, match="unknown backend 'eagre'"):
        plugins.load("backends", name="eagre")


def test_probing_never_raises() -> None:
    assert "unknown backend" in plugins.reason_against("backends", name="nope", hardware=hardware.here())


def test_this_machine_is_known() -> None:
    here = hardware.here()
    assert here.cores >= 1
    assert here.memory > 2**28
    assert len(here.fingerprint) == 16
    assert str(here.cores) in here.line


def test_an_error_is_one_line() -> None:
    assert BadInput("two\n lines", hint="mend").line == "two lines (mend)"


def test_the_face_is_complete() -> None:
    for name in torchship.__all__:
        assert getattr(torchship, name) is not None
    assert "optimize" in dir(torchship)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        torchship.nope  # noqa: B018
    assert all(callable(getattr(torchship, verb)) for verb in ("optimize", "open", "serve", "stage"))


def test_a_template_writes_values_as_text() -> None:
    bars = [("<b> a&b", 2.0, False)]
    svg = plugins.rendered("torchship.optimize", "bars.svg.j2", width=100, bars=bars, top=2.0, number=str, unit="dB")
    assert "&lt;b&gt;" in svg
    assert "a&amp;b" in svg
    assert "<b>" not in svg
