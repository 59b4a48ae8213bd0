"""Old module names of torchship that an application has taken with it: they import as the modules they became.

An application claims them by entry points of the group `torchship.moved`: the name is the old module, the value the new
one, and the modules below follow. TOML files, published pipelines and imports that say the old name go on working while
the application is installed, and the log says once which name to write instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_GROUP = "torchship.moved"


class MovedNames:
    """An import finder for the claimed names and the modules below them.

    The one without claims is asked last: once a module of torchship is missing it looks them up, and has them asked for
    before anything else, for the path finder would load the modules below a claimed one a second time.
    """

    def __init__(self, claims: dict[str, str] | None = None) -> None:
        self._claims, self._last = claims, claims is None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The import system asks for `fullname`; None when nobody claims it or a module below it."""
        if not fullname.startswith("torchship."):
            return None
        if self._claims is None:
            from importlib.metadata import entry_points

            claims = {point.name: point.value for point in entry_points(group=_GROUP)}
            self._claims = dict(sorted(claims.items(), reverse=True))  # a module before those above it
            sys.meta_path.insert(0, MovedNames(self._claims))
        for old, new in self._claims.items():
            if fullname == old or fullname.startswith(f"{old}."):
                name = new + fullname.removeprefix(old)
                return ModuleSpec(fullname, self, loader_state=name)  # type: ignore[arg-type]  # importlib.abc is slow
        if not self._last or not any(old.startswith(f"{fullname}.") for old in self._claims):
            return None
        found = ModuleSpec(fullname, None, is_package=True)  # a package above a claimed module, gone as well
        found.submodule_search_locations = []
        return found

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The very module of the new name, so that its classes exist once."""
        import logging
        from importlib import import_module

        module = import_module(spec.loader_state)
        logging.getLogger("torchship").warning("%s has moved: write %s", spec.name, spec.loader_state)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It ran under its new name; the import system has just given it the old one."""
        assert module.__spec__ is not None  # noqa: S101  # the import system has made one
        module.__spec__ = module.__spec__.loader_state


def follow() -> None:
    """Let the import system ask for moved names, after everything else."""
    sys.meta_path.append(MovedNames())
