"""One stage of a pipeline: what it takes, gives and lets a request set, before it is opened; and the open stage."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

import msgspec

from torchship import process
from torchship.artifact import Store, open_artifact
from torchship.artifact import open_stage as open_artifact_stage
from torchship.errors import BadConfig, StageFailed, TorchshipError
from torchship.pipeline.config import PipelineConfig, StageConfig, read_artifact
from torchship.pipeline.faults import named
from torchship.stage import FunctionStage, Parameter, Stage, called, declaration, declared_parameters
from torchship.tensors import Free, Signature


class Description(msgspec.Struct, frozen=True):
    """A stage before it is opened. `takes_labels`: its option `labels` is filled from the artifact before it.
    `pipeline` is what an artifact of that kind holds: its stages take the place of the one. `load_s` seconds it took
    to open where it was made, 0 where nobody measured."""

    signature: Signature
    max_batch: int
    parameters: tuple[Parameter, ...] = ()
    streams: bool = False
    labels: tuple[str, ...] = ()
    takes_labels: bool = False
    pipeline: PipelineConfig | None = None
    load_s: float = 0.0


_DEFAULT = StageConfig()
_DATA_TYPES = {str, int, float, bool, list, dict, tuple, type(None), Any, object, Sequence, Mapping, typing.Union,
          types.UnionType}  # fmt: skip
_UNUSED = {"run": ("device", "memory_share", "signature"), "artifact": ("options", "signature"),
           "remote": ("device", "memory_share", "threads")}  # fmt: skip


def describe(config: StageConfig, store: Store) -> Description:
    """Describe a stage in this process: a Python stage's module is imported, an artifact's manifest is read.

    Raises BadConfig, NotFound, ArtifactError, Unavailable.
    """
    kinds = [kind for kind in ("run", "artifact", "remote") if getattr(config, kind)]
    if len(kinds) != 1:
        said = f"has {' and '.join(kinds)}" if kinds else "says nothing to run"
        raise BadConfig(f"the stage {said}", hint="give exactly one of run, artifact, remote")
    unused = [name for name in _UNUSED[kinds[0]] if getattr(config, name) != getattr(_DEFAULT, name)]
    if unused:
        raise BadConfig(f"{', '.join(unused)}: means nothing for a stage that is {kinds[0]}", hint="leave it out")
    if not config.device:
        raise BadConfig("device is empty", hint="name one, or several for the copies to be dealt out to")
    for name, least in (("copies", 1), ("threads", 0), ("max_batch", 0)):
        if getattr(config, name) < least:
            raise BadConfig(f"{name} is {getattr(config, name)}, expected {least} or more")
    if config.run:
        return _of_python(config)
    return _of_artifact(config, store) if config.artifact else _of_remote(config)


def _of_python(config: StageConfig) -> Description:
    body = load_body(config.run)
    check_options(body, config.options)
    try:
        signature, max_batch = declaration(body, config.options)
    except TorchshipError:
        raise
    except Exception as fault:  # whatever a class does when it is asked to declare its signature
        raise BadConfig(f"options of {config.run}: {named(fault)}") from fault
    call = called(body)
    takes_labels = inspect.isclass(body) and "labels" in inspect.signature(body).parameters
    streams, most = inspect.isgeneratorfunction(call), config.max_batch or max_batch
    return Description(signature, most, declared_parameters(call), streams=streams, takes_labels=takes_labels)


def _of_artifact(config: StageConfig, store: Store) -> Description:
    artifact = open_artifact(store.resolve(config.artifact), verify=False)
    manifest = artifact.manifest
    if manifest.kind == "pipeline":
        whole = open_artifact(artifact.path)
        inner = read_artifact(whole, trust=config.trust)
        return Description(manifest.signature, manifest.max_batch, labels=manifest.labels, pipeline=inner)
    served = manifest.timing and manifest.timing.served
    if served and config.max_batch > served.max_batch:
        raise BadConfig(
            f"max_batch {config.max_batch} is more than the {served.max_batch} that {config.artifact} was made for: in "
            f"such batches its server took {served.peak / 1e6:.1f} MB",
            hint="leave max_batch out, or search again with a larger --max-memory",
        )
    most, load_s = config.max_batch or manifest.max_batch, manifest.timing.load_s if manifest.timing else 0.0
    return Description(manifest.signature, most, labels=manifest.labels, load_s=load_s)


def _of_remote(config: StageConfig) -> Description:
    """What another server's model declares is not known here: the parameters that are given here are passed on."""
    passed = tuple(Parameter(name, value) for name, value in config.parameters.items())
    signature = remote_signature(config)
    if signature is not None:
        return Description(signature, config.max_batch or (64 if signature.batched else 1), passed)
    with closing(open_remote(config)) as asked:
        return Description(asked.signature, asked.max_batch, passed)


