"""Which versions of a model should be served, and out of which files: found in the store, without opening anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from torchship.artifact import Store, open_artifact
from torchship.artifact.manifest import BatchPoint
from torchship.errors import NotFound
from torchship.pipeline.config import PipelineConfig
from torchship.pipeline.opening import describe_apart
from torchship.pipeline.planning import Node, Plan, plan
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


def lay_out(version: Wanted, store: Store, *, target: float = 0.0, labels: Sequence[str] = ()) -> Plan:
    """The plan of a version. It pins artifacts to folders, those of a published pipeline's own stages too, so that a
    worker that is replaced opens the same files again.

    Where nothing else is said, a model's largest batch comes from its measured curve; `target` is a latency in seconds.
    `labels` name its classes, instead of those of the artifact.
    """
    made = plan(version.pipeline, store, describing=describe_apart)
    nodes = tuple(_batched(node, target) if node.config.artifact else node for node in made.nodes)
    return replace(made, nodes=nodes, labels=tuple(labels) or made.labels)


def _batched(node: Node, target: float) -> Node:
    timing = open_artifact(node.config.artifact, verify=False).manifest.timing
    if timing is None or node.config.max_batch or not node.signature.batched:
        return node
    return replace(node, max_batch=best_batch(timing.curve, most=node.max_batch, target=target))


def best_batch(curve: Sequence[BatchPoint], *, most: int, target: float = 0.0) -> int:
    """The smallest batch with 95 % of the best throughput, among those that keep to half of `target` seconds.

    Half, because a request waits for the batch before its own. `most` where nothing was measured.
    """
    points = [point for point in curve if point.batch <= most]
    if target:
        points = [point for point in points if point.p90_ms <= target * 500] or points[:1]
    if not points:
        return most
    best = max(point.rows_per_s for point in points)
    chosen = min(point.batch for point in points if point.rows_per_s >= 0.95 * best)
    largest = max(point.batch for point in points)
    return most if chosen == largest and not target else chosen
