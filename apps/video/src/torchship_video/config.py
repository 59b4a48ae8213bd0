"""`cameras.toml`: which cameras are watched, how, and where what is found goes. Every error starts with its path."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from torchship import home
from torchship.errors import BadConfig, NotFound
from torchship_video.sinks import SinkConfig
from torchship_video.sources import SCHEMES, is_live
from torchship_video.stages import DETECTOR, SIDE
from torchship_video.tracking import TrackerOptions
from torchship_video.zones import LineConfig, ZoneConfig

_SECRET = re.compile(r"(?<=://)[^/@\s]*@")
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}$")]
Share: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]
Policy: TypeAlias = Literal["", "wait", "oldest", "latest"]


class CameraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[camera]]`: a stream and what is done with its frames.

    `source` is a file, a folder of pictures, rtsp://, http:// (MJPEG) or /dev/video0. `policy` says what happens to
    frames that come faster than they are analysed: `wait` stops the decoder, `oldest` drops the one that waited longest
    of `queue`, `latest` keeps only the newest; by default files wait unless they are played in `realtime`, and cameras
    keep the latest. `in_flight` frames are analysed at the same time, by default 6 where the policy is `wait`, else 3:
    more makes each of them older. Every `every`-th frame is looked at by the
    detector; tracks go on in between. `motion` is the share of the picture that must change for that, 0 for always, and
    it counts for another `motion_hold` seconds. Only what stands within `region` is tracked: corners as shares of the
    frame's width and height. `loop` begins a file again.
    """

    name: Name
    source: str
    policy: Policy = ""
    queue: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    in_flight: Annotated[int, msgspec.Meta(ge=0, le=16)] = 0
    every: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    motion: Share = 0.0
    motion_hold: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 1.0
    region: tuple[tuple[Share, Share], ...] = ()
    paused: bool = False
    realtime: bool = False
    loop: bool = False
    transport: Literal["tcp", "udp"] = "tcp"
    options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source is empty")
        scheme, address, _ = self.source.partition("://")
        if address and scheme not in SCHEMES:
            raise ValueError(f"source begins with {scheme[:20]}://, expected a path or one of {', '.join(SCHEMES)}")
        if self.region and len(self.region) < 3:
            raise ValueError(f"a region has three corners or more, this one {len(self.region)}")

    @property
    def live(self) -> bool:
        """Whether frames come at their own time, whatever is done with them."""
        return self.realtime or is_live(self.source)

    @property
    def keeps(self) -> Policy:
        """The policy, resolved."""
        return self.policy or ("latest" if self.live else "wait")

    @property
    def together(self) -> int:
        """How many frames are analysed at the same time, resolved."""
        return self.in_flight or (6 if self.keeps == "wait" else 3)


class DetectorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[detector]`: the line `detect`. By default YOLOv3-tiny as `torchship watch prepare` made it.

    Another detector is an `artifact` with `stages` behind it that give boxes, scores and labels as torchship's own
    `torchship.stages.boxes:Detections` does; `side`, `planes` and `unit` say what it takes: see stages.Squares. By
    default its `threads` are half of the cores: the other half decodes, makes squares, tracks and draws.
    """

    artifact: str = DETECTOR
    stages: tuple[dict[str, Any], ...] = ()
    labels: tuple[str, ...] = ("person",)
    score: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.1
    side: Annotated[int, msgspec.Meta(ge=32, le=4096)] = SIDE
    planes: bool = False
    unit: bool = False
    threads: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    copies: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    device: str = "cpu"


class IdentityConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[identity]`: whether tracks are recognized again across cameras, and the folder that remembers them; without one
    they are forgotten at the end."""

    on: bool = True
    folder: str = ""


class WatchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file. `http_port` is where the API and the page are, 0 takes a free one; `store` holds artifacts."""

    camera: tuple[CameraConfig, ...] = ()
    detector: DetectorConfig = DetectorConfig()
    tracker: TrackerOptions = TrackerOptions()
    identity: IdentityConfig = IdentityConfig()
    sink: tuple[SinkConfig, ...] = ()
    zone: tuple[ZoneConfig, ...] = ()
    line: tuple[LineConfig, ...] = ()
    store: str = ""
    http_host: str = "127.0.0.1"
    http_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    view: bool = False
    token: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        names = [camera.name for camera in self.camera]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two cameras are called {min(doubled)!r}")
        if sum(sink.kind == "mjpeg" for sink in self.sink) > 1:
            raise ValueError("there is one sink mjpeg at most: it says how the page's pictures are drawn")


def convert(data: object, *, kind: Any = WatchConfig) -> Any:
    """Plain data as a `kind`. Raises BadConfig whose message starts with the path of the fault."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as fault:
        message, _, path = str(fault).partition(" - at `")
        raise BadConfig(f"{path.rstrip('`') or '$'}: {message}", hint="see apps/video/docs/video.md") from None


def read(path: Path | str) -> WatchConfig:
    """The configuration in a TOML file; sources, folders, the store are found from it. Raises NotFound, BadConfig."""
    path = home.expand(path)
    try:
        config: WatchConfig = convert(tomllib.loads(path.read_text()))
    except OSError as fault:
        raise NotFound(f"{path}: {fault.strerror}", hint="give a file such as cameras.toml") from None
    except ValueError as fault:  # of TOML, or of its encoding
        raise BadConfig(f"{path}: {fault}", hint="see apps/video/docs/video.md") from None
    except BadConfig as fault:
        raise BadConfig(f"{path}: {fault}", hint=fault.hint) from None
    change, near = msgspec.structs.replace, path.parent
    cameras = tuple(change(camera, source=_beside(near, camera.source)) for camera in config.camera)
    return change(
        config,
        camera=cameras,
        store=_beside(near, config.store),
        identity=change(config.identity, folder=_beside(near, config.identity.folder)),
    )


def _beside(folder: Path, name: str) -> str:
    """A path in the file, found from the file; addresses and the empty name stay as they are."""
    return str((folder / home.expand(name)).resolve()) if name and "://" not in name else name


def redacted(text: str) -> str:
    """The same text with `***@` where addresses in it hold a user or a password."""
    return _SECRET.sub("***@", text)
