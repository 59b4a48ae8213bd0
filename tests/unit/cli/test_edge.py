"""`torchship edge`: what a pack holds, what is refused, and the whole way from a pack to an answer, offline."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from tests.unit.artifact.made import linear
from tests.unit.cli.test_artifact_commands import torchship
from torchship import hardware
from torchship.artifact import edge, open_artifact, signing, wheels
from torchship.artifact.folder import MANIFEST
from torchship.artifact.package import amend, pack
from torchship.cli import edge as edge_command
from torchship.errors import BadConfig, BuildFailed, CorruptArtifact, Unavailable, UnsafeArtifact, WrongMachine
from torchship.recipe import Recipe
from torchship.serve import config as configs


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where no package can be downloaded at all."""
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--timeout", "5", "--retries", "0", "hpack"]
    place = tmp_path_factory.mktemp("registry")
    if subprocess.run([*words, "--dest", str(place)], capture_output=True, check=False).returncode:
        pytest.skip("the package registry is out of reach")


def packed(tmp_path: Path, target: Literal["pi4", "x86-64"] = "pi4", *more: str | Path) -> Path:
    """A pack of `linear` without wheels."""
    if not (tmp_path / "linear").exists():
        linear(tmp_path / "linear")
    file = tmp_path / f"{target}.tar"
    torchship("edge", "pack", f"{tmp_path}/linear", "--target", target, "--no-wheels", "-o", file, *more)
    return file


def test_a_pack_holds_what_a_machine_needs_and_is_the_same_each_time(tmp_path: Path) -> None:
    file = packed(tmp_path)
    first = file.read_bytes()
    found, _ = edge.unpack(file, to=tmp_path / "out")
    assert (found.target, found.machine, found.python, found.wheels) == ("pi4", "aarch64", "3.13", False)
    assert open_artifact(tmp_path / "out" / "artifact").digest == open_artifact(tmp_path / "linear").digest
    config = configs.convert(tomllib.loads((tmp_path / "out" / "config.toml").read_text()))
    assert (config.http.host, config.one_process, config.model[0].artifact) == ("127.0.0.1", True, "linear")
    unit = (tmp_path / "out" / "torchship.service").read_text()
    assert {"Type=notify", "WatchdogSec=30", "LogRateLimitBurst=1000"} <= set(unit.splitlines())
    assert {"Restart=always", "DynamicUser=yes", "ProtectSystem=strict"} <= set(unit.splitlines())
    lines = (tmp_path / "out" / "requirements.txt").read_text().split()
    assert all("==" in line for line in lines)
    assert {line.partition("==")[0] for line in lines} >= {"numpy", "onnxruntime", "torchship", "cryptography"}
    assert len((tmp_path / "out" / "README").read_text().splitlines()) == 3
    file.unlink()
    assert packed(tmp_path).read_bytes() == first


def test_our_own_wheel_is_the_package_that_runs_here(tmp_path: Path) -> None:
    wheel = wheels.ours(tmp_path)
    done = [sys.executable, "-c", "import torchship.wire, sys; print(torchship.__file__)"]
    where = subprocess.run(done, env={"PYTHONPATH": str(wheel)}, capture_output=True, text=True, check=True).stdout
    assert where.startswith(str(wheel))
    data = wheel.read_bytes()
    assert wheels.ours(tmp_path).read_bytes() == data


def test_a_signature_covers_the_whole_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    monkeypatch.setenv("TORCHSHIP_KEYS", str(keys))
    public = signing.make_key(tmp_path / "my.key")
    plain, file = packed(tmp_path, "pi4"), packed(tmp_path, "x86-64", "--sign", tmp_path / "my.key")
    with pytest.raises(UnsafeArtifact, match="the pack is not signed"):
        torchship("edge", "try", plain)
    with pytest.raises(UnsafeArtifact, match="not trusted"):
        torchship("edge", "try", file)
    (keys / "me.pub").write_text(public)
    root = tmp_path / "signed"
    _, digest = edge.unpack(file, to=root)
    assert signing.check(root, digest=digest) == "me"
    found = json.loads((root / MANIFEST).read_bytes())
    (root / MANIFEST).write_bytes(json.dumps({**found, "python": "3.12"}).encode())
    changed = repacked(root, tmp_path / "changed.tar")
    with pytest.raises(CorruptArtifact, match="signature"):
        torchship("edge", "try", changed)


def repacked(root: Path, file: Path) -> Path:
    with tarfile.open(file, "w") as tar:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(root).as_posix())
    return file


def test_a_changed_file_and_a_file_too_many_are_refused(tmp_path: Path) -> None:
    edge.unpack(packed(tmp_path), to=tmp_path / "out")
    (tmp_path / "out" / "extra").write_text("")
    with pytest.raises(CorruptArtifact, match="extra"):
        torchship("edge", "try", repacked(tmp_path / "out", tmp_path / "a.tar"), "--trust")
    (tmp_path / "out" / "extra").unlink()
    unit = tmp_path / "out" / "torchship.service"
    unit.write_text(unit.read_text().replace("yes", "no "))
    with pytest.raises(CorruptArtifact, match=r"torchship\.service"):
        torchship("edge", "try", repacked(tmp_path / "out", tmp_path / "b.tar"), "--trust")


