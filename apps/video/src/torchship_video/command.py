"""`torchship watch`: follow what moves on many cameras."""

import click


@click.group()
def command() -> None:
    """Follow what moves on many cameras."""
