"""`torchship store ...`: list, show, remove, export and import what is published."""

from __future__ import annotations

from pathlib import Path

import click

from torchship.artifact import Store, archive, open_artifact, signing
from torchship.cli import _shown
from torchship.errors import BadConfig

_json = click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON to stdout.")
_WHERE = "The store's folder.  [default: $TORCHSHIP_STORE or ~/.local/share/torchship/store]"


@click.group(
    epilog="""\b
Examples:
  torchship store list
  torchship store current resnet18 2
  torchship store export resnet18@2 resnet18.zip
  torchship store import resnet18.zip --name resnet18
  torchship store keygen my.key && torchship store sign resnet18 --key my.key
"""
)
@click.option("--store", "root", default=None, metavar="DIR", help=_WHERE)
@click.pass_context
def command(ctx: click.Context, *, root: str | None) -> None:
    """Look after published artifacts: NAME means its current version, NAME@3 version 3."""
    ctx.obj = Store(root)


@command.command(name="list")
@_json
@click.pass_obj
def list_(store: Store, *, as_json: bool) -> None:
    """All names with their versions."""
    entries = store.list()
    if as_json:
        _shown.print_json(entries)
        return
    rows = [(e.name, e.current, ", ".join(map(str, e.versions))) for e in entries]
    out = _shown.console()
    out.print(_shown.table(("name", "current", "versions"), rows, right=["current"]))
    if not rows:
        out.print(f"nothing is published in {store.root}")


@command.command()
@click.argument("name")
@_json
@click.pass_obj
def show(store: Store, *, name: str, as_json: bool) -> None:
    """The versions of NAME: when and how they were made, how fast they are."""
    current = store.current(name)
    artifacts = {n: open_artifact(store.resolve(f"{name}@{n}"), verify=False) for n in store.versions(name)}
    if as_json:
        facts = [{"version": n, "current": n == current, "manifest": a.manifest} for n, a in artifacts.items()]
        _shown.print_json(facts)
        return
    rows = []
    for number, artifact in artifacts.items():
        manifest = artifact.manifest
        first = manifest.timing.curve[0] if manifest.timing and manifest.timing.curve else None
        speed = f"{first.p50_ms:.2f}" if first else "-"
        mark = "*" if number == current else ""
        size = _shown.human_size(artifact.size)
        rows.append((mark, number, manifest.recipe.label, speed, size, manifest.provenance.created[:19]))
    columns = ("", "version", "recipe", "p50 ms", "size", "created")
    _shown.console().print(_shown.table(columns, rows, right=["version", "size"]))


@command.command()
@click.argument("target", metavar="NAME[@VERSION]")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def remove(store: Store, *, target: str, yes: bool) -> None:
    """Remove one version (NAME@3) or all of a name. Their numbers are not used again."""
    name, _, wanted = target.partition("@")
    if wanted and not wanted.isdigit():
        raise BadConfig(f"{target}: say which version by its number", hint=f"as in {name}@{store.current(name)}")
    versions = store.versions(name)
    what = f"version {wanted} of {name}" if wanted else f"all {len(versions)} versions of {name}"
    there = int(wanted) in versions if wanted else bool(versions)  # else nothing is asked, and `remove` refuses
    if there and not yes:
        click.confirm(f"Remove {what}?", abort=True, err=True)
    store.remove(name, version=int(wanted) if wanted else None)
    click.echo(f"removed {what}")


@command.command()
@click.argument("name")
@click.argument("version", type=int)
@click.pass_obj
def current(store: Store, *, name: str, version: int) -> None:
    """Make VERSION the one that NAME alone means (to go back, or forward)."""
    store.set_current(name, version=version)
    click.echo(f"{name} now means {name}@{version}")


@command.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--name", required=True, help="The name to publish under.")
@click.pass_obj
def publish(store: Store, *, folder: str, name: str) -> None:
    """Copy the artifact in FOLDER into the store as the next version of a name."""
    version = store.publish(folder, name=name)
    click.echo(f"published {name}@{version}")


@command.command()
@click.argument("target", metavar="NAME[@VERSION]")
@click.argument("file", type=click.Path(dir_okay=False))
@click.pass_obj
def export(store: Store, *, target: str, file: str) -> None:
    """Write an artifact to one FILE (.tar or .zip) that `import` takes on another machine."""
    path = archive.export(store.resolve(target), to=file)
    click.echo(f"wrote {path} ({_shown.human_size(path.stat().st_size)})")


@command.command()
@click.argument("file", type=click.Path(dir_okay=False))
def keygen(*, file: str) -> None:
    """Make a key to sign with: FILE holds the private key, FILE.pub the public one."""
    signing.need_library()
    public = signing.make_key(Path(file))
    click.echo(f"wrote {file} (keep it secret) and {file}.pub")
    click.echo(f"public key {public}: who trusts it puts {file}.pub into $TORCHSHIP_KEYS or ~/.config/torchship/keys")


@command.command()
@click.argument("target", metavar="NAME[@VERSION]|FOLDER")
@click.option("--key", required=True, type=click.Path(dir_okay=False), help="The private key, as keygen wrote it.")
@click.pass_obj
def sign(store: Store, *, target: str, key: str) -> None:
    """Check every file of an artifact and sign its manifest."""
    signing.need_library()
    artifact = open_artifact(store.resolve(target))
    seal = signing.sign(artifact.path, digest=artifact.digest, key=Path(key))
    click.echo(f"signed {target} with the key {seal.key[:16]}...")


@command.command()
@click.argument("target", metavar="NAME[@VERSION]|FOLDER")
@click.option("--key", default=None, type=click.Path(dir_okay=False), help="The only public key to trust.")
@click.pass_obj
def verify(store: Store, *, target: str, key: str | None) -> None:
    """Check every file of an artifact, and that a trusted key signed it."""
    signing.need_library()
    artifact = open_artifact(store.resolve(target))
    public = signing.read_public(Path(key)) if key else ""
    who = signing.check(artifact.path, digest=artifact.digest, key=public)
    click.echo(f"{target}: {len(artifact.manifest.files)} files are as signed by {who}")


@command.command(name="import")
@click.argument("file", type=click.Path())
@click.option("--name", default=None, help="The name to publish under.  [default: the artifact's own]")
@click.pass_obj
def import_(store: Store, *, file: str, name: str | None) -> None:
    """Check an archive of an artifact (.tar, .tar.gz, .zip) and publish what it holds."""
    with archive.extracted(file) as artifact:
        given = name or artifact.manifest.name
        version = store.publish(artifact.path, name=given)
    click.echo(f"published {given}@{version}")


def _elsewhere(ctx: click.Context, _option: click.Parameter, root: str | None) -> None:
    if root is not None:
        ctx.obj = Store(root)


for _verb in command.commands.values():  # it is often written behind the verb
    _verb.params.append(
        click.Option(["--store"], metavar="DIR", help=_WHERE, expose_value=False, is_eager=True, callback=_elsewhere)
    )
