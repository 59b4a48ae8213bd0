"""MobileNetV3-Large served on an emulated Raspberry Pi 4 (Cortex-A72): does it run, is it right, what memory it takes.

    make edge            or python -m benchmarks.edge

Builds, once, an aarch64 root out of Debian's packages and the locked wheels of `torchship edge pack --target pi4`,
which pip installs offline; serves the packed artifact over REST in there, by qemu's user emulation; asks with 1 and 8
rows from outside, and compares with the same artifact opened here. MB are those of all processes; what qemu takes for
itself (its program, its heap, the code that it translates) is told apart. Time under emulation says nothing about a
Pi: it is not shown.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import psutil

from benchmarks import memory, peers
from benchmarks.peers import Missing
from torchship import process
from torchship.artifact import edge, open_artifact, wheels
from torchship.client import Client
from torchship.errors import TorchshipError

CACHE = peers.CACHE / "a72"
PYTHON = "3.11"  # of Debian 12
PACKAGES = (
    *("libc6", "libgcc-s1", "libstdc++6", "libgomp1", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0"),
    *("liblzma5", "libsqlite3-0", "libuuid1", "libncursesw6", "libtinfo6", "libcrypt1", "libdb5.3", "libreadline8"),
    *(f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", f"python{PYTHON}-minimal"),
)
CORES = 4
# what a Pi 4 says of itself; libraries look there for what the processor can do
CPUINFO = """\
processor\t: {core}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
# a child is started by the host's kernel, which does not know aarch64: it gets a script that does
CUSTOMIZE = "import os, sys\nsys.executable = os.environ.get('EMULATED_PYTHON') or sys.executable\n"
MODELS = {"onnxruntime int8": "int8", "ncnn fp16": "ncnn"}
_PATIENCE = 600.0


class Peak(NamedTuple):
    """The most that all processes held, in MB, and how much of it was qemu's own."""

    held: float
    emulator: float


def pi_files() -> dict[str, str]:
    """What /proc and /sys of a Pi 4 hold that libraries read, by path below the root."""
    cores = f"0-{CORES - 1}\n"
    files = {f"sys/devices/system/cpu/{name}": cores for name in ("possible", "present", "online")}
    files["proc/cpuinfo"] = "".join(CPUINFO.format(core=core) for core in range(CORES))
    for core in range(CORES):
        place = f"sys/devices/system/cpu/cpu{core}"
        files[f"{place}/regs/identification/midr_el1"] = "0x00000000410fd083\n"
        files[f"{place}/topology/core_id"] = f"{core}\n"
        files[f"{place}/cpufreq/cpuinfo_max_freq"] = "1500000\n"
    return files


def run(words: Sequence[str | Path], *, cwd: Path | None = None) -> None:
    """Run a command to its end. Raises Missing with what it said when it fails."""
    try:
        done = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as fault:
        raise Missing(f"{words[0]}: {fault.strerror}; this needs Debian 12's apt-get and dpkg-deb") from None
    if done.returncode:
        raise Missing(f"{' '.join(map(str, words[:3]))} ...: {(done.stderr or done.stdout).strip()[-300:]}")


def emulator() -> Path:
    """qemu-aarch64-static, out of Debian's package; it is not installed. Raises Missing."""
    found = CACHE / "qemu" / "usr" / "bin" / "qemu-aarch64-static"
    if not found.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as place:
            run(["apt-get", "download", "qemu-user-static"], cwd=Path(place))
            run(["dpkg-deb", "-x", next(Path(place).glob("*.deb")), Path(place) / "qemu"])
            shutil.move(Path(place) / "qemu", CACHE / "qemu")
    return found