@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "artifact/../../out.txt"])
def test_nothing_is_written_outside(tmp_path: Path, name: str) -> None:
    file = packed(tmp_path)
    with tarfile.open(file, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(UnsafeArtifact):
        torchship("edge", "try", file, "--trust")


def test_an_artifact_is_no_pack(tmp_path: Path) -> None:
    linear(tmp_path / "linear")
    torchship("store", "export", f"{tmp_path}/linear", tmp_path / "a.tar")
    with pytest.raises(CorruptArtifact, match="no edge pack"):
        torchship("edge", "try", tmp_path / "a.tar", "--trust")


def test_a_pack_for_another_processor_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "TARGETS", {**edge.TARGETS, "pi4": "riscv64"})
    with pytest.raises(WrongMachine, match="riscv64") as caught:
        torchship("edge", "try", packed(tmp_path), "--trust")
    assert "--emulator" in caught.value.hint


def test_a_name_that_is_no_archives_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"x.rar: not an archive's name"):
        torchship("edge", "pack", f"{tmp_path}/nothing", "--target", "pi4", "-o", tmp_path / "x.rar")


def test_models_that_cannot_run_there_are_refused(tmp_path: Path) -> None:
    linear(tmp_path / "linear")
    amend(tmp_path / "linear", recipe=Recipe("eager"))
    with pytest.raises(BadConfig, match="needs torch"):
        packed(tmp_path)
    amend(tmp_path / "linear", recipe=Recipe("aoti"))
    with pytest.raises((WrongMachine, BadConfig)):
        packed(tmp_path)
    amend(tmp_path / "linear", recipe=Recipe("onnxruntime"), name="x; reboot")
    with pytest.raises(BadConfig, match="is not a name"):
        packed(tmp_path)


@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
def test_every_package_of_the_base_install_has_wheels(tmp_path: Path, registry: None, machine: str) -> None:
    wheels.download(wheels.base(), machine=machine, python="3.13", to=tmp_path)
    found = {wheel.name.split("-")[0].replace("_", "-").lower() for wheel in tmp_path.iterdir()}
    assert found >= {name.replace("_", "-").lower() for name in wheels.base()}
    assert not [name for name in found if name == "torch"]


def test_a_package_without_wheels_is_told(tmp_path: Path, registry: None) -> None:
    with pytest.raises(BuildFailed, match=r"no wheels for aarch64 .*numpy"):
        wheels.download(["numpy==0.0.1"], machine="aarch64", python="3.13", to=tmp_path)


@pytest.mark.skipif(hardware.here().machine != "x86_64", reason="a pack for this processor")
def test_the_whole_way_from_a_pack_to_an_answer(tmp_path: Path, registry: None) -> None:
    linear(tmp_path / "linear")
    file = tmp_path / "all.tar"
    torchship("edge", "pack", f"{tmp_path}/linear", "--target", "x86-64", "-o", file)
    said = json.loads(torchship("edge", "try", file, "--trust", "--json").output)
    assert (said["compared"], said["artifact"]) == (True, "linear")
    # by a Python that is given, as for another processor
    words = ("edge", "try", file, "--trust", "--emulator", sys.executable, "--json")
    assert json.loads(torchship(*words).output)["compared"]
    # another pack of the same wheels, whose artifact answers otherwise than it says
    found, _ = edge.unpack(file, to=tmp_path / "out")
    inner = open_artifact(tmp_path / "out" / "artifact")
    fields = ("name", "signature", "recipe", "provenance")
    kept = {field: getattr(inner.manifest, field) for field in fields}
    pack(inner.path, **kept, inputs=inner.inputs(), outputs={"y": inner.outputs()["y"] * 2})
    amended(tmp_path / "out", found)
    with pytest.raises(WrongMachine, match="answers its stored examples differently"):
        torchship("edge", "try", repacked(tmp_path / "out", tmp_path / "wrong.tar"), "--trust")


def amended(root: Path, found: edge.EdgePack) -> None:
    """Write the manifest of a pack anew, over the files that are there now."""
    (root / MANIFEST).unlink()
    entries = edge.entries(root, open_artifact(root / "artifact", verify=False))
    (root / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(found, files=entries)))


def test_a_server_that_dies_of_a_library_names_it(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "standin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import os\nos.kill(os.getpid(), 4)\n")
    (tmp_path / "pack").mkdir()
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package.parent)!r}); import standin"]
    told = "killed by SIGILL: standin was built for a newer processor"
    with pytest.raises(Unavailable, match=told), edge_command._serving(tmp_path, words):
        pass
