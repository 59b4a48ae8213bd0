"""The doctor on a real card."""

from __future__ import annotations

from tests.gpu.models import ON_CARD
from torchship.doctor.machine import examine

pytestmark = ON_CARD


def test_the_self_test_passes_and_the_memory_is_told() -> None:
    found = examine()
    assert [(check.name, check.fault) for check in found.checks] == [
        ("product", ""),
        ("graph capture", ""),
        ("compiled kernel", ""),
    ]
    facts = {fact.name: fact for fact in found.facts}
    assert facts["torch on cards"].level == "ok", facts["torch on cards"]
    assert "GiB free" in facts["memory of card 0"].value
