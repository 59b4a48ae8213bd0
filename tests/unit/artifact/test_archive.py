"""Archives: what was exported comes back; whatever an enemy puts into one is refused and leaves nothing behind."""

from __future__ import annotations

import io
import stat
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.unit.artifact.made import linear
from torchship.artifact import archive, open_artifact
from torchship.errors import BadConfig, CorruptArtifact, NotFound, TorchshipError, UnsafeArtifact, Unsupported


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_there_and_back(tmp_path: Path, suffix: str) -> None:
    packed = linear(tmp_path / "a")
    one, two = (archive.export(tmp_path / "a", to=tmp_path / f"{name}{suffix}") for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with archive.extracted(one) as found:
        assert found.manifest == packed.manifest
        place = found.path
    assert not place.exists()


def test_wrong_names(tmp_path: Path) -> None:
    linear(tmp_path / "a")
    with pytest.raises(BadConfig, match="not an archive's name"):
        archive.export(tmp_path / "a", to=tmp_path / "x.rar")
    with pytest.raises(NotFound), archive.extracted(tmp_path / "nope.tar"):
        pass


Content = dict[str, bytes]


def tar_of(content: Content, *more: tarfile.TarInfo) -> bytes:
    """A tar file of plain files and of whatever else."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for info in more:
            file.addfile(info)
    return buffer.getvalue()


def special(kind: bytes, name: str = "backend/odd", target: str = "/etc/passwd") -> tarfile.TarInfo:
    """A link, a device, a pipe."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_of(content: Content, *, mode: int = 0, compress: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file whose last entry has a file mode."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as file:
        for name, data in content.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = compress
            info.external_attr = mode << 16 if name == [*content][-1] else 0
            file.writestr(info, data)
    return buffer.getvalue()


def with_format(content: Content, number: int) -> Content:
    """The manifest in another format version."""
    manifest = msgspec.json.decode(content["manifest.json"]) | {"format": number}
    return content | {"manifest.json": msgspec.json.encode(manifest)}


def listing(content: Content, name: str, size: int) -> Content:
    """A manifest that lists one file more."""
    manifest = msgspec.json.decode(content["manifest.json"])
    manifest["files"].append({"path": name, "size": size, "sha256": "0" * 64})
    return content | {"manifest.json": msgspec.json.encode(manifest)}


ZEROS = bytes(64 << 20)
HOSTILE: dict[str, tuple[Callable[[Content], bytes], str, type[TorchshipError], str]] = {
    "escape": (lambda c: tar_of(c | {"../evil": b"x"}), ".tar", UnsafeArtifact, "leaves"),
    "absolute": (lambda c: tar_of(c | {"/tmp/evil": b"x"}), ".tar", UnsafeArtifact, "leaves"),
    "deep escape": (lambda c: tar_of(c | {"backend/../../evil": b"x"}), ".tar", UnsafeArtifact, "leaves"),
    "symlink": (lambda c: tar_of(c, special(tarfile.SYMTYPE)), ".tar", UnsafeArtifact, "not a plain file"),
    "hard link": (lambda c: tar_of(c, special(tarfile.LNKTYPE)), ".tar", UnsafeArtifact, "not a plain file"),
    "device": (lambda c: tar_of(c, special(tarfile.CHRTYPE)), ".tar", UnsafeArtifact, "not a plain file"),
    "pipe": (lambda c: tar_of(c, special(tarfile.FIFOTYPE)), ".tar", UnsafeArtifact, "not a plain file"),
    "folder escape": (lambda c: tar_of(c, special(tarfile.DIRTYPE, "../evil")), ".tar", UnsafeArtifact, "leaves"),
    "unlisted": (lambda c: tar_of(c | {"backend/evil.so": b"x"}), ".tar", CorruptArtifact, "does not list"),
    "wrong size": (lambda c: tar_of(c | {"backend/model.onnx": b"x"}), ".tar", CorruptArtifact, "the manifest says"),
    "twice": (lambda c: tar_of(c, special(tarfile.REGTYPE, "backend/model.onnx")), ".tar", UnsafeArtifact, "twice"),
    "truncated": (lambda c: tar_of(c)[:900], ".tar", CorruptArtifact, ""),
    "not a tar": (lambda c: b"hello" * 400, ".tar", CorruptArtifact, "cannot be read"),
    "empty": (lambda c: b"", ".tar", CorruptArtifact, ""),
    "no manifest": (lambda c: tar_of({"a": b"x"}), ".tar", CorruptArtifact, "has no manifest.json"),
    "newer": (lambda c: tar_of(with_format(c, 99)), ".tar", Unsupported, "format version 99"),
    "too many": (lambda c: tar_of({f"f{i}": b"" for i in range(10_001)}), ".tar", UnsafeArtifact, "more than"),
    "compressed tar": (lambda c: __import__("gzip").compress(tar_of(c)), ".tar", CorruptArtifact, "cannot be read"),
    "zip escape": (lambda c: zip_of(c | {"../evil": b"x"}), ".zip", UnsafeArtifact, "leaves"),
    "zip link": (lambda c: zip_of(c | {"l": b"/etc"}, mode=stat.S_IFLNK | 0o777), ".zip", UnsafeArtifact, "plain"),
    "not a zip": (lambda c: b"PK" + b"x" * 99, ".zip", CorruptArtifact, "cannot be read"),
    "bomb": (
        lambda c: zip_of(listing(c, "z", len(ZEROS)) | {"z": ZEROS}, compress=zipfile.ZIP_DEFLATED),
        ".zip",
        UnsafeArtifact,
        "would grow",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    root = tmp_path / "a"
    content = {"manifest.json": b""} | {
        entry.path: (root / entry.path).read_bytes() for entry in linear(root).manifest.files
    }
    content["manifest.json"] = (root / "manifest.json").read_bytes()
    make, suffix, error, words = HOSTILE[kind]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    file = tmp_path / f"hostile{suffix}"
    file.write_bytes(make(content))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as caught, archive.extracted(file):
        raise AssertionError("it was opened")
    assert words in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_hash_is_found_after_unpacking(tmp_path: Path) -> None:
    artifact = linear(tmp_path / "a")
    content = {"manifest.json": (tmp_path / "a" / "manifest.json").read_bytes()}
    for entry in artifact.manifest.files:
        data = (tmp_path / "a" / entry.path).read_bytes()
        content[entry.path] = bytes(len(data)) if entry.path.endswith(".onnx") else data
    (tmp_path / "x.zip").write_bytes(zip_of(content))
    with pytest.raises(CorruptArtifact, match="its hash is wrong"), archive.extracted(tmp_path / "x.zip"):
        raise AssertionError("it was opened")


def folder_of(place: Path) -> Path:
    """An artifact's folder."""
    root = place / "net"
    linear(root)
    return root


def packed(root: Path, file: Path, *words: str) -> Path:
    """The folder packed by the tool `tar`."""
    subprocess.run(["tar", *words, "-f", str(file)], cwd=root, check=True)
    return file


def zipped(root: Path, file: Path, rename: Callable[[str], str], more: Content) -> Path:
    """The folder as a zip file whose entries have other names."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for path in sorted(root.rglob("*")):
            name = rename(str(path.relative_to(root)) + ("/" if path.is_dir() else ""))
            made.writestr(zipfile.ZipInfo(name), b"" if path.is_dir() else path.read_bytes())
        for name, data in more.items():
            made.writestr(name, data)
    return file


LITTER = {"__MACOSX/net/._manifest.json": b"x", "net/.DS_Store": b"x", "net/backend/._model.onnx": b"x"}
TOOLS: dict[str, Callable[[Path, Path], Path]] = {
    "with a dot": lambda root, at: packed(root, at / "x.tar", "-c", "."),
    "from above": lambda root, at: packed(root.parent, at / "x.tar", "-c", "net"),
    "tar.gz": lambda root, at: packed(root, at / "x.tar.gz", "-cz", "."),
    "tgz from above": lambda root, at: packed(root.parent, at / "x.TGZ", "-cz", "./net"),
    "pax": lambda root, at: packed(root, at / "x.tar", "-c", "--format=pax", "--pax-option=comment=hello", "."),
    "a Mac's zip": lambda root, at: zipped(root, at / "x.zip", lambda name: f"net/{name}", LITTER),
    "an old Windows zip": lambda root, at: zipped(root, at / "x.zip", lambda name: name.replace("/", "\\"), {}),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_archives_of_usual_tools_are_read(tmp_path: Path, tool: str) -> None:
    root = folder_of(tmp_path)
    with archive.extracted(TOOLS[tool](root, tmp_path)) as found:
        assert found.manifest == open_artifact(root).manifest
