"""`torchship serve`: artifacts and pipelines over REST and gRPC."""

from __future__ import annotations

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
@click.argument("targets", nargs=-1, required=True, metavar="CONFIG.toml|ARTIFACT...")
@click.option("--http-host", default="", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--http-port", type=click.IntRange(0, 65535), help="Port of REST; 0 takes a free one.  [default: 8000]")
@click.option("--store", default="", metavar="DIR", help="Where artifacts are found by name.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]")
def command(
    *, targets: tuple[str, ...], http_host: str, http_port: int | None, store: str, log_level: str | None
) -> int:
    """Serve artifacts and pipelines by the Open Inference Protocol.

    ARTIFACT is a name in the store (resnet18, resnet18@3) or a folder; CONFIG.toml describes a whole server.
    """
    from torchship.serve.host import serve

    return serve(*targets, http_host=http_host, http_port=http_port, store=store, log_level=log_level or "")
