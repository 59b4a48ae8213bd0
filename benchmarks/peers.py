"""Other people's servers for `benchmarks.serve`: each is installed into an environment of its own and serves one MLP.

Environments live under ~/.cache/torchship/bench and are made once. The model is the same everywhere: numpy,
16-256-256-10, batched where the server can.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

CACHE = Path.home() / ".cache" / "torchship" / "bench"
DEBIAN = "/usr/bin/python3.11"

MLP = """
import numpy as np
_random = np.random.default_rng(0)
WEIGHTS = [_random.standard_normal(shape).astype(np.float32) / 8 for shape in ((16, 256), (256, 256), (256, 10))]

def mlp(x):
    h = np.maximum(x @ WEIGHTS[0], 0)
    h = np.maximum(h @ WEIGHTS[1], 0)
    return h @ WEIGHTS[2]
"""
FASTAPI = """
import numpy as np
from fastapi import FastAPI, Request
from mlp import mlp

app = FastAPI()

@app.post("/v2/models/mlp/infer")
async def infer(request: Request):
    body = await request.json()
    given = body["inputs"][0]
    x = np.asarray(given["data"], np.float32).reshape(given["shape"])
    y = mlp(x)
    return {"model_name": "mlp", "outputs": [
        {"name": "y", "datatype": "FP32", "shape": list(y.shape), "data": y.ravel().tolist()}]}

@app.get("/v2/health/ready")
async def ready():
    return {"ready": True}
"""
LITSERVE = """
import sys
import numpy as np
import litserve
from mlp import mlp

class Api(litserve.LitAPI):
    def setup(self, device):
        pass
    def decode_request(self, request):
        given = request["inputs"][0]
        return np.asarray(given["data"], np.float32).reshape(given["shape"])
    def batch(self, inputs):
        return np.concatenate(inputs)
    def predict(self, x):
        return mlp(x)
    def unbatch(self, output):
        return [row[None] for row in output]
    def encode_response(self, y):
        return {"outputs": [{"name": "y", "datatype": "FP32", "shape": list(y.shape), "data": y.ravel().tolist()}]}

if __name__ == "__main__":
    api = Api(max_batch_size=32, batch_timeout=0.0, api_path="/v2/models/mlp/infer")
    server = litserve.LitServer(api, accelerator="cpu", healthcheck_path="/v2/health/ready")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
"""
TRITON = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np
import triton_python_backend_utils as pb_utils
from mlp import mlp

class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        y = mlp(np.concatenate(inputs))
        answers, at = [], 0
        for x in inputs:
            rows = y[at : at + len(x)]
            at += len(x)
            tensor = pb_utils.Tensor("y", np.ascontiguousarray(rows))
            answers.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
        return answers
"""
TRITON_CONFIG = """
name: "mlp"
backend: "python"
max_batch_size: 64
input [{ name: "x" data_type: TYPE_FP32 dims: [16] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [10] }]
instance_group [{ kind: KIND_CPU count: 1 }]
dynamic_batching { }
"""


@dataclass(frozen=True)
class Peer:
    """A server that can be started; `grpc_port` is 0 where it has none."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    folder: Path = CACHE
    binary: bool = False
    grpc_port: int = 0


class Missing(Exception):
    """A peer that cannot be had here, and why."""


def environment(name: str, *packages: str, python: str = sys.executable) -> Path:
    """The interpreter of an environment with these packages, made if it is not there. Raises Missing."""
    home = CACHE / name
    done = home / ".done"
    if not done.exists():
        uv = [sys.executable, "-m", "uv"]
        shutil.rmtree(home, ignore_errors=True)
        print(f"installing {' '.join(packages)} into {home}", file=sys.stderr)
        for command in (
            [*uv, "venv", "--quiet", "--python", python, str(home)],
            [*uv, "pip", "install", "--quiet", "--python", str(home / "bin/python"), *packages],
        ):
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
            except (OSError, subprocess.SubprocessError) as fault:
                raise Missing(f"{name}: {getattr(fault, 'stderr', '') or fault}"[:200]) from None
        done.touch()
    return home / "bin/python"


def _files(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def fastapi(port: int) -> Peer:
    """FastAPI on uvicorn with uvloop and httptools, one process, async def."""
    python = environment("fastapi", "fastapi", "uvicorn[standard]", "numpy")
    folder = _files(CACHE / "apps", mlp=MLP, fast=FASTAPI)
    words = [str(python), "-m", "uvicorn", "fast:app", "--port", str(port), "--log-level", "warning"]
    return Peer("FastAPI + uvicorn", [*words, "--no-access-log"], folder=folder)


def litserve(port: int) -> Peer:
    """LitServe with batches of 32."""
    python = environment("litserve", "litserve==0.2.19", "numpy")
    folder = _files(CACHE / "apps", mlp=MLP, lit=LITSERVE)
    return Peer("LitServe 0.2.19", [str(python), "lit.py", str(port)], folder=folder)


def triton(port: int) -> Peer:
    """Triton 2.51: the binary inside the nvidia-pytriton wheel, Python backend, dynamic batching."""
    if not Path(DEBIAN).exists():
        raise Missing(f"Triton's Python backend needs Debian's {DEBIAN}")
    python = environment("triton", "nvidia-pytriton==0.7.0", "numpy<2", python=DEBIAN)
    site = next((python.parent.parent / "lib").glob("python3.11/site-packages"))
    home = site / "pytriton" / "tritonserver"
    backends = CACHE / "apps" / "triton-backends"
    if not (backends / "python" / "triton_python_backend_stub").exists():
        shutil.copytree(home / "backends" / "python", backends / "python", dirs_exist_ok=True)
        shutil.copy(home / "python_backend_stubs/3.11/triton_python_backend_stub", backends / "python")
    apps = _files(CACHE / "apps", mlp=MLP)
    model = CACHE / "apps" / "triton-models" / "mlp"
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "1" / "model.py").write_text(TRITON.format(folder=str(apps)))
    (model / "config.pbtxt").write_text(TRITON_CONFIG)
    libraries = [str(site / "nvidia_pytriton.libs"), str(home / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    words = [str(home / "bin" / "tritonserver"), f"--model-repository={model.parent}"]
    words += [f"--backend-directory={backends}", "--http-address=127.0.0.1", f"--http-port={port}"]
    words += ["--grpc-address=127.0.0.1", f"--grpc-port={port + 1}", "--allow-metrics=false", "--log-info=false"]
    env = {"LD_LIBRARY_PATH": ":".join(libraries), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    env["PYTHONPATH"] = str(site)
    return Peer("Triton 2.51", words, env=env, binary=True, grpc_port=port + 1)


def h2load() -> Sequence[str]:
    """The command of h2load (Debian nghttp2-client), unpacked beside the peers where it is not installed."""
    found = shutil.which("h2load")
    if found:
        return [found]
    root = CACHE / "h2load" / "root"
    binary = root / "usr/bin/h2load"
    if not binary.exists():
        root.mkdir(parents=True, exist_ok=True)
        packages = ["nghttp2-client", "libnghttp2-14", "libev4", "libc-ares2", "libjemalloc2", "libjansson4"]
        packages += ["libxml2", "libicu72"]
        try:
            subprocess.run(["apt-get", "download", *packages], cwd=root, check=True, capture_output=True, timeout=300)
            for package in root.glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True, timeout=60)
                package.unlink()
        except (OSError, subprocess.SubprocessError) as fault:
            raise Missing(f"h2load: {fault}") from None
    library = next(root.rglob("libnghttp2.so.14")).parent
    return ["env", f"LD_LIBRARY_PATH={library}", str(binary)]