def system() -> Path:
    """The root with Debian's Python for arm64 and its libraries. Raises Missing."""
    root = CACHE / "root"
    if root.exists():
        return root
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        lists, debs, made = (Path(place) / name for name in ("lists", "debs", "root"))
        (lists / "partial").mkdir(parents=True)
        debs.mkdir()
        apt = [
            "apt-get",
            "-qq",
            "-oAPT::Architecture=arm64",
            "-oAPT::Architectures=arm64",
            f"-oDir::State::Lists={lists}",
        ]
        run([*apt, "update"])
        run([*apt, "download", *PACKAGES], cwd=debs)
        for deb in sorted(debs.glob("*.deb")):
            run(["dpkg-deb", "-x", deb, made])
        (made / "usr" / "lib" / f"python{PYTHON}" / "sitecustomize.py").write_text(CUSTOMIZE)
        for path, text in pi_files().items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_text(text)
        compiled(made / "usr" / "lib" / f"python{PYTHON}", root=made)
        made.rename(root)
    return root


def compiled(folder: Path, *, root: Path) -> None:
    """Byte code beside all modules, as dpkg and pip leave it: without it each start compiles, which takes memory."""
    python: list[str | Path] = [emulator(), "-cpu", "cortex-a72", "-L", root, root / "usr" / "bin" / f"python{PYTHON}"]
    # some packages hold files for newer Pythons, which pip passes over, too
    subprocess.run([*python, "-m", "compileall", "-qq", folder], check=False)


def installed(artifact: Path, folder: Path) -> Path:
    """The folder of packages that an edge pack of `artifact` installs offline, for aarch64. Raises TorchshipError."""
    pack, site = folder / "pack.tar", folder / "packages"
    edge.pack(open_artifact(artifact), target="pi4", python=PYTHON, to=pack)
    found, _ = edge.unpack(pack, to=folder / "pack")
    wheels.install(found.install, folder=folder / "pack", machine=found.machine, python=PYTHON, to=site)
    compiled(site, root=system())
    return site


def emulated() -> Path:
    """A script that is Python on the emulated machine, made once."""
    root, qemu, script = system(), emulator(), CACHE / "python"
    interpreter = root / "usr" / "bin" / f"python{PYTHON}"
    script.write_text(
        f'#!/bin/sh\nexport EMULATED_PYTHON={script}\nexec {qemu} -cpu cortex-a72 -L {root} {interpreter} "$@"\n'
    )
    script.chmod(0o755)
    return script


def emulation(pid: int) -> float:
    """MB that qemu itself takes in a process and its children: its program (once), its heap, the code it translates.

    The heap of what is emulated is another mapping; what is written and executed is qemu's alone.
    """
    own, program = 0, 0
    try:
        for one in (top := psutil.Process(pid), *top.children(recursive=True)):
            kind = ""
            pages = 0
            for line in Path(f"/proc/{one.pid}/smaps").read_text().splitlines():
                words = line.split()
                if not words[0].endswith(":"):  # address, rights, offset, device, inode, path
                    path = words[5] if len(words) > 5 else ""
                    kind = "own" if path == "[heap]" or (words[1].startswith("rwx") and not path) else ""
                    kind = "program" if path.endswith("/qemu-aarch64-static") else kind
                elif words[0] == "Pss:" and kind == "own":
                    own += int(words[1])
                elif words[0] == "Rss:" and kind == "program":
                    pages += int(words[1])
            program = max(program, pages)
    except (psutil.Error, OSError):
        return 0.0
    return (own + program) * 1024 / 1e6


@contextmanager
def watched(words: Sequence[str | Path], log: Path, **environment: str) -> Iterator[list[Peak]]:
    """A server under observation; the one item of the list is its peak so far."""
    with log.open("wb") as out:
        env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        child = subprocess.Popen(list(map(str, words)), stdout=out, stderr=out, env=env)
        found = [Peak(0, 0)]
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.2):
                found[0] = max(found[0], Peak(process.held(child.pid) / 1e6, emulation(child.pid)))

        looking = threading.Thread(target=look)
        looking.start()
        try:
            yield found
        finally:
            done.set()
            looking.join()
            child.terminate()
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()


