"""Law: whatever is enrolled, forgotten, compacted and reopened in any order, the gallery equals a dictionary."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from torchship_faces.gallery import Enrolment, Gallery

VECTORS = np.random.default_rng(3).standard_normal((40, 16)).astype(np.float32)
NAMES = st.sampled_from(["ann", "bob", "cid", "dee"])


class GalleryIsADictionary(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="torchship-law-"))
        self.gallery = self.open()
        self.other = self.open()
        self.expected: dict[str, list[int]] = {}

    def open(self) -> Gallery:
        return Gallery(self.root, model="m", width=16, exact_below=8)

    @rule(name=NAMES, rows=st.lists(st.integers(0, 39), min_size=1, max_size=3), replace=st.booleans())
    def enrol(self, name: str, rows: list[int], replace: bool) -> None:
        self.gallery.enrol([Enrolment(person=name, vectors=VECTORS[rows], replace=replace)])
        self.expected[name] = rows if replace else [*self.expected.get(name, []), *rows]

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        if self.expected.pop(name, None) is not None:
            self.other.forget(name)

    @rule()
    def compact(self) -> None:
        self.other.compact()

    @rule()
    def reopen(self) -> None:
        self.gallery.close()
        self.gallery = self.open()

    @invariant()
    def equal(self) -> None:
        for gallery in (self.gallery, self.other):
            assert gallery.count() == (len(self.expected), sum(map(len, self.expected.values())))
            for name, rows in self.expected.items():
                kept = gallery.vectors_of(name)
                unit = VECTORS[rows] / np.linalg.norm(VECTORS[rows], axis=1, keepdims=True)
                assert np.allclose(kept, unit, atol=1e-3)
                assert name in [match.person for match in gallery.nearest(VECTORS[rows[:1]], count=4)[0]]

    def teardown(self) -> None:
        self.gallery.close()
        self.other.close()
        shutil.rmtree(self.root)


TestGalleryIsADictionary = GalleryIsADictionary.TestCase
TestGalleryIsADictionary.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
