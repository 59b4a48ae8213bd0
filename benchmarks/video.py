"""End to end on video: decode, detect every frame, track; against the same libraries in a plain loop, in one run.

    python -m benchmarks.video [--store DIR] [--seconds 20] [--cameras 1,2,4]

The store holds the detector that `torchship watch prepare` made. The clip is made here: vtest.avi (Debian opencv-doc)
enlarged to 1080p and encoded as H.264, else a moving pattern. The plain loop decodes with OpenCV, letterboxes with
OpenCV, runs the same artifact with all cores, and makes boxes and tracks with the same functions.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import time
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop

from torchship.artifact import Store
from torchship_video import mount, ring, stages
from torchship_video.config import CameraConfig, convert
from torchship_video.flow import Flow
from torchship_video.messages import Frame, decode, encode
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


def _send(talk: Connection, queue: Any, frames: int) -> None:
    """The decoder's side of `handover`: a frame of its own goes over by the ring, or the queue, when it is told."""
    frame = np.full((_HEIGHT * 3 // 2, _WIDTH), 7, np.uint8)
    writer = ring.RingWriter.make(size=frame.nbytes)
    for number in range(frames):
        talk.recv_bytes()
        began = time.monotonic()
        slot = writer.claim()
        assert slot is not None
        slot.pixels(_WIDTH, _HEIGHT, "I420")[:] = frame
        talk.send((encode(slot.publish("c", sequence=number)), began))
        talk.recv_bytes()
        queue.put((time.monotonic(), frame))
    talk.recv_bytes()
    writer.close()


def handover(frames: int = 100) -> tuple[float, float]:
    """Seconds from a frame in the decoder's memory to an array in another process, the copy into the slot included:
    by the ring, and by a queue of `multiprocessing`; medians, one frame at a time, in turn."""
    context = multiprocessing.get_context("spawn")
    talk, theirs = context.Pipe()
    queue = context.Queue()
    child = context.Process(target=_send, args=(theirs, queue, frames))
    child.start()
    by_ring, by_queue = [], []
    for _ in range(frames):
        talk.send_bytes(b"ring")
        handle, began = talk.recv()
        with ring.read(decode(handle)) as pixels:
            by_ring.append(time.monotonic() - began)
            assert pixels[-1, -1] == 7
        talk.send_bytes(b"queue")
        began, got = queue.get()
        by_queue.append(time.monotonic() - began)
        assert got[-1, -1] == 7
    talk.send_bytes(b"end")
    child.join()
    return float(np.median(by_ring)), float(np.median(by_queue))


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


def plain_loop(video: Path, store: Store, *, seconds: float) -> float:
    """Frames a second of one camera in a loop, as one would write it first."""
    import cv2

    import torchship

    detector: Any = torchship.open(str(store.resolve(stages.DETECTOR)))
    boxes, tracker = stages.Boxes(labels=["person"]), CameraTracker(TrackerOptions())
    capture = cv2.VideoCapture(str(video))
    scale = stages.SIDE / _WIDTH
    high = round(_HEIGHT * scale)
    top = (stages.SIDE - high) // 2
    place = np.array([[scale, 0, top, _HEIGHT, _WIDTH]], np.float32)
    count, began = 0, 0.0
    while not began or time.monotonic() < began + seconds:
        there, picture = capture.read()
        if not there:
            capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            continue
        square = np.full((1, stages.SIDE, stages.SIDE, 3), 114, np.uint8)
        small = cv2.resize(picture, (stages.SIDE, high), interpolation=cv2.INTER_AREA)
        square[0, top : top + high] = cv2.cvtColor(small, cv2.COLOR_BGR2RGB)
        found = detector({"pixels": square})
        tracker.update(*boxes(found["map0"], found["map1"], place), seconds=count / 25)
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
        {"camera": given, "http_port": 0, "identity": {"on": False}, "store": str(store.root),
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
    by_ring, by_queue = handover()
    print(f"  a frame to another process: {1e3 * by_ring:.2f} ms by the ring, {1e3 * by_queue:.2f} ms by a queue")
    decoded = uvloop.run(decoding(video, seconds=min(5.0, given.seconds)))
    plain = plain_loop(video, store, seconds=given.seconds)
    print(f"  plain loop: {plain:.1f} frames/s")
    once = {"seconds": given.seconds, "threads": given.threads}
    alone = uvloop.run(flow(video, store, cameras=1, policy="wait", **once))
    live = [
        uvloop.run(flow(video, store, cameras=count, policy="latest", **once))
        for count in map(int, given.cameras.split(","))
    ]
    last = {
        "handover_ms": f"{1e3 * by_ring:.2f}",
        "handover_vs_queue_x": f"{by_queue / by_ring:.1f}",
        "decode_fps_per_core": f"{decoded:.0f}",
        "end_to_end_fps": f"{alone['fps']:.1f}",
        "vs_plain_loop_x": f"{alone['fps'] / plain:.2f}",
        "frame_age_p99_ms": f"{live[0]['p99']:.0f}",
    }
    print(" ".join(f"{name}={value}" for name, value in last.items()))


if __name__ == "__main__":
    main()
