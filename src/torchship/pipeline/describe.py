"""What a stage takes, gives and lets a request set, found without opening it: no weights are read, nothing is made."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from torchship import process
from torchship.artifact import Store, open_artifact
from torchship.errors import BadConfig, TorchshipError
from torchship.pipeline import embedded
from torchship.pipeline.config import PipelineConfig, StageConfig
from torchship.pipeline.faults import words_of
from torchship.pipeline.opening import load_body, open_remote, remote_signature
from torchship.stage import Parameter, called, declaration, declared_parameters
from torchship.tensors import Signature


class Description(msgspec.Struct, frozen=True):
    """A stage before it is opened. `takes_labels`: its option `labels` is filled from the artifact before it.
    `pipeline` is what an artifact of that kind holds: its stages take the place of the one."""

    signature: Signature
    max_batch: int
    parameters: tuple[Parameter, ...] = ()
    streams: bool = False
    labels: tuple[str, ...] = ()
    takes_labels: bool = False
    pipeline: PipelineConfig | None = None


_DEFAULT = StageConfig()
_DATA_TYPES = {str, int, float, bool, list, dict, tuple, type(None), Any, object, Sequence, Mapping, typing.Union,
          types.UnionType}  # fmt: skip
_UNUSED = {"run": ("device", "signature"), "artifact": ("options", "signature"), "remote": ("device", "threads")}


def describe(config: StageConfig, store: Store) -> Description:
    """Describe a stage in this process: a Python stage's module is imported, an artifact's manifest is read.

    Raises BadConfig, NotFound, ArtifactError, Unavailable.
    """
    kinds = [kind for kind in ("run", "artifact", "remote") if getattr(config, kind)]
    if len(kinds) != 1:
        said = f"has {' and '.join(kinds)}" if kinds else "says nothing to run"
        raise BadConfig(f"the stage {said}", hint="give exactly one of run, artifact, remote")
    _check_fields(config, kinds[0])
    if config.run:
        return _of_python(config)
    if config.artifact:
        return _of_artifact(config, store)
    return _of_remote(config)


def _check_fields(config: StageConfig, kind: str) -> None:
    """Raise BadConfig for a field that means nothing for such a stage, and for numbers that cannot be."""
    unused = [name for name in _UNUSED[kind] if getattr(config, name) != getattr(_DEFAULT, name)]
    if unused:
        raise BadConfig(f"{', '.join(unused)}: means nothing for a stage that is {kind}", hint="leave it out")
    if not config.device:
        raise BadConfig("device is empty", hint="name one, or several for the copies to be dealt out to")
    for name, least in (("copies", 1), ("threads", 0), ("max_batch", 0)):
        if getattr(config, name) < least:
            raise BadConfig(f"{name} is {getattr(config, name)}, expected {least} or more")


def _of_python(config: StageConfig) -> Description:
    body = load_body(config.run)
    check_options(body, config.options)
    try:
        signature, max_batch = declaration(body, config.options)
    except TorchshipError:
        raise
    except Exception as fault:  # whatever a class does when it is asked to declare its signature
        raise BadConfig(f"options of {config.run}: {type(fault).__name__}: {words_of(fault, most=300)}") from fault
    call = called(body)
    takes_labels = inspect.isclass(body) and "labels" in inspect.signature(body).parameters
    return Description(
        signature,
        config.max_batch or max_batch,
        declared_parameters(call),
        streams=inspect.isgeneratorfunction(call),
        takes_labels=takes_labels,
    )


def _of_artifact(config: StageConfig, store: Store) -> Description:
    artifact = open_artifact(store.resolve(config.artifact), verify=False)
    manifest = artifact.manifest
    if manifest.kind == "pipeline":
        whole = open_artifact(artifact.path)
        inner = embedded.read(whole, trust=config.trust)
        return Description(manifest.signature, manifest.max_batch, labels=manifest.labels, pipeline=inner)
    return Description(manifest.signature, config.max_batch or manifest.max_batch, labels=manifest.labels)


def _of_remote(config: StageConfig) -> Description:
    """What another server's model declares is not known here: the parameters that are given here are passed on."""
    passed = tuple(Parameter(name, value) for name, value in config.parameters.items())
    signature = remote_signature(config)
    if signature is not None:
        return Description(signature, config.max_batch or (64 if signature.batched else 1), passed)
    asked = open_remote(config)
    try:
        return Description(asked.signature, asked.max_batch, passed)
    finally:
        asked.close()


class _Question(msgspec.Struct):
    config: StageConfig
    root: str


def describe_apart(config: StageConfig, store: Store) -> Description:
    """The same in a child process, so that a stage's imports (torch, a model library) never burden this one.

    Nor do the threads of gRPC. torchship's own stages are known to import nothing heavy.
    """
    if config.artifact or config.run.startswith("torchship.stages."):
        return describe(config, store)
    question = msgspec.to_builtins(_Question(config, store.named))
    outcome = process.run("torchship.pipeline.describe:answer", argument=question, timeout=120.0)
    if outcome.fault:
        raise BadConfig(outcome.fault)
    return msgspec.convert(outcome.value, Description)


def answer(question: object) -> object:
    """The child's side of `describe_apart`."""
    asked = msgspec.convert(question, _Question)
    return msgspec.to_builtins(describe(asked.config, Store(asked.root)))


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
            raise BadConfig(
                f"options.{name} of {body.__qualname__}: {str(fault)[:1].lower()}{str(fault)[1:]}"
            ) from None
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
