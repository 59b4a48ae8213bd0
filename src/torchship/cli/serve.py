"""`torchship serve`: artifacts and pipelines over REST and gRPC."""

from __future__ import annotations

import logging
import os
from typing import Any

import click


@click.command(
    epilog="""\b
Examples:
  torchship serve resnet18
  torchship serve ./artifacts/resnet18 classify@3 --http-port 8000
  torchship serve serve.toml --log-level warning

\b
SIGTERM (or Ctrl-C): not ready, finish what is under way, stop. Ctrl-C twice: stop now.
"""
)
@click.argument("targets", nargs=-1, metavar="CONFIG.toml|ARTIFACT...")
@click.option("--http-host", default="", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--http-port", type=click.IntRange(0, 65535), help="Port of REST; 0 takes a free one.  [default: 8000]")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="A port for gRPC alone; REST's port speaks it too.")
@click.option("--receivers", type=click.IntRange(0, 64), help="Processes that run the connections; 0: the host does.")
@click.option("--one-process", is_flag=True, help="Models run in threads of the host: less memory, but a model that "
              "crashes ends the server, and one that hangs cannot be ended.")  # fmt: skip
@click.option("--store", default="", metavar="DIR", help="Where artifacts are found by name.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="[default: text]")
@click.option("--trust", is_flag=True, help="Open native code in the artifacts: only if you know who made them.")
@click.option("--new-token", is_flag=True, help="Print a new access token and its entry for the file, and leave.")
def command(*, targets: tuple[str, ...], new_token: bool, **options: Any) -> int:
    """Serve artifacts and pipelines by the Open Inference Protocol.

    ARTIFACT is a name in the store (resnet18, resnet18@3) or a folder; CONFIG.toml describes a whole server.
    """
    if new_token:
        from torchship.serve.access import new_token as make

        token, stored = make()
        click.echo(f"token, for the caller: {token}")
        click.echo(f'\n[[token]]\nname = "caller"\nhash = "{stored}"\nscopes = ["infer"]')
        return 0
    if not targets:
        raise click.UsageError("give a CONFIG.toml or the name of an artifact")
    from torchship.serve.engine.launch import WorkerThread
    from torchship.serve.host import serve

    code = serve(*targets, **{name: value for name, value in options.items() if value is not None})
    if WorkerThread.stuck():  # libraries cannot be torn down around a thread that still runs in them
        logging.shutdown()
        os._exit(code)
    return code
