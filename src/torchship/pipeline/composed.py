"""Composed: a whole pipeline as one Stage in this process; and whatever was published, opened as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from torchship.artifact import Artifact, Store, open_artifact
from torchship.errors import BadInput
from torchship.pipeline import rows
from torchship.pipeline.config import PipelineConfig, StageConfig
from torchship.pipeline.faults import blame, describe, revive
from torchship.pipeline.opening import open_stage
from torchship.pipeline.planning import Node, Plan, plan
from torchship.stage import Parameters, Stage, select
from torchship.tensors import Array, Tensors, plain


class Composed:
    """Runs every node of a plan, those that do not wait for one another at the same time. The Line gives the same
    answers with processes."""

    def __init__(self, plan: Plan, store: Store | None = None) -> None:
        """Open all stages; when one fails, those already open are closed. Raises what `open_stage` raises."""
        self.plan = plan
        self.signature = plan.signature
        self.max_batch = plan.max_batch
        self.parameters = plan.parameters
        self._stages: list[Stage] = []
        branches = any(len(plan.before(node)) < node.index for node in plan.nodes)
        self._pool = ThreadPoolExecutor(len(plan.nodes)) if branches else None
        try:
            for node in plan.nodes:
                self._stages.append(open_stage(node.config, store))
        except BaseException:
            self.close()
            raise

    def __call__(self, tensors: Tensors, parameters: Parameters = {}) -> Tensors:
        """The outputs for one job. Raises BadInput, StageFailed naming the stage."""
        slots = self._start(tensors)
        self._run(self.plan.nodes, slots, parameters)
        return self._answer(slots)

    def stream(self, tensors: Tensors, parameters: Parameters = {}) -> Iterator[Tensors]:
        """All answers of a pipeline whose last stage streams; the one answer of any other."""
        if not self.plan.streams:
            yield self(tensors, parameters)
            return
        slots = self._start(tensors)
        last = self.plan.nodes[-1]
        self._run(self.plan.nodes[:-1], slots, parameters)
        for outputs in stream_node(last, self._stages[-1], slots, parameters):
            yield self._answer(slots | dict(zip(last.gives, outputs.values(), strict=True)))

    def close(self) -> None:
        """Close all stages, the last first."""
        if self._pool:
            self._pool.shutdown()
        while self._stages:
            self._stages.pop().close()

    def _start(self, tensors: Tensors) -> dict[str, Array]:
        specs = self.plan.signature.inputs
        return {
            key: plain(tensors[spec.name])
            for key, spec in zip(self.plan.inputs, specs, strict=True)
            if spec.name in tensors or not spec.optional
        }

    def _run(self, nodes: Sequence[Node], slots: dict[str, Array], parameters: Parameters) -> None:
        """Run `nodes`, each as soon as what it waits for is done; a chain lets go of tensors that nobody needs."""
        if self._pool is None:
            for node in nodes:
                outputs = run_node(node, self._stages[node.index], slots, parameters)
                slots.update(zip(node.gives, outputs.values(), strict=True))
                for key in slots.keys() - set(node.keeps):
                    del slots[key]
            return
        waiting = {node.index: node for node in nodes}
        running: dict[Future[Tensors], Node] = {}
        done: set[int] = set()
        while waiting or running:
            for node in [node for node in waiting.values() if done.issuperset(node.after)]:
                del waiting[node.index]
                stage = self._stages[node.index]
                running[self._pool.submit(run_node, node, stage, dict(slots), parameters)] = node
            finished = wait(running, return_when=FIRST_COMPLETED).done
            if any(found.exception() for found in finished):
                wait(running)  # a stage is not called again before it has returned
            for found in sorted(finished, key=lambda future: running[future].index):
                node = running.pop(found)
                slots.update(zip(node.gives, found.result().values(), strict=True))
                done.add(node.index)

    def _answer(self, slots: dict[str, Array]) -> Tensors:
        specs = self.plan.signature.outputs
        return {spec.name: slots[key] for key, spec in zip(self.plan.outputs, specs, strict=True)}


def take(node: Node, slots: dict[str, Array]) -> dict[str, Array]:
    """The tensors that `node` takes out of a job's slots, under its own names; checked where the plan could not.

    An optional input whose slot is not there, or holds None, is left out. Raises BadInput naming the stage and the
    tensor.
    """
    taken = {
        spec.name: slots[key]
        for spec, key in zip(node.signature.inputs, node.takes, strict=True)
        if not spec.optional or slots.get(key) is not None
    }
    if not node.checked:
        none_left = node.signature.batched and all(array.shape[:1] == (0,) for array in taken.values())
        try:
            if not none_left:
                node.signature.check(taken)
        except BadInput as fault:
            raise blame(fault, where=f"stage {node.name!r}") from None
    return taken


@contextmanager
def _blamed(node: Node) -> Iterator[None]:
    """Whatever a stage raises, as an error that names it: SystemExit too, for it may fail, but not end the process."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as fault:
        raise revive(describe(fault), stage=node.name) from fault


def run_node(node: Node, stage: Stage, slots: dict[str, Array], parameters: Parameters) -> Tensors:
    """Run one node for one job, with the request's parameters that it names; its outputs in their order.

    Raises BadInput, StageFailed.
    """
    taken, values = take(node, slots), select(node.parameters, parameters, node.defaults)
    with _blamed(node):
        outputs = rows.run(stage, taken, values, max_batch=node.max_batch, declared=node.signature)
        return rows.check_outputs(node.signature, outputs)


def stream_node(node: Node, stage: Stage, slots: dict[str, Array], parameters: Parameters) -> Iterator[Tensors]:
    """The same for a node that streams."""
    taken, values = take(node, slots), select(node.parameters, parameters, node.defaults)
    answers = stage.stream(taken, values)  # type: ignore[attr-defined]
    while True:
        with _blamed(node):
            answer = next(answers, None)
            outputs = None if answer is None else rows.check_outputs(node.signature, answer)
        if outputs is None:
            return
        yield outputs


def plan_target(
    target: Path | str, *, store: Store | None = None, device: str = "cpu", threads: int = 0, trust: bool = False
) -> Plan:
    """The plan of a published model or pipeline, as a server would run it alone. Raises what `plan` raises."""
    found = store or Store()
    path = target if isinstance(target, Path) else found.resolve(target)
    artifact = open_artifact(path, verify=False)
    stage = StageConfig(artifact=str(path.absolute()), device=device, threads=threads, trust=trust)
    return plan(PipelineConfig(artifact.manifest.name, (stage,)), found)


def open_target(
    target: Artifact | Path | str,
    *,
    store: Store | None = None,
    device: str = "cpu",
    threads: int = 0,
    trust: bool = False,
) -> Stage:
    """Open an artifact as a Stage: an Artifact, a folder, or `name`, `name@current` or `name@3` in the store.

    A model is one stage; the stages of a pipeline all run in this process. `threads=0` takes as many as there are
    cores; `trust` allows native code and foreign Python stages. Raises NotFound, ArtifactError, Unavailable.
    """
    found = store or Store()
    if isinstance(target, Artifact):
        target = target.path
    path = target if isinstance(target, Path) else found.resolve(target)
    if open_artifact(path, verify=False).manifest.kind == "model":
        return open_artifact(path).open(device=device, threads=threads, trust=trust)
    return Composed(plan_target(path, store=found, device=device, threads=threads, trust=trust), found)


open = open_target  # as `torchship.open`
