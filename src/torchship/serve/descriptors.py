"""File descriptors: as many as the system allows, and connections only so that enough are left for workers."""

from __future__ import annotations

import resource

_MOST = 65536
_KEPT = 256  # for workers, artifacts and logs


def room_for_connections(most: int = 4096) -> int:
    """Raise the soft limit of this process as far as it may go; how many connections a listener may then hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return most if soft == resource.RLIM_INFINITY else max(16, min(most, soft - _KEPT))
