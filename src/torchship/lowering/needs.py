"""Says which packages are missing, with the line that installs them, without importing any of them."""

from __future__ import annotations

from importlib.util import find_spec


def missing(modules: str, *, pip: str = "") -> str:
    """Empty when all the space-separated top-level `modules` are installed; else one line with the pip command.

    `pip` names what to install where it differs from the modules.
    """
    absent = [name for name in modules.split() if find_spec(name) is None]
    if not absent:
        return ""
    verb = "is" if len(absent) == 1 else "are"
    return f"{', '.join(absent)} {verb} not installed: pip install {pip or ' '.join(absent)}"