def await_port(port: int) -> None:
    """Return once the server is ready. Raises TimeoutError."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            caller = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            caller.request("GET", "/v2/models/m/ready")
            if caller.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"not ready after {_PATIENCE:.0f} s")


def served(artifact: Path, folder: Path, *, packages: Path, one_process: bool) -> dict[int, tuple[Peak, float]]:
    """For 1, then 8 rows the server's peak, and how far its answers are from those of this machine, relative to them.

    Raises Missing where it does not answer.
    """
    port, config, log = memory.free_port(), folder / "serve.toml", folder / "log"
    most = 1 if one_process else 8
    text = memory.OURS.format(one=str(one_process).lower(), port=port, artifact=artifact, most=most)
    config.write_text(f"{text}open_timeout = {_PATIENCE}\n")
    told = dict[int, tuple[Peak, float]]()
    here = open_artifact(artifact).open(trust=True)
    try:
        words: list[str | Path] = [emulated(), "-m", "torchship", "serve", config, "--log-level", "warning"]
        with watched(words, log, PYTHONPATH=str(packages), PYTHONDONTWRITEBYTECODE="1") as found:
            await_port(port)
            client = Client(f"http://127.0.0.1:{port}", timeout=_PATIENCE)
            for count in memory.ROWS:
                x = np.random.default_rng(count).standard_normal((count, *memory.SHAPE)).astype(np.float32)
                wanted, given = here({"x": x}), client.infer("m", {"x": x})
                name = next(iter(wanted))
                error = np.linalg.norm(given[name] - wanted[name]) / np.linalg.norm(wanted[name])
                time.sleep(1)
                told[count] = found[0], float(error)
            client.close()
    except (OSError, TorchshipError) as fault:
        said = log.read_text(errors="replace").strip()[-600:] if log.exists() else ""
        raise Missing(f"{type(fault).__name__}: {fault}; the server said: {said}") from fault
    finally:
        here.close()
    return told


@click.command(help="Serve MobileNetV3-Large on an emulated Cortex-A72, compare its answers, measure its memory.")
@click.option("--again", is_flag=True, help="Build the aarch64 root anew.")
def main(again: bool) -> None:
    if again:
        shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    artifacts = memory.files()
    print(
        "MobileNetV3-Large, 224x224, served over REST inside qemu-aarch64 -cpu cortex-a72; MB of all processes together"
    )
    print(f"{'':44} {'b1 MB':>8} {'of it qemu':>12} {'b8 MB':>8} {'of it qemu':>12} {'b1 apart':>10} {'b8 apart':>10}")
    best: tuple[float, ...] = ()
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        for title, name in MODELS.items():
            folder = Path(place) / name
            folder.mkdir()
            for one_process in (True, False):
                row = f"{title}, {'one process, a row at a time' if one_process else 'two processes, 8 rows'}"
                try:
                    packages = folder / "packages"
                    packages = packages if packages.exists() else installed(artifacts / name, folder)
                    told = served(artifacts / name, folder, packages=packages, one_process=one_process)
                except (Missing, TorchshipError) as fault:
                    print(f"{row:44} {fault}", flush=True)
                    continue
                peaks = " ".join(f"{peak.held:8.1f} {peak.emulator:12.1f}" for peak, _ in told.values())
                print(f"{row:44} {peaks} " + " ".join(f"{apart:10.1e}" for _, apart in told.values()), flush=True)
                worst = max(worst, *(apart for _, apart in told.values()))
                own = tuple(peak.held - peak.emulator for peak, _ in told.values())
                best = min(best or own, own)
    if not best:
        raise click.ClickException("nothing was served")
    print(f"a pack for it runs here: torchship edge try PACK --emulator {emulated()}")
    print(f"a72_b1_mb={best[0]:.1f} a72_b8_mb={best[1]:.1f} worst_apart={worst:.1e}")


if __name__ == "__main__":
    main()
