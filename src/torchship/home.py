"""The user's own folders: found below the home folder, or refused with the variable that names another place.

Containers run as users without a home, without an entry in the list of users, or with a home that nobody may write.
"""

from __future__ import annotations

import getpass
import os
from pathlib import Path

from torchship.errors import BadConfig


def expand(path: Path | str) -> Path:
    """`path` with its leading `~` replaced. Raises BadConfig where that is nobody's home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise BadConfig(f"{path}: no such home folder", hint="set HOME, or write the whole path") from None


def folder(variable: str, *below: str) -> Path:
    """The folder that the environment's `variable` names, else the one `below` the home folder.

    It need not exist. Raises BadConfig naming `variable` when it could not be made either.
    """
    given = os.environ.get(variable)
    if given:
        return expand(given)
    path = Path(os.path.expanduser("~"), *below)
    nearest = next(place for place in (path, *path.parents) if os.path.exists(place))
    if path.is_absolute() and (nearest == path or os.access(nearest, os.W_OK | os.X_OK)):
        return path
    what = f"{path} cannot be made" if path.is_absolute() else "this user has no home folder"
    raise BadConfig(what, hint=f"set {variable} to a folder that may be written")


def name_user() -> None:
    """Name this process's user where no list of users does: torch's compiler calls the folder of its cache so."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = f"uid{os.getuid()}"
