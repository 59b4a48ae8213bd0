"""Lets a room be called by the verb it is named for: `torchship.optimize(...)` while `torchship.optimize` is a package.

Importing a submodule rebinds the name on the package above, so a function of the same name cannot live there.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    """A module that passes a call on to the function it names in `__verb__`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        module, _, function = self.__verb__.partition(":")
        return getattr(import_module(module), function)(*arguments, **options)


def make_callable(room: str, *, verb: str) -> None:
    """Calling module `room` calls `verb`, spelt `module:function` and imported at the first call."""
    module = sys.modules[room]
    module.__class__ = _Verb
    vars(module)["__verb__"] = verb
