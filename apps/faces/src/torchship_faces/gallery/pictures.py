"""The faces that a gallery keeps so that it can move to another embedding model: JPEG files named by their SHA-256."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterable
from pathlib import Path

from torchship.errors import NotFound, Unavailable
from torchship_faces.gallery import records

_FOLDER = "faces"


def keep(root: Path, face: bytes) -> bytes:
    """Write a face and see it onto the disk; its digest, or nothing for an empty one. Raises Unavailable."""
    if not face:
        return b""
    digest = hashlib.sha256(face).digest()
    path = _path(root, digest)
    if not path.exists():
        temporary = path.with_name(f".{secrets.token_hex(6)}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            records.write(temporary, face)
            temporary.rename(path)
        except OSError as fault:
            temporary.unlink(missing_ok=True)
            raise Unavailable(
                f"a face could not be kept: {fault.strerror}", hint="nothing was enrolled; make room and try again"
            ) from None
    return digest


def read(root: Path, digest: bytes) -> bytes:
    """Raises NotFound when the file is gone."""
    try:
        return _path(root, digest).read_bytes()
    except FileNotFoundError:
        raise NotFound(f"the kept face {digest.hex()} is missing from {root}") from None


def size(root: Path, digest: bytes) -> int:
    """Bytes of a kept face; 0 when the file is gone."""
    try:
        return _path(root, digest).stat().st_size
    except FileNotFoundError:
        return 0


def remove(root: Path, digests: Iterable[bytes]) -> None:
    """Remove faces that no template names any more."""
    for digest in digests:
        _path(root, digest).unlink(missing_ok=True)


def sweep(root: Path, wanted: Collection[bytes]) -> None:
    """Remove every file that is not one of `wanted` (a writer that died may have left some)."""
    names = {digest.hex() + ".jpg" for digest in wanted}
    for path in (root / _FOLDER).glob("*/*"):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _path(root: Path, digest: bytes) -> Path:
    name = digest.hex()
    return root / _FOLDER / name[:2] / f"{name}.jpg"
