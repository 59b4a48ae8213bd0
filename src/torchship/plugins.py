"""Modules as plugins and as functions.

A plugin is a module, its folder is its kind, its file name is its name; outsiders add theirs by entry points of the
group `torchship.<kind>`. A callable module is a package that can be called as the function it is named for.
Pages are templates that lie in a package.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torchship.errors import BadConfig

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

_FOLDERS = {
    "backends": "torchship.backends",
    "transforms": "torchship.optimize.transforms",
    "commands": "torchship.cli",
}


def names(kind: str) -> list[str]:
    """The names of all plugins of a kind, sorted, without importing any of them."""
    folder = importlib.import_module(_FOLDERS[kind])
    inside = {found.name for found in pkgutil.iter_modules(folder.__path__) if not found.name.startswith("_")}
    return sorted(inside | {point.name for point in entry_points(group=f"torchship.{kind}")})


def load(kind: str, *, name: str) -> ModuleType:
    """Import one plugin. Raises BadConfig with the known names when there is none of that name."""
    for point in entry_points(group=f"torchship.{kind}"):
        if point.name == name:
            module: ModuleType = point.load()
            return module
    if name not in names(kind):
        raise BadConfig(f"unknown {kind.rstrip('s')} {name!r}", hint=f"use one of {', '.join(names(kind))}")
    return importlib.import_module(f"{_FOLDERS[kind]}.{name}")


@functools.cache
def fact(kind: str, name: str, what: str, default: Any = None) -> Any:
    """What a plugin's module says about itself; the default for one that says nothing, or is not there."""
    try:
        return getattr(load(kind, name=name), what, default)
    except Exception:  # a plugin may fail in any way when it is imported
        return default


def reason_against(kind: str, *, name: str, **facts: object) -> str:
    """Why a plugin cannot run here, in one line with the mend; empty when it can. Never raises, whatever it does."""
    try:
        return str(load(kind, name=name).probe(**facts))
    except BaseException as fault:  # a plugin may fail in any way while it looks for its libraries
        if isinstance(fault, KeyboardInterrupt):
            raise
        return f"{type(fault).__name__}: {' '.join(str(fault).split())}"


def missing(modules: str, *, pip: str = "") -> str:
    """Which of the space-separated top-level `modules` are not installed, without importing any.

    Empty when all are there, else one line with the pip command. `pip` names what to install where it
    differs from the modules.
    """
    absent = [name for name in modules.split() if find_spec(name) is None]
    if not absent:
        return ""
    verb = "is" if len(absent) == 1 else "are"
    return f"{', '.join(absent)} {verb} not installed: pip install {pip or ' '.join(absent)}"


def needs(modules: str, *, pip: str = "", compiler_of: str = "") -> Callable[..., str]:
    """The `probe` of a plugin that needs these modules, and a C++ compiler for what `compiler_of` names.

    It says why the plugin cannot run here, with the mend; nothing when it can.
    """

    def probe(**facts: object) -> str:
        import shutil

        absent = missing(modules, pip=pip)
        if not absent and compiler_of and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
            return f"{compiler_of} needs a C++ compiler: apt-get install g++"
        return absent

    return probe


def rendered(package: str, template: str, **values: Any) -> Markup:
    """A page or a drawing: a template of `package`'s folder `templates` with its values filled in.

    Values are written as text; only Markup, which this returns, goes in as it is.
    """
    from markupsafe import Markup

    return Markup(_templates(package).get_template(template).render(values))  # noqa: S704  # escaped by the template


@functools.cache
def _templates(package: str) -> jinja2.Environment:
    import jinja2

    loader = jinja2.PackageLoader(package)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


class _CallableModule(ModuleType):
    """A module that passes calls on to the function that its attribute `__verb__` names."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        module, _, function = self.__verb__.partition(":")
        return getattr(importlib.import_module(module), function)(*arguments, **options)


def make_callable(module: str, *, verb: str) -> None:
    """Let `torchship.optimize(...)` work while `torchship.optimize` is a package.

    Importing a submodule binds its name in the package above, so a function of that name cannot live there. `verb` is
    spelt `module:function` and imported at the first call.
    """
    found = sys.modules[module]
    found.__class__ = _CallableModule
    vars(found)["__verb__"] = verb
