"""End to end on video: decode, detect every frame, track, embed new tracks; against a plain loop in the same run.

    python -m benchmarks.video [--store DIR] [--seconds 20] [--cameras 1,2,4]

The store holds the detector that `torchship watch prepare` made. The clip is made here: vtest.avi (Debian opencv-doc)
enlarged to 1080p and encoded as H.264, else a moving pattern. The plain loop is what one would write first: OpenCV
decodes and resizes, ONNX Runtime runs the same network in int8 on all cores, and the same functions make boxes and
tracks and embed the same crops of new tracks.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import socket
import time
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import uvloop

from torchship import hardware
from torchship.artifact import Store
from torchship_video import appearance, mount, ring, stages
from torchship_video.config import CameraConfig, convert
from torchship_video.conversation import Conversation
from torchship_video.flow import Flow
from torchship_video.identity.selection import CropChoice
from torchship_video.messages import Frame, Observation
from torchship_video.supervisor import Camera
from torchship_video.tracking import CameraTracker, TrackerOptions

_SCENE = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")
_WIDTH, _HEIGHT, _FRAMES = 1920, 1080, 300


def clip(folder: Path) -> Path:
    """A clip of 1080p, made once."""
    import av

    path = folder / "torchship-1080p.mp4"
    if path.exists():
        return path
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23"}
        if _SCENE.exists():
            with av.open(str(_SCENE)) as scene:
                for number, frame in enumerate(scene.decode(video=0)):
                    if number == _FRAMES:
                        break
                    made = frame.reformat(_WIDTH, _HEIGHT, "yuv420p")
                    made.pts, made.time_base = number, Fraction(1, 25)
                    out.mux(stream.encode(made))
        else:
            for number in range(_FRAMES):
                pixels = np.roll(np.tile(np.arange(_WIDTH, dtype=np.uint8), (_HEIGHT, 1)), number * 4, axis=1)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.repeat(pixels[..., None], 3, 2), format="rgb24")))
        out.mux(stream.encode())
    return path


class Sent(msgspec.Struct, frozen=True):
    """A frame of `handover` by the ring: when its copy into the slot began, and when it was complete there."""

    frame: Frame
    began: float
    complete: float


def send_by_ring(frames: Any, talk: socket.socket) -> None:
    """The decoder's side of `by_ring`: one frame whenever it is told to."""
    picture = np.full((_HEIGHT * 3 // 2, _WIDTH), 7, np.uint8)
    writer = ring.RingWriter.make(size=picture.nbytes)
    try:
        for number in range(int(frames)):
            if not talk.recv(64):
                return
            began = time.monotonic()
            slot = writer.claim()
            assert slot is not None
            slot.pixels(_WIDTH, _HEIGHT, "I420")[:] = picture
            complete = time.monotonic()
            talk.send(msgspec.msgpack.encode(Sent(slot.publish("c", sequence=number), began, complete)))
        talk.recv(64)
    finally:
        writer.close()


async def by_ring(frames: int = 200) -> tuple[float, float]:
    """Seconds until another process has read a row, along the way that frames of a camera take: from when a frame is
    complete in its slot, and from when it is in the decoder's own memory. Medians."""
    handed, copied = [], []
    got = asyncio.Event()

    def take(message: bytes) -> None:
        sent = msgspec.msgpack.decode(message, type=Sent)
        with ring.read(sent.frame) as pixels:
            assert int(pixels[0].sum()) == 7 * _WIDTH
            now = time.monotonic()
        handed.append(now - sent.complete)
        copied.append(now - sent.began)
        got.set()

    talk = Conversation("benchmarks.video:send_by_ring", frames, take=take)
    try:
        for _ in range(frames):
            got.clear()
            talk.send(b"next")
            await got.wait()
    finally:
        talk.close()
    return float(np.median(handed)), float(np.median(copied))


def send_by_queue(talk: Connection, pickled: Any, shared: Any, frames: int) -> None:
    """The decoder's side of `by_queues`."""
    import torch

    picture = np.full((_HEIGHT * 3 // 2, _WIDTH), 7, np.uint8)
    tensor = torch.from_numpy(picture.copy()).share_memory_()
    for _ in range(frames):
        talk.recv_bytes()
        pickled.put((time.monotonic(), picture))
        talk.recv_bytes()
        shared.put((time.monotonic(), tensor))
    talk.recv_bytes()


def by_queues(frames: int = 200) -> tuple[float, float]:
    """Seconds from a complete frame until another process has read a row: of an array through a queue of
    `multiprocessing`, and of a tensor that is in shared memory through one of `torch.multiprocessing`. Medians."""
    import torch.multiprocessing

    context = multiprocessing.get_context("spawn")
    talk, theirs = context.Pipe()
    queues = (context.Queue(), torch.multiprocessing.get_context("spawn").Queue())
    child = context.Process(target=send_by_queue, args=(theirs, *queues, frames))
    child.start()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(frames):
        for queue, found in zip(queues, seconds, strict=True):
            talk.send_bytes(b"next")
            complete, got = queue.get()
            assert int(np.asarray(got)[0].sum()) == 7 * _WIDTH
            found.append(time.monotonic() - complete)
    talk.send_bytes(b"end")
    child.join()
    pickled, shared = (float(np.median(found)) for found in seconds)
    return pickled, shared


async def decoding(video: Path, *, seconds: float) -> float:
    """Frames for each second of CPU time of a source's process, the way into the ring included."""
    count = 0

    def counted(_: Frame) -> None:
        nonlocal count
        count += 1

    camera = Camera(CameraConfig(name="c", source=str(video), loop=True), on_frame=counted)
    task = asyncio.ensure_future(camera.run())
    try:
        while count < 10:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        before, spent = count, _cpu_seconds(camera.pid)
        await asyncio.sleep(seconds)
        return (count - before) / (_cpu_seconds(camera.pid) - spent)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _cpu_seconds(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def quantized(folder: Path) -> Path:
    """YOLOv3-tiny for the plain loop: exported to ONNX, and quantized by ONNX Runtime's own tool on street frames.

    Made once: U8S8, QDQ, a scale for each channel, which is what its documentation advises for VNNI.
    """
    import torch
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from torchship_video import detector, weights

    path = folder / "torchship-plain-yolov3-tiny-int8.onnx"
    if path.exists():
        return path
    frames = iter(detector.squares(weights.fetch("bikes.mp4"), most=32))

    class Frames(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            pixels = next(frames, None)
            return None if pixels is None else {"pixels": pixels[None]}

    with TemporaryDirectory(dir=folder) as scratch:
        exported, prepared, made = (Path(scratch) / f"{name}.onnx" for name in ("exported", "prepared", "made"))
        example = torch.zeros(1, stages.SIDE, stages.SIDE, 3, dtype=torch.uint8)
        names = ["map0", "map1"]
        torch.onnx.export(
            detector.network(), (example,), str(exported), dynamo=False, input_names=["pixels"], output_names=names
        )
        quant_pre_process(str(exported), str(prepared))
        quantization.quantize_static(str(prepared), str(made), Frames(), per_channel=True)
        made.rename(path)
    return path


def plain_loop(video: Path, model: Path, *, seconds: float) -> float:
    """Frames a second of one camera in a loop, as one would write it first."""
    import cv2
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = hardware.cores()
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    boxes, tracker, choice = stages.Boxes(labels=["person"]), CameraTracker(TrackerOptions()), CropChoice()
    capture = cv2.VideoCapture(str(video))
    scale = stages.SIDE / _WIDTH
    high = round(_HEIGHT * scale)
    top = (stages.SIDE - high) // 2
    place = np.array([[scale, 0, top, _HEIGHT, _WIDTH]], np.float32)
    square = np.full((1, stages.SIDE, stages.SIDE, 3), 114, np.uint8)
    count, began = 0, 0.0
    while not began or time.monotonic() < began + seconds:
        there, picture = capture.read()
        if not there:
            capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            continue
        small = cv2.resize(picture, (stages.SIDE, high), interpolation=cv2.INTER_LINEAR)
        cv2.cvtColor(small, cv2.COLOR_BGR2RGB, dst=square[0, top : top + high])
        map0, map1 = session.run(None, {"pixels": square})
        tracks = tracker.update(*boxes(map0, map1, place), seconds=count / 25)
        now = time.time()
        frame = Frame("c", "", 0, 0, count, now, count / 25, _WIDTH, _HEIGHT, "RGB")
        for track, _ in choice.choose(Observation(frame, tuple(tracks)), time=now):
            left, upper, right, lower = (max(0, round(edge)) for edge in track.box)
            crop = cv2.cvtColor(picture[upper:lower, left:right], cv2.COLOR_BGR2RGB)
            appearance.colours(cv2.resize(crop, (appearance.WIDTH, appearance.HEIGHT)))
        count += 1
        if count == 10 and not began:  # warm
            began, count = time.monotonic(), 0
    return count / (time.monotonic() - began)


async def flow(
    video: Path, store: Store, *, cameras: int, seconds: float, policy: str, threads: int
) -> dict[str, float]:
    """Frames a second of all cameras together, and the age of their frames, by `torchship watch`."""
    from torchship.serve import config as configs
    from torchship.serve.host import Server

    made: list[Flow] = []

    class SeenFlow(Flow):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(self)

    vars(mount)["Flow"] = SeenFlow
    given = [
        {"name": f"c{at}", "source": str(video), "loop": True, "policy": policy, "realtime": policy != "wait"}
        for at in range(cameras)
    ]
    watch = convert(
        {"camera": given, "http_port": 0, "store": str(store.root),
         "detector": {"threads": threads}}
    )  # fmt: skip
    server = Server(configs.convert(msgspec.to_builtins(mount.serving(watch))))
    await server.open()
    try:
        await asyncio.sleep(4)
        meters = [one.stream.meter for one in made[0].cameras.values()]
        before, began = sum(meter.frames for meter in meters), time.monotonic()
        await asyncio.sleep(seconds)
        rate = (sum(meter.frames for meter in meters) - before) / (time.monotonic() - began)
        spent = {
            f"{name}/{one.name}": 1e3 * one.meter.running / max(1, one.meter.jobs)
            for (name, _), line in server.catalog.lines().items()
            for one in line.stations
        }
        drops = sum(sum(meter.drops.values()) for meter in meters)
        ages = {share: max(meter.age(share) for meter in meters) for share in (0.5, 0.99)}
        print(f"  {cameras} cameras, {policy}: {rate:.1f} frames/s, age p50 {1e3 * ages[0.5]:.0f} ms, "
              f"p99 {1e3 * ages[0.99]:.0f} ms, {drops} dropped; ms a job: "
              + ", ".join(f"{name} {value:.1f}" for name, value in spent.items()))  # fmt: skip
        return {"fps": rate, "p99": 1e3 * ages[0.99]}
    finally:
        await server.close(patience=0.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--store", default="")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--cameras", default="1,2,4")
    parser.add_argument("--threads", type=int, default=0, help="of the detector; 0: half of the cores")
    given = parser.parse_args()
    store, folder = Store(given.store or None), Path(os.environ.get("TMPDIR", "/tmp"))  # one's own clip
    video = clip(folder)
    handed, copied = uvloop.run(by_ring())
    pickled, shared = by_queues()
    print(f"  a complete frame to another process: {1e3 * handed:.3f} ms by the ring "
          f"({1e3 * copied:.2f} ms with the copy into its slot), {1e3 * pickled:.2f} ms pickled through a queue, "
          f"{1e3 * shared:.2f} ms as a shared tensor of torch.multiprocessing")  # fmt: skip
    decoded = uvloop.run(decoding(video, seconds=min(5.0, given.seconds)))
    plain = plain_loop(video, quantized(folder), seconds=given.seconds)
    print(f"  plain loop: {plain:.1f} frames/s")
    once = {"seconds": given.seconds, "threads": given.threads}
    alone = uvloop.run(flow(video, store, cameras=1, policy="wait", **once))
    live = [
        uvloop.run(flow(video, store, cameras=count, policy="latest", **once))
        for count in map(int, given.cameras.split(","))
    ]
    last = {
        "handover_ms": f"{1e3 * handed:.3f}",
        "handover_vs_queue_x": f"{pickled / handed:.1f}",
        "decode_fps_per_core": f"{decoded:.0f}",
        "end_to_end_fps": f"{alone['fps']:.1f}",
        "vs_plain_loop_x": f"{alone['fps'] / plain:.2f}",
        "frame_age_p99_ms": f"{live[0]['p99']:.0f}",
    }
    print(" ".join(f"{name}={value}" for name, value in last.items()))


if __name__ == "__main__":
    main()
