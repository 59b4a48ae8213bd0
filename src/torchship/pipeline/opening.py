"""Opens one stage of a pipeline in this process."""

from __future__ import annotations

from typing import Any

from torchship import process
from torchship.artifact import Store
from torchship.artifact import open_stage as open_artifact_stage
from torchship.errors import BadConfig, StageFailed, TorchshipError
from torchship.pipeline.config import StageConfig
from torchship.pipeline.faults import words_of
from torchship.stage import FunctionStage, Stage
from torchship.stages.remote import Remote, read_options
from torchship.tensors import Free, Signature


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
            text = f"{config.run} cannot be made: {type(fault).__name__}: {words_of(fault, most=300)}"
            raise StageFailed(text) from fault
    if config.artifact:
        return open_artifact_stage(
            config.artifact, store=store, device=config.first_device, threads=config.threads, trust=config.trust
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
        raise BadConfig(
            f"{target!r} cannot be imported: {type(fault).__name__}: {words_of(fault, most=300)}"
        ) from fault


def open_remote(config: StageConfig) -> Remote:
    """The remote stage that `config` describes. Raises BadConfig, Unavailable, NotFound."""
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
