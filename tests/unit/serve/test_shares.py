"""Each model's share of a card: added up by card, refused where it is too much, and told to torch before it opens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.artifact.made import linear
from torchship import hardware
from torchship.artifact import Store
from torchship.errors import BadConfig, Unavailable
from torchship.lowering import torch_stage
from torchship.pipeline.config import StageConfig
from torchship.serve.catalog import Catalog
from torchship.serve.config import ModelConfig, claimed_shares, convert
from torchship.serve.engine.spec import LineLimits, placements


def model(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "artifact": name, **more}


def test_shares_are_added_up_by_card_copy_stage_and_version() -> None:
    stages = [{"artifact": "a", "memory_share": 0.2, "device": ["cuda:0", "cuda:1"], "copies": 3}, {"artifact": "b"}]
    config = convert(
        {
            "model": [
                {"name": "row", "stages": stages},
                model("both", memory_share=0.1, versions={"latest": 2}, device="cuda:1"),
                model("own", memory_share=0.3),
                model("none", device="cuda:1"),
            ]
        }
    )
    assert claimed_shares(config.model) == pytest.approx({"cuda:0": 0.7, "cuda:1": 0.4})
    assert claimed_shares(convert({"model": [model(f"m{n}", memory_share=0.1) for n in range(10)]}).model)


def test_more_than_a_card_is_refused_with_names_and_numbers() -> None:
    given = [model("detect", memory_share=0.6, device="cuda"), model("classify", memory_share=0.3, copies=2)]
    with pytest.raises(BadConfig, match=r"cuda:0 add up to 1.20.*: detect 0.6, classify 0.3 \+ 0.3"):
        convert({"model": given})
    with pytest.raises(BadConfig, match=r"memory_share: Expected `float` <= 1.0"):
        convert({"model": [model("m", memory_share=1.5)]})
    with pytest.raises(BadConfig, match="belong to a stage"):
        convert({"model": [{"name": "m", "stages": [{"artifact": "a"}], "memory_share": 0.5}]})


def test_a_load_that_claims_too_much_is_refused_and_what_was_served_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("left", "right", "rest"):
        store.publish(linear(tmp_path / "made" / name, name=name).path, name=name)

    async def work() -> None:
        catalog = Catalog(store=store)
        try:
            await catalog.load(ModelConfig(name="left", artifact="left", memory_share=0.6))
            right = ModelConfig(name="right", artifact="right", memory_share=0.3)
            await catalog.load(right)
            with pytest.raises(BadConfig, match=r"(right 0\.5, left 0\.6|left 0\.6, right 0\.5)"):
                await catalog.load(ModelConfig(name="right", artifact="right", memory_share=0.5))
            assert catalog.line("right")[0].ready
            await catalog.load(ModelConfig(name="rest", artifact="rest"))
            shares = {
                name: line.stations[0].replicas[0].spec.placement.memory_share
                for (name, _), line in catalog.lines().items()
            }
            assert shares == pytest.approx({"left": 0.6, "right": 0.3, "rest": 0.1})
            await catalog.unload("left")
            await catalog.load(ModelConfig(name="right", artifact="right", memory_share=0.9))
        finally:
            await catalog.close()

    asyncio.run(work())


def test_a_copy_without_a_share_has_the_whole_card() -> None:
    (alone,) = placements(StageConfig(artifact="a"), LineLimits())
    assert alone.memory_share == 1.0
    found = placements(StageConfig(artifact="a", memory_share=0.25, copies=2), LineLimits())
    assert [place.memory_share for place in found] == [0.25, 0.25]


@pytest.mark.parametrize(("share", "told"), [("1.0", []), ("0.25", [(0.25, 1)])])
def test_torch_is_told_before_the_model_opens(
    share: str, told: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: heard.append(given))
    monkeypatch.setenv(hardware.MEMORY_SHARE, share)
    torch_stage.prepare(device="cpu", threads=1)
    torch_stage.prepare(device="cuda:1", threads=1)
    assert heard == told


def test_where_nothing_is_left_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(hardware.MEMORY_SHARE, "1e-06")
    with pytest.raises(Unavailable, match="leave nothing of cuda"):
        torch_stage.prepare(device="cuda", threads=1)
    torch_stage.prepare(device="cpu", threads=1)
