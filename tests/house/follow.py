"""Follows documents as a reader would, in a fresh process: runs their Python, has their TOML checked.

`python -m tests.house.follow WORLD DOCUMENT...` with WORLD an empty folder. A block that begins with `# name.py` is
also written to that file, and TOML of the same document may name it.
"""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import traceback
import urllib.request
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from tests.house.documents import ROOT, Block, blocks

PORT = "127.0.0.1:8000"


def main() -> None:
    world, *documents = sys.argv[1:]
    os.chdir(world)
    os.environ |= {"TORCHSHIP_STORE": f"{world}/store", "TORCHSHIP_CACHE": f"{world}/cache", "HOME": world}
    sys.path.insert(0, world)
    furnish(Path(world))
    faults = [fault for name in documents for fault in follow(ROOT / name)]
    print("\n".join(faults))
    sys.exit(bool(faults))


def follow(path: Path) -> list[str]:
    """What goes wrong in one document."""
    found = blocks(path, "python", "toml")
    faults: list[str] = []
    space: dict[str, Any] = {"__name__": "__main__"}
    with served(any(PORT in block.text for block in found if block.language == "python")) as place:
        for block in found:
            try:
                with redirect_stdout(io.StringIO()):
                    run(block, space, place) if block.language == "python" else check(block)
            except Exception as fault:
                words = "".join(traceback.format_exception_only(fault)).strip()
                faults.append(f"{path.name}:{block.line}: {words} {getattr(fault, 'hint', '')}")
    return faults


def run(block: Block, space: dict[str, Any], place: str) -> None:
    """Run Python; names live on to the next block of the document."""
    text = block.text.replace(PORT, place)
    if named := re.match(r"# (\w+\.py)\n", text):
        Path(named[1]).write_text(text)
    if "torchship.optimize(" in text:
        hurry()
    exec(compile(text, f"line {block.line}", "exec"), space)


def hurry() -> None:
    """Searches race nothing but eager, measured for a moment, in this process: the document is on trial here."""
    import torch

    from torchship import process
    from torchship.optimize import search
    from torchship.optimize.measure import Effort
    from torchship.recipe import Recipe

    torch.manual_seed(0)
    if search.optimize.__name__ == "hurried":
        return
    whole = search.optimize

    def hurried(*given: Any, **options: Any) -> Any:
        effort = Effort(seconds=0.02, warm_up=0.02, max_batch=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return whole(*given, **{"recipes": [Recipe("eager")], "effort": effort, "threads": 1, **options})

    def at_hand(target: str, *, argument: object = None, **_: Any) -> process.Outcome:
        return process.Outcome(process.resolve(target)(argument))

    search.optimize = hurried
    process.run = at_hand


def check(block: Block) -> None:
    """Have a server's configuration, a pipeline or recipes checked as the command line would."""
    from torchship.optimize.targets import recipes_at
    from torchship.pipeline import config as pipelines
    from torchship.pipeline import plan
    from torchship.serve import config as servers

    data = tomllib.loads(block.text)
    file = Path("block.toml")
    file.write_text(block.text)
    if "recipe" in data:
        from torchship import plugins

        for recipe in recipes_at(str(file)):
            plugins.load("backends", name=recipe.backend)
            for step in recipe.transforms:
                plugins.load("transforms", name=step.transform)
    elif "stages" in data:
        plan(pipelines.read(file))
    else:
        for model in servers.read(file).model:
            plan(model.pipeline())


@contextmanager
def served(wanted: bool) -> Any:
    """A server of the store's models where the document asks one; its address."""
    if not wanted:
        yield PORT
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    words = [sys.executable, "-m", "torchship", "serve", "resnet18", "--http-port", place[10:], "--log-level", "error"]
    server = subprocess.Popen(words)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://{place}/v2/health/ready", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.1)
        yield place
    finally:
        server.terminate()
        server.wait(30)


def furnish(world: Path) -> None:
    """What the documents take for granted: published models, a picture, a file of names."""
    import numpy as np
    from PIL import Image

    from tests.unit.artifact.made import PROVENANCE, write_onnx
    from torchship.artifact import Store
    from torchship.artifact.package import pack
    from torchship.recipe import Recipe
    from torchship.tensors import Signature

    store = Store()
    shapes = {
        "efficientnet_lite0": ("image:FP32[-1,3,224,224] -> output:FP32[-1,1000]", 1000),
        "resnet18": ("image:FP32[-1,3,224,224] -> output:FP32[-1,1000]", 1000),
        "detector": ("image:FP32[1,3,640,640] -> output:FP32[1,100,84]", 0),
    }
    for name, (text, classes) in shapes.items():
        import onnx

        signature = Signature.parse(text, batched=bool(classes))
        shape = [[str(axis) if axis < 0 else axis for axis in spec.wire_shape] for spec in signature.outputs]
        nodes = [
            onnx.helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
            onnx.helper.make_node("MatMul", ["mean", "weight"], ["output"]),
        ]
        folder = world / "made" / name
        write_onnx(
            folder / "backend" / "model.onnx",
            nodes,
            inputs={"image": ["rows", *signature.inputs[0].wire_shape[1:]]},
            outputs={"output": shape[0]},
            axes=np.array([2, 3], np.int64),
            weight=np.ones((3, classes or 1), np.float32),
        )
        facts = {"name": name, "signature": signature, "recipe": Recipe("onnxruntime"), "provenance": PROVENANCE}
        pack(folder, **facts, max_batch=64 if classes else 1)  # type: ignore[arg-type]
        for _ in range(3):
            store.publish(folder, name=name)
    Image.new("RGB", (64, 48), "orange").save(world / "cat.png")
    (world / "coco.names").write_text("person\nbicycle\n")


if __name__ == "__main__":
    main()
