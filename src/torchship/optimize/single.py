"""`torchship.build`: one recipe without a search, for what is known to run; built, packed, re-opened and compared."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from torchship import __version__
from torchship.artifact import Artifact, Store, open_artifact
from torchship.artifact.manifest import Provenance
from torchship.errors import GuardRefused
from torchship.optimize.cache import hash_model
from torchship.optimize.capture import capture
from torchship.optimize.guard import Guard, judge
from torchship.optimize.judge import compare
from torchship.optimize.reference import EagerStage
from torchship.optimize.trial import packed
from torchship.optimize.yardstick import study
from torchship.recipe import Recipe


def build(
    module: torch.nn.Module,
    example_inputs: Any,
    *,
    recipe: Recipe,
    name: str,
    store: Store | str | Path | None = None,
    guard: Guard | None = None,
) -> Artifact:
    """Publish `module` by `recipe`, in this process: nothing else is tried and nothing is measured.

    `example_inputs`: see `capture`; on them the artifact, opened from disk, must agree with the module as `guard` says.
    Transforms are the search's business: `recipe` has none. Raises CaptureFailed, BuildFailed, GuardRefused.
    """
    model = capture(module, example_inputs, name=name)
    example = model.examples[0]
    wanted = EagerStage(model)(example)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    provenance = Provenance(__version__, created, f"torchship.build:{name}", hash_model(model))
    with TemporaryDirectory(prefix="torchship-build-") as scratch:
        folder = Path(scratch) / "artifact"
        packed(model, folder, recipe=recipe, name=name, provenance=provenance, outputs=wanted)
        with closing(open_artifact(folder).open(trust=True)) as stage:
            yards = study([wanted], signature=model.signature)
            found = compare([wanted], [stage(example)], signature=model.signature, yards=yards)
            found = judge(found, guard=guard or Guard(), recipe=recipe)
        if not found.passed:
            raise GuardRefused(f"{name}: {recipe.label}: {found.reason}", hint="try another recipe, or let it search")
        where = store if isinstance(store, Store) else Store(store)
        number = where.publish(folder, name=name)
    return open_artifact(where.resolve(f"{name}@{number}"), verify=False)
