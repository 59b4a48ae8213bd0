"""The command line: one file a command, imported only when it is called.

A file here offers a click command named `command`; its file name is the command's name. Applications add theirs by the
entry point group `torchship.commands`; one that is an extra of ours and not installed says how to get it.
Exit codes: 0 done, 1 failed, 2 wrong use or bad input, 130 interrupted.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from importlib import metadata
from types import ModuleType

import click

from torchship import __version__, plugins
from torchship.errors import BadConfig, BadInput, TorchshipError, Unavailable, Unsupported

_ABOUT = {
    "optimize": "Search the best valid way to run a model here, and publish it.",
    "inspect": "Show what an artifact holds and what was measured.",
    "predict": "Run an artifact, or a served model, on a file.",
    "serve": "Serve artifacts and pipelines by REST and gRPC.",
    "store": "List, show, remove, export and import artifacts.",
    "edge": "Bring an artifact to a small machine: one archive, tried and updated offline.",
    "doctor": "Say what this machine can run, and why a model does not export.",
    "bench": "Load a server or an artifact and report throughput and latency.",
    "compare": "Compare two artifacts.",
    "pipeline": "Check, draw and publish pipelines.",
}


class _Commands(click.Group):
    """Finds commands by file name and entry point; the one-line help above is shown without importing any of ours."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = plugins.names("commands")
        known = [name for name in _ABOUT if name in found]
        return [*known, *sorted(set(found).difference(known))]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in self.list_commands(ctx):
            command: object = plugins.load("commands", name=name)
            if isinstance(command, ModuleType):  # a file of ours; an entry point names the command itself
                command = command.command
            assert isinstance(command, click.Command)  # noqa: S101  # the contract of this folder
            return command
        if extra := _extra(name):
            raise Unsupported(
                f"the command {name!r} belongs to the application {extra}, which is not installed",
                hint=f"pip install 'torchship[{name}]', or from a checkout: pip install ./apps/{name}",
            )
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args and args[0] not in names and (near := difflib.get_close_matches(args[0], names, 1)):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            # an application's is the summary of its package, so that nothing of it is imported
            points = metadata.entry_points(group="torchship.commands")
            abouts = {point.name: point.dist.metadata["Summary"] for point in points if point.dist} | _ABOUT
            formatter.write_dl([(name, abouts.get(name, "")) for name in self.list_commands(ctx)])


def _extra(name: str) -> str:
    """The distribution `torchship-NAME`, where our extra NAME asks for it; empty where there is none."""
    wanted = f"torchship-{name}"
    try:
        needs = metadata.requires("torchship") or []
    except metadata.PackageNotFoundError:  # run from a bare source folder
        return ""
    return wanted if any(re.match(rf"{re.escape(wanted)}(?![\w.-]).*extra", need) for need in needs) else ""


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog='Shell completion: eval "$(_TORCHSHIP_COMPLETE=bash_source torchship)"  (or zsh_source, fish_source)',
)
@click.version_option(__version__, prog_name="torchship")
def app() -> None:
    """Take a PyTorch model from the lab to production: searched, guarded, packed, served.

    \b
    torchship optimize torchvision.models:resnet18 --input "image:FP32[-1,3,224,224]"
    torchship serve resnet18 --http-port 8000
    """


def main() -> None:
    """The console script: turns every error of ours into one line with a hint, and an exit code."""
    try:
        code = app.main([_at_home(word) for word in sys.argv[1:]], standalone_mode=False)
        if sys.stdout is not None:  # closed by the caller: `>&-`
            sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as fault:
        fault.show()
        sys.exit(fault.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except TorchshipError as fault:
        show(fault)
        sys.exit(2 if isinstance(fault, BadInput | BadConfig) else 1)
    except OSError as fault:  # a folder for a file, missing rights, a full disk: no fault of ours
        place = fault.filename or "the output"
        show(Unavailable(f"{place}: {fault.strerror or fault}", hint="name another place, or make room"))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in its buffer cannot be written
        sys.exit(1)


def _at_home(word: str) -> str:
    """A path below `~`, also behind `--option=`, where no shell has put the home folder in."""
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return option + equals + os.path.expanduser(value) if value.startswith("~/") else word


def show(fault: TorchshipError) -> None:
    """Print an error as one line, its hint beneath; without colours where NO_COLOR asks for none (no-color.org)."""
    colours = False if os.environ.get("NO_COLOR") else None
    click.echo(f"{click.style('error', fg='red', bold=True)}: {' '.join(str(fault).split())}", err=True, color=colours)
    if fault.hint:
        click.echo(f" {click.style('hint', fg='cyan')}: {fault.hint}", err=True, color=colours)