def describe_apart(config: StageConfig, store: Store) -> Description:
    """The same in a child process, so that a stage's imports (torch, a model library) never burden this one.

    Nor do the threads of gRPC. torchship's own stages are known to import nothing heavy.
    """
    if config.artifact or config.run.startswith("torchship.stages."):
        return describe(config, store)
    question = msgspec.to_builtins((config, store.named))
    outcome = process.run("torchship.pipeline.opening:answer", argument=question, timeout=120.0)
    if outcome.fault:
        raise BadConfig(outcome.fault)
    return msgspec.convert(outcome.value, Description)


def answer(question: object) -> object:
    """The child's side of `describe_apart`."""
    config, root = msgspec.convert(question, tuple[StageConfig, str])
    return msgspec.to_builtins(describe(config, Store(root)))


def check_options(body: Any, options: Mapping[str, Any]) -> None:
    """Raise BadConfig for an option that its class does not have, or that is not of the type it wants.

    Annotations that are not made of plain data (a Path, a class) are the class's own affair.
    """
    if not options or not isinstance(body, type) or not hasattr(body, "torchship_stage"):
        return
    known = inspect.signature(body).parameters.values()
    unknown = sorted(set(options) - {parameter.name for parameter in known})
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        hint = f"it has {', '.join(parameter.name for parameter in known) or 'none'}"
        raise BadConfig(f"options: {body.__qualname__} has no option {unknown}", hint=hint)
    try:
        wanted = typing.get_type_hints(vars(body).get("__init__"), include_extras=True)
    except Exception:  # annotations that only a type checker can read
        return
    for name, value in options.items():
        if name not in wanted or not _is_plain(wanted[name]):
            continue
        try:
            msgspec.convert(value, wanted[name])
        except msgspec.ValidationError as fault:
            text = str(fault)
            raise BadConfig(f"options.{name} of {body.__qualname__}: {text[:1].lower()}{text[1:]}") from None
        except TypeError:  # a type that msgspec does not know
            continue


def _is_plain(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return True
    if origin is typing.Annotated:
        return _is_plain(typing.get_args(annotation)[0])
    parts = [part for part in typing.get_args(annotation) if part is not Ellipsis]
    return (origin or annotation) in _DATA_TYPES and all(map(_is_plain, parts))


def open_stage(config: StageConfig, store: Store | None = None) -> Stage:
    """The stage that `config` describes, in this process and ready to run.

    Raises BadConfig, NotFound, ArtifactError, Unavailable; StageFailed for whatever else a Python class raises when
    it is made.
    """
    if config.run:
        body = load_body(config.run)
        try:
            return FunctionStage(body, options=config.options)
        except TorchshipError:
            raise
        except (Exception, SystemExit) as fault:
            raise StageFailed(f"{config.run} cannot be made: {named(fault)}") from fault
    if config.artifact:
        return open_artifact_stage(
            config.artifact, store=store, device=config.devices[0], threads=config.threads, trust=config.trust
        )
    return open_remote(config)


def load_body(target: str) -> Any:
    """The function or class that `module:name` means. Raises BadConfig saying what is missing."""
    if ":" not in target:
        raise BadConfig(f"{target!r} is not module:name", hint='as in run = "torchship.stages.images:Decode"')
    try:
        return process.resolve(target)
    except ModuleNotFoundError as fault:
        raise BadConfig(f"{target!r}: no module named {fault.name!r}", hint="is it on PYTHONPATH?") from None
    except AttributeError as fault:
        raise BadConfig(f"{target!r}: {fault}") from None
    except (Exception, SystemExit) as fault:  # whatever a module does when it is imported
        raise BadConfig(f"{target!r} cannot be imported: {named(fault)}") from fault


def open_remote(config: StageConfig) -> Stage:
    """The remote stage that `config` describes. Raises BadConfig, Unavailable, NotFound."""
    from torchship.stages.remote import Remote, read_options  # 12 MB that other workers do not need

    urls = (config.remote,) if isinstance(config.remote, str) else config.remote
    options = read_options(config.options)
    return Remote(urls, signature=remote_signature(config), options=options, max_batch=config.max_batch)


def remote_signature(config: StageConfig) -> Signature | None:
    """The declared signature, batched where every tensor's first axis is free; None: the server is to be asked."""
    if not config.signature:
        return None
    found = Signature.parse(config.signature, batched=False)
    rows = [spec.shape[:1] for spec in (*found.inputs, *found.outputs)]
    batched = all(first and isinstance(first[0], Free) for first in rows)
    return Signature.parse(config.signature, batched=batched)
