"""Signs an artifact's manifest with an Ed25519 key (RFC 8032), and says whose signature it bears; all offline.

The manifest holds the hash of every file, so its signature covers them all. A public key is one line of 64 hex
digits; the keys that are trusted lie as `*.pub` files in `$TORCHSHIP_KEYS`, or in `~/.config/torchship/keys`.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from torchship import home, textfiles
from torchship.artifact import folder as folders
from torchship.artifact.folder import SIGNATURE
from torchship.errors import BadConfig, CorruptArtifact, NotFound, Unavailable, UnsafeArtifact
from torchship.plugins import missing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_PURPOSE = b"torchship artifact manifest\0"
_HEX_KEY = re.compile(r"[0-9a-f]{64}")


class Seal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of `manifest.sig`: whose key, and the signature over the manifest's hash; both in hex."""

    key: str
    signature: str
    algorithm: str = "ed25519"


def make_key(path: Path) -> str:
    """Write a new private key (PEM, readable by its owner only) and `path` with `.pub`. Returns the public key.

    Raises BadConfig when there is such a file already, or it cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = _public_of(private)
    beside = path.with_name(path.name + ".pub")
    for place in (path, beside):
        if place.exists():
            raise BadConfig(f"{place} exists", hint="a key is never overwritten: choose another name")
    _write_new(path, pem, mode=0o600)
    _write_new(beside, f"{public}\n".encode(), mode=0o644)
    return public


def _write_new(path: Path, data: bytes, *, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as fault:
        raise BadConfig(
            f"{path} cannot be written: {fault.strerror}", hint="name a file in a folder of yours"
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def sign(folder: Path, *, digest: str, key: Path) -> Seal:
    """Sign the manifest in `folder`, whose SHA-256 is `digest`, with the private key in a PEM file.

    Raises NotFound, BadConfig for a file that is no Ed25519 key.
    """
    private = _private(key)
    seal = Seal(_public_of(private), private.sign(_message(digest)).hex())
    folders.write(folder / SIGNATURE, msgspec.json.encode(seal))
    return seal


def signer(folder: Path, *, digest: str) -> str:
    """The public key that signed the manifest in `folder`, whose SHA-256 is `digest`; empty when it is not signed.

    Raises CorruptArtifact when the signature is not that key's over this manifest.
    """
    if not (folder / SIGNATURE).exists():
        return ""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        seal = msgspec.json.decode(folders.read(folder, SIGNATURE, limit=4096), type=Seal)
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(seal.key)).verify(
            bytes.fromhex(seal.signature), _message(digest)
        )
    except (msgspec.MsgspecError, ValueError, InvalidSignature):
        raise CorruptArtifact(
            f"the signature in {folder} is wrong", hint="it was changed after it was signed"
        ) from None
    return seal.key


def trusted_keys() -> dict[str, str]:
    """Names of the trusted public keys by key. Raises BadConfig for a file that holds none."""
    try:
        files = sorted(home.folder("TORCHSHIP_KEYS", ".config", "torchship", "keys").glob("*.pub"))
    except (OSError, BadConfig):
        return {}
    return {read_public(file): file.stem for file in files}


def read_public(path: Path) -> str:
    """The public key in a file. Raises NotFound, BadConfig."""
    text = textfiles.read(path).strip().lower()
    if not _HEX_KEY.fullmatch(text):
        raise BadConfig(f"{path} holds no public key", hint="one line of 64 hex digits, as `store keygen` writes")
    return text


def check(folder: Path, *, digest: str, key: str = "") -> str:
    """The name of the trusted key that signed the manifest (`key` alone is trusted when given).

    Raises UnsafeArtifact when it is not signed or by no trusted key, CorruptArtifact for a wrong signature.
    """
    found = signer(folder, digest=digest)
    if not found:
        raise UnsafeArtifact(f"{folder} is not signed", hint="sign it with `torchship store sign NAME --key FILE`")
    known = {key: "the given key"} if key else trusted_keys()
    if found not in known:
        raise UnsafeArtifact(
            f"{folder} is signed by {found[:16]}..., which is not trusted",
            hint="put that public key into $TORCHSHIP_KEYS or ~/.config/torchship/keys if you trust its owner",
        )
    return known[found]


def is_trusted(folder: Path, *, digest: str) -> bool:
    """Whether a trusted key signed the manifest; False where signatures cannot be checked."""
    try:
        return signer(folder, digest=digest) in trusted_keys()
    except ImportError:
        return False


def need_library() -> None:
    """Raise Unavailable where the library for keys is missing."""
    if missing("cryptography"):
        raise Unavailable("signatures need the package cryptography", hint="pip install cryptography")


def _message(digest: str) -> bytes:
    return _PURPOSE + bytes.fromhex(digest)


def _private(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        open_to = stat.filemode(path.stat().st_mode)[4:] if os.name == "posix" else "------"
        found = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise NotFound(f"no file {path}", hint="make a key with `torchship store keygen FILE`") from None
    except (ValueError, TypeError):
        raise BadConfig(f"{path} holds no private key", hint="an Ed25519 key in PEM, without a password") from None
    if not isinstance(found, Ed25519PrivateKey):
        raise BadConfig(f"{path} is not an Ed25519 key", hint="make one with `torchship store keygen FILE`")
    if open_to != "------":
        raise BadConfig(f"{path} is open to others ({open_to}): whoever read it can sign", hint=f"chmod 600 {path}")
    return found


def _public_of(private: Ed25519PrivateKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
