"""torchship: a Model is optimized into an Artifact, opened as a Stage, and served on a Line.

`optimize`, `open` and `serve` are the three verbs. Importing this package imports no torch and no numpy:
every name is fetched from its room when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchship.moved import follow

__version__ = "0.1.0"

_VERBS = ("optimize", "serve", "stage")  # modules that can be called: plugins.make_callable
_ROOMS = {
    "Effort": "torchship.optimize.measure:Effort",
    "Guard": "torchship.optimize.guard:Guard",
    "Recipe": "torchship.recipe:Recipe",
    "Report": "torchship.optimize.report:Report",
    "build": "torchship.optimize.search:build",
    "open": "torchship.pipeline:open_target",
    "Artifact": "torchship.artifact:Artifact",
    "Store": "torchship.artifact.store:Store",
    "Signature": "torchship.tensors:Signature",
    "TensorSpec": "torchship.tensors:TensorSpec",
    "Stage": "torchship.stage:Stage",
    "TorchshipError": "torchship.errors:TorchshipError",
}

__all__ = ["__version__", *_ROOMS, *_VERBS]  # noqa: PLE0604  # names are strings

if TYPE_CHECKING:
    from torchship.artifact import Artifact as Artifact
    from torchship.artifact.store import Store as Store
    from torchship.errors import TorchshipError as TorchshipError
    from torchship.pipeline.composed import open as open
    from torchship.stage import Stage as Stage
    from torchship.tensors import Signature as Signature
    from torchship.tensors import TensorSpec as TensorSpec


follow()


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _VERBS:
        return import_module(f"torchship.{name}")
    if name not in _ROOMS:
        raise AttributeError(f"module 'torchship' has no attribute {name!r}")
    module, _, attribute = _ROOMS[name].partition(":")
    found = getattr(import_module(module), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_VERBS})
