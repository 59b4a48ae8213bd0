"""`torchship edge`: one archive that brings an artifact to a small machine, tried here as it will run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click

from torchship import hardware, process
from torchship.artifact import Artifact, Store, archive, edge, open_artifact, pulling, recheck, signing, wheels
from torchship.artifact.edge import TARGETS, EdgePack
from torchship.cli import _shown
from torchship.errors import Unavailable, UnsafeArtifact, WrongMachine

_json = click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON to stdout.")
_OPEN_S = 300.0


@click.group(
    epilog="""\b
Examples:
  torchship edge pack resnet18 --target pi4 --sign my.key -o resnet18-pi4.tar
  torchship edge pack resnet18 --target x86-64 -o here.tar && torchship edge try here.tar --trust
  torchship edge update https://models.example.org/resnet18.tar --server http://127.0.0.1:8000
"""
)
def command() -> None:
    """Bring an artifact to a small machine: one archive that installs there without a network."""


@command.command()
@click.argument("target", metavar="ARTIFACT")
@click.option("--target", "machine", required=True, type=click.Choice(list(TARGETS)), help="What it will run on.")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), metavar="FILE", help="A .tar or .zip.")
@click.option("--python", metavar="3.X", help="The Python there: 3.11 on Raspberry Pi OS 12, 3.13 on 13.  "
              "[default: 3.13 for a Pi, else this one's]")  # fmt: skip
@click.option("--wheels/--no-wheels", default=True, help="Put all Python packages in, or only their versions.")
@click.option("--sign", "key", type=click.Path(dir_okay=False, path_type=Path), metavar="KEY",
              help="Sign it with this private key, as `store keygen` wrote it.")  # fmt: skip
@click.option("--store", default=None, metavar="DIR", help="Where names are looked up.")
@_json
def pack(
    *, target: str, machine: Literal["pi4", "pi5", "x86-64"], output: str, python: str | None, wheels: bool,
    key: Path | None, store: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Write ARTIFACT (a name in the store, or a folder) with all that serves it to one archive.

    Inside: the artifact, wheels for the target, config.toml (loopback only), torchship.service for systemd, a README
    of three lines, and a manifest with the hash of every file. Equal contents give an equal archive.
    """
    if key:
        signing.need_library()
    archive.check_suffix(Path(output))
    version = python or (f"3.{sys.version_info.minor}" if machine == "x86-64" else "3.13")
    if not re.fullmatch(r"3\.\d+", version):
        raise click.UsageError(f"--python {version}: give it as 3.13")
    artifact = open_artifact(Store(store).resolve(target))
    found = edge.pack(artifact, target=machine, python=version, to=output, with_wheels=wheels, key=key)
    size = Path(output).stat().st_size
    if as_json:
        _shown.print_json({"file": output, "bytes": size, "signed": bool(key), "pack": found})
        return
    click.echo(f"wrote {output} ({_shown.human_size(size)}) for {machine} with Python {version}")


@command.command(name="try")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--key", default=None, type=click.Path(dir_okay=False), help="The only public key to trust.")
@click.option("--trust", is_flag=True, help="Run it whoever signed it, or nobody: only if you know who made it.")
@click.option(
    "--emulator",
    default=None,
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    metavar="PYTHON",
    help="For a pack of another processor: a Python of that kind that runs here, as `make edge` makes.",
)
@_json
def try_(*, file: str, key: str | None, trust: bool, emulator: Path | None, as_json: bool) -> None:
    """Check a pack, install it into an empty folder without a network, serve it, and compare one answer.

    A pack for another processor runs here by an --emulator alone: without one this says what is needed.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torchship-try-") as place:
        root = Path(place) / "pack"
        found, digest = edge.unpack(file, to=root)
        who = "" if trust and not key else _signer(root, digest, key)
        if not emulator:
            _fits(found, file)
        artifact = open_artifact(root / "artifact")
        program = _emulated(Path(place), found, emulator) if emulator else _install(Path(place), found)
        compared = _answers(Path(place), program, artifact)
    seconds = time.monotonic() - started
    if as_json:
        facts = {"file": file, "signed_by": who, "artifact": found.artifact, "compared": compared, "seconds": seconds}
        _shown.print_json(facts)
        return
    what = "answers as stored" if compared else "is ready (it has no stored examples to compare)"
    click.echo(f"{found.artifact} installed offline and {what}, in {seconds:.0f} s")


def _signer(root: Path, digest: str, key: str | None) -> str:
    signing.need_library()
    try:
        return signing.check(root, digest=digest, key=signing.read_public(Path(key)) if key else "")
    except UnsafeArtifact as fault:
        hint = "pack it with --sign, trust its key as `store keygen` says, or pass --trust if you made it"
        raise UnsafeArtifact(str(fault).replace(str(root), "the pack"), hint=hint) from None


def _fits(found: EdgePack, file: str) -> None:
    here = hardware.here().machine
    if found.machine != here:
        raise WrongMachine(
            f"{file} is for {found.machine}, this machine is {here}: its files are as listed, it was not run",
            hint=f"run this on a {found.target}, or here with --emulator (`make edge` in a checkout makes one)",
        )


def _emulated(place: Path, found: EdgePack, python: Path) -> list[str]:
    """The `torchship` of what the pack brings, run by a Python of the pack's processor."""
    wheels.install(
        found.install, folder=place / "pack", machine=found.machine, python=found.python, to=place / "packages"
    )
    return [str(python.absolute()), "-m", "torchship"]


