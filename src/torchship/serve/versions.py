"""Which versions of a model should be served, and out of which files: found in the store, without opening anything."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import msgspec

from torchship.artifact import Store
from torchship.errors import NotFound
from torchship.pipeline.config import PipelineConfig
from torchship.pipeline.describe import describe_apart
from torchship.pipeline.planning import Plan, plan
from torchship.serve.config import ModelConfig


@dataclass(frozen=True)
class Wanted:
    """One version: its number where the store has one (else empty), its pipeline, and the folder of each artifact.

    Two of them with equal `files` would serve the same.
    """

    number: str
    pipeline: PipelineConfig
    files: tuple[str, ...]


def wanted(config: ModelConfig, store: Store) -> list[Wanted]:
    """The versions that a model should have, the current one last. Raises NotFound, BadConfig."""
    if not config.artifact or os.sep in config.artifact or config.artifact.startswith("."):
        pipeline = config.pipeline()
        return [Wanted("", pipeline, _files(pipeline, store))]
    name = config.artifact.partition("@")[0]
    numbers = _numbers(config, store, name)
    found = []
    for number in numbers:
        pipeline = msgspec.structs.replace(config, artifact=f"{name}@{number}").pipeline()
        found.append(Wanted(str(number), pipeline, _files(pipeline, store)))
    return found


def _numbers(config: ModelConfig, store: Store, name: str) -> list[int]:
    policy = config.versions
    there = list(store.versions(name))
    if policy.all:
        numbers = there
    elif policy.listed:
        numbers = sorted(policy.listed)
    elif policy.latest:
        numbers = there[-policy.latest :]
    else:
        return [int(store.resolve(config.artifact).name)]
    missing = [number for number in numbers if number not in there]
    if missing or not numbers:
        raise NotFound(f"{name} has no version {missing or ''}", hint=f"it has {', '.join(map(str, there)) or 'none'}")
    return numbers


def _files(pipeline: PipelineConfig, store: Store) -> tuple[str, ...]:
    return tuple(str(store.resolve(stage.artifact).resolve()) for stage in pipeline.stages if stage.artifact)


def lay_out(version: Wanted, store: Store) -> Plan:
    """The plan of a version, its artifacts pinned: a worker that is replaced opens the same files again."""
    made = plan(version.pipeline, store, describing=describe_apart)
    files = iter(version.files)
    nodes = tuple(
        replace(node, config=msgspec.structs.replace(node.config, artifact=next(files)))
        if node.config.artifact
        else node
        for node in made.nodes
    )
    return replace(made, nodes=nodes)
