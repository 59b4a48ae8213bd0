"""`torchship inspect ARTIFACT`: what an artifact holds and what was measured."""

from __future__ import annotations

from contextlib import ExitStack

import click


@click.command(
    epilog="""\b
Examples:
  torchship inspect resnet18
  torchship inspect resnet18@3 --store runs/store
  torchship inspect downloads/resnet18.zip --json | jq .manifest.recipe
"""
)
@click.argument("target", metavar="ARTIFACT")
@click.option("--store", default=None, metavar="DIR", help="Where names are looked up.")
@click.option("--no-verify", is_flag=True, help="Read the manifest only; hash no files.")
@click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON to stdout.")
def command(*, target: str, store: str | None, no_verify: bool, as_json: bool) -> None:
    """Show what an artifact holds and what was measured, after checking every file.

    ARTIFACT is a name in the store (resnet18, resnet18@3), a folder, or an archive of one (.tar, .tar.gz, .zip).
    """
    from torchship import home
    from torchship.artifact import Store, archive, open_artifact
    from torchship.cli import _shown

    with ExitStack() as stack:
        if target.lower().endswith(archive.SUFFIXES) and home.expand(target).is_file():
            artifact = stack.enter_context(archive.extracted(target))
        else:
            artifact = open_artifact(Store(store).resolve(target), verify=not no_verify)
        if as_json:
            import msgspec

            facts = {"path": str(artifact.path), "size": artifact.size, "manifest": artifact.manifest}
            click.echo(msgspec.json.format(msgspec.json.encode(facts), indent=2).decode())
            return
        _shown.show_artifact(_shown.console(), artifact)