def _install(place: Path, found: EdgePack) -> list[str]:
    """The `torchship` of a new environment that holds nothing but what the pack brings."""
    python = sys.executable if found.python == f"3.{sys.version_info.minor}" else shutil.which(f"python{found.python}")
    if not python:
        raise Unavailable(
            f"the pack needs Python {found.python}", hint=f"install python{found.python}, or pack with --python"
        )
    made, programs = place / "venv", place / "venv" / "bin"
    _run([python, "-m", "venv", str(made)], place, "the environment cannot be made")
    _run([str(programs / "pip"), "install", "--quiet", *found.install], place, "the pack does not install")
    return [str(programs / "torchship")]


def _run(words: list[str], place: Path, what: str) -> None:
    done = subprocess.run(
        words, cwd=place / "pack", env=_clean(place), capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        raise Unavailable(f"{what}: {(done.stderr or done.stdout).strip()[-400:]}", hint="make the pack again")


def _clean(place: Path) -> dict[str, str]:
    """The environment of a fresh machine: no packages and no settings of this user."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(place),
        "LANG": "C.UTF-8",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(place / "packages"),  # where they are not in an environment
    }


def _answers(place: Path, program: list[str], artifact: Artifact) -> bool:
    """Serve the artifact and compare its answer to a stored example; False where it has none. Raises WrongMachine."""
    from torchship.client import Client

    manifest, store = artifact.manifest, str(place / "store")
    _run([*program, "store", "--store", store, "publish", "artifact", "--name", manifest.name], place, "not published")
    rows: Any = slice(0, 1) if manifest.signature.batched else ...
    inputs = {name: array[rows] for name, array in artifact.inputs().items()}
    outputs = {name: array[rows] for name, array in artifact.outputs().items()}
    words = [*program, "serve", "config.toml", "--store", store, "--http-port", "0"]
    with _serving(place, words) as url, Client(url) as client:
        if not inputs or not outputs:
            return False
        recheck.same(manifest, outputs, client.infer(manifest.name, inputs, timeout=_OPEN_S))
    return True


@contextmanager
def _serving(place: Path, words: list[str]) -> Iterator[str]:
    """The address of a server while it runs. Raises Unavailable with the end of its log when it does not start."""
    log = place / "log"
    with open(log, "wb") as file:
        server = subprocess.Popen(words, cwd=place / "pack", env=_clean(place), stdout=file, stderr=file)
    try:
        end = time.monotonic() + _OPEN_S
        while not (found := re.search(r" at (https?://\S+)/v2/models/", log.read_text(errors="replace"))):
            if server.poll() is not None or time.monotonic() > end:
                text, code = log.read_text(errors="replace"), server.poll() or 0
                how = f"{process.explain_crash(process.describe_exit(code), text)}: " if code < 0 else ""
                raise Unavailable(f"the server did not start: {how}{text.strip()[-400:]}")
            time.sleep(0.05)
        yield found[1]
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@command.command()
@click.argument("source", metavar="FOLDER|FILE|https://URL")
@click.option("--name", default=None, help="The name to publish under.  [default: the artifact's own]")
@click.option("--store", default=None, metavar="DIR", help="The store of the server that is to serve it.")
@click.option("--key", default=None, type=click.Path(dir_okay=False), help="The only public key to trust.")
@click.option("--server", default="", metavar="URL", help="A server that watches the store: unless it serves the new "
              "version within --wait seconds, the old one is made current again.")  # fmt: skip
@click.option("--wait", default=60.0, show_default=True, help="Seconds to wait for --server.")
@_json
def update(
    *, source: str, name: str | None, store: str | None, key: str | None, server: str, wait: float, as_json: bool
) -> None:
    """Publish a new version of an artifact, if a trusted key signed it and it answers as stored here.

    SOURCE is a folder, an archive as `store export` writes it, or an https URL of one. It is opened in a fresh process
    first; whatever fails, and wherever the power is cut, the version that was current stays so.
    """
    signing.need_library()
    shelf = Store(store)
    with pulling.pulled(source) as artifact:
        public = signing.read_public(Path(key)) if key else ""
        who = signing.check(artifact.path, digest=artifact.digest, key=public)
        given = name or artifact.manifest.name
        before = shelf.current(given) if shelf.versions(given) else 0
        old = open_artifact(shelf.resolve(given), verify=False).digest if before else ""
        version = before
        if old != artifact.digest:
            outcome = process.run("torchship.cli.edge:answers_here", argument=str(artifact.path), timeout=600.0)
            if outcome.fault:
                raise WrongMachine(f"{source} does not run here: {outcome.fault}", hint=f"{given} is as it was")
            version = shelf.publish(artifact.path, name=given)
    if server and version != before:
        _served_or_back(shelf, given, version=version, before=before, server=server, wait=wait)
    if as_json:
        _shown.print_json({"name": given, "version": version, "before": before, "signed_by": who})
    elif version == before:
        click.echo(f"{given}@{version} is this already")
    else:
        click.echo(f"published {given}@{version}, signed by {who}")


def answers_here(folder: str) -> None:
    """Open an artifact, whose signature was checked, and compare its answers. Raises WrongMachine."""
    from torchship.pipeline import open_target

    artifact = open_artifact(Path(folder))
    stage = open_target(artifact, trust=True)
    recheck.check(stage, artifact.manifest, inputs=artifact.inputs(), outputs=artifact.outputs())
    stage.close()


def _served_or_back(shelf: Store, name: str, *, version: int, before: int, server: str, wait: float) -> None:
    from torchship.client import Client

    end = time.monotonic() + wait
    with Client(server) as client:
        while not client.ready(name, str(version)):
            if time.monotonic() > end:
                back = f"{name}@{before} is current again" if before else "there was no version before"
                if before:
                    shelf.set_current(name, version=before)
                raise Unavailable(
                    f"{server} does not serve {name}@{version} after {wait:g} s: {back}",
                    hint="see the server's log; it must watch this store: [store] watch = 5",
                )
            time.sleep(0.2)
