"""What a stage takes, gives and lets a request set, found without opening it: no weights are read, nothing is made."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from torchship import process
from torchship.artifact import Store, open_artifact
from torchship.errors import BadConfig, TorchshipError
from torchship.pipeline import embedded
from torchship.pipeline.config import PipelineConfig, StageConfig
from torchship.pipeline.options import check_options
from torchship.stage import Parameter, called, declaration, declared_parameters
from torchship.stages.remote import Remote, read_options
from torchship.tensors import Free, Signature


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


_PLAIN = StageConfig()
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
    unused = [name for name in _UNUSED[kind] if getattr(config, name) != getattr(_PLAIN, name)]
    if unused:
        raise BadConfig(f"{', '.join(unused)}: means nothing for a stage that is {kind}", hint="leave it out")
    for name, least in (("copies", 1), ("threads", 0), ("max_batch", 0)):
        if getattr(config, name) < least:
            raise BadConfig(f"{name} is {getattr(config, name)}, expected {least} or more")


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
    except Exception as fault:  # whatever a module does when it is imported
        words = " ".join(str(fault).split())[:300]
        raise BadConfig(f"{target!r} cannot be imported: {type(fault).__name__}: {words}") from fault


def _of_python(config: StageConfig) -> Description:
    body = load_body(config.run)
    check_options(body, config.options)
    try:
        signature, max_batch = declaration(body, config.options)
    except TorchshipError:
        raise
    except Exception as fault:  # whatever a class does when it is asked to declare its signature
        words = " ".join(str(fault).split())[:300]
        raise BadConfig(f"options of {config.run}: {type(fault).__name__}: {words}") from fault
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
    signature = _remote_signature(config)
    if signature is not None:
        return Description(signature, config.max_batch or (64 if signature.batched else 1), passed)
    asked = open_remote(config)
    try:
        return Description(asked.signature, asked.max_batch, passed)
    finally:
        asked.close()


def open_remote(config: StageConfig) -> Remote:
    """The remote stage that `config` describes. Raises BadConfig, Unavailable, NotFound."""
    urls = (config.remote,) if isinstance(config.remote, str) else config.remote
    options = read_options(config.options)
    return Remote(urls, signature=_remote_signature(config), options=options, max_batch=config.max_batch)


def _remote_signature(config: StageConfig) -> Signature | None:
    """The declared signature, batched where every tensor's first axis is free; None: the server is to be asked."""
    if not config.signature:
        return None
    found = Signature.parse(config.signature)
    rows = [spec.shape[:1] for spec in (*found.inputs, *found.outputs)]
    batched = all(first and isinstance(first[0], Free) for first in rows)
    return msgspec.structs.replace(found, batched=batched)


class _Question(msgspec.Struct):
    config: StageConfig
    root: str


def describe_apart(config: StageConfig, store: Store) -> Description:
    """The same in a child process, so that a stage's imports (torch, a model library) never burden this one.

    Nor do the threads of gRPC. torchship's own stages are known to import nothing heavy.
    """
    if config.artifact or config.run.startswith("torchship.stages."):
        return describe(config, store)
    question = msgspec.to_builtins(_Question(config, str(store.root)))
    outcome = process.run("torchship.pipeline.describe:answer", argument=question, timeout=120.0)
    if outcome.fault:
        raise BadConfig(outcome.fault)
    return msgspec.convert(outcome.value, Description)


def answer(question: object) -> object:
    """The child's side of `describe_apart`."""
    asked = msgspec.convert(question, _Question)
    return msgspec.to_builtins(describe(asked.config, Store(asked.root)))


def blame(fault: TorchshipError, *, where: str) -> TorchshipError:
    """The same error with the path of the stage in front."""
    return type(fault)(f"{where}: {fault}", hint=fault.hint)
