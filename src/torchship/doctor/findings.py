"""What is odd about a module itself, whatever the route: modes, sharing, formats, randomness, constants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchship.doctor import catalog, failure, suspects
from torchship.doctor.subject import Subject, call, worst_error
from torchship.optimize.axes import UNSTEADY
from torchship.optimize.places import Place, is_installed, place_now

_HUGE = 16 * 2**20
_MODES = ("Dropout", "BatchNorm", "InstanceNorm")


class Finding(msgspec.Struct, frozen=True):
    """One thing to know: `bad` gives wrong results, `warn` costs speed or an export, `info` is worth knowing."""

    name: str
    level: Literal["info", "warn", "bad"]
    words: str
    edit: str = ""
    place: Place | None = None


def examine(subject: Subject) -> list[Finding]:
    """All findings, the worst first."""
    found = [
        *_modes(subject),
        *_sharing(subject),
        *_formats(subject.module),
        *_constants(subject.module),
        *_runs(subject),
        *_suspects(subject),
    ]
    return sorted(found, key=lambda finding: ("bad", "warn", "info").index(finding.level))


def _listed(names: Iterable[str], most: int = 4) -> str:
    every = [name or "(the module itself)" for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def _modes(subject: Subject) -> Iterator[Finding]:
    inner: Any = subject.model.module
    fixed = _training(inner.inner)
    if fixed:
        words = f"stays in train mode after eval(): {_listed(fixed)}"
        yield Finding("train mode", "bad", words, "let its train(mode) and eval() reach these modules")
    parts = [name for name in _training(subject.module) if name not in fixed]
    if parts:
        words = f"dropout or batch norm is in train mode: {_listed(parts)}"
        # no more than a warning: every module is made in train mode
        yield Finding("train mode", "warn", words, "torchship's copy is in eval mode; elsewhere call module.eval()")


def _training(module: torch.nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if part.training and type(part).__name__.startswith(_MODES)]


def _sharing(subject: Subject) -> Iterator[Finding]:
    module = subject.module
    names: dict[int, list[str]] = defaultdict(list)
    for name, part in module.named_modules(remove_duplicate=False):
        names[id(part)].append(name)
    shared = [group for group in names.values() if len(group) > 1]
    if shared:
        words = f"one module is used in several places: {'; '.join(' = '.join(group[:3]) for group in shared[:3])}"
        yield Finding("shared module", "warn", words, "some quantizers need a module for each place: un-share it")
    calls = _called_twice(subject)
    if calls:
        words = f"called more than once in a forward: {_listed(calls)}"
        yield Finding("module used twice", "info", words, "some quantizers (PT2E for x86) need a module for each call")
    weights: dict[int, list[str]] = defaultdict(list)
    for name, weight in module.named_parameters(remove_duplicate=False):
        weights[id(weight)].append(name)
    tied = [
        group for group in weights.values() if len(group) > 1 and len({name.rpartition(".")[0] for name in group}) > 1
    ]
    tied = [group for group in tied if not any(set(_owners(group)) <= set(shares) for shares in shared)]
    if tied:
        yield Finding(
            "tied weights", "info", f"one weight under several names: {'; '.join(' = '.join(g) for g in tied[:3])}"
        )


def _owners(names: Sequence[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in names]


def _called_twice(subject: Subject) -> list[str]:
    """The innermost modules that one forward calls more than once (as torchvision's ResNet blocks do their ReLU)."""
    counts: dict[str, int] = defaultdict(int)
    inner: Any = subject.model.module

    def count(name: str) -> None:
        counts[name] += 1

    leaves = [(name, part) for name, part in inner.inner.named_modules() if name and not any(part.children())]
    hooks = [part.register_forward_pre_hook(lambda *_, name=name: count(name)) for name, part in leaves]
    call(inner, subject.tensors())
    for hook in hooks:
        hook.remove()
    return [f"{name} ({number} times)" for name, number in counts.items() if number > 1]


def _formats(module: torch.nn.Module) -> Iterator[Finding]:
    named = [*module.named_parameters(), *module.named_buffers()]
    double = [name for name, tensor in named if tensor.dtype == torch.float64]
    if double:
        words = f"{_listed(double)}: twice the memory, and no fast kernel anywhere"
        yield Finding("float64 weights", "warn", words, "module.float(), unless the digits matter")
    half = [name for name, tensor in named if tensor.dtype in (torch.float16, torch.bfloat16)]
    if half:
        yield Finding("half weights", "info", f"weights in {named[0][1].dtype}: {_listed(half)}; the reference is fp32")
    odd = [name for name, tensor in named if not tensor.is_contiguous() and not _channels_last(tensor)]
    if odd:
        words = f"weights that are not contiguous: {_listed(odd)}"
        yield Finding("non-contiguous weights", "info", words, "weight.data = weight.data.contiguous()")
    placed = {str(tensor.device) for _, tensor in named}
    if len(placed) > 1:
        yield Finding("several devices", "bad", f"weights lie on {', '.join(sorted(placed))}", "module.to('cpu')")


def _channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _constants(module: torch.nn.Module) -> Iterator[Finding]:
    loose = {
        f"{name}.{key}".strip("."): value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    }
    if loose:
        words = f"tensors that are neither parameter nor buffer: {_listed(loose)}: .to() and state_dict() miss them"
        yield Finding("loose tensor", "warn", words, "register_buffer('name', tensor, persistent=False)")
    held = [*module.named_buffers(), *loose.items()]
    huge = [(name, tensor.nbytes) for name, tensor in held if tensor.nbytes >= _HUGE]
    if huge:
        words = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in huge[:4])
        yield Finding("huge constant", "warn", f"large constants go into every file: {words}", "compute it in forward")


def _runs(subject: Subject) -> Iterator[Finding]:
    """What two or three runs tell: randomness, writes into inputs, memory order, other lengths."""
    module, tensors = subject.model.module, subject.tensors()
    torch.manual_seed(0)
    first = call(module, tensors)
    torch.manual_seed(1)
    error = worst_error(first, call(module, tensors))
    if error > 1e-5:
        yield _unstable(subject, error)
    if any(not torch.isfinite(output).all() for output in first if output.is_floating_point()):
        yield Finding("NaN or infinity", "bad", "the output for the example input holds NaN or infinity")
    yield from _writes(subject)
    yield from _memory_order(subject, first)
    yield from _noted(module)
    try:
        call(module, subject.unseen())
    except Exception as fault:
        place = failure.of(fault).place
        words = f"fails on other lengths of its free axes: {' '.join(str(fault).split())[:160]}"
        yield Finding("free axes", "bad", words, "narrow the axes: rows:2..16, or a fixed number", place)


def _unstable(subject: Subject, error: float) -> Finding:
    """Random numbers where two runs from one seed agree; else something that outlives the call."""
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(call(subject.model.module, subject.tensors()))
    drawn = worst_error(*runs) <= 1e-5
    part = _unstable_part(subject)
    words = f"two runs on the same input differ by {error:.2g}{f', first in {part}' if part else ''}"
    if drawn:
        kinds: tuple[str, ...] = ("random numbers", "dropout that eval() cannot switch off")
        edit = "remove the random numbers from forward, or pass them in"
    else:
        kinds = ("side effect in Python",)
        words += ", from the same random numbers too: something outlives the call"
        edit = "pass the state in and return it, or keep it out of forward"
    place = next((place for name, place in suspects.scan(subject.module) if name in kinds), None)
    return Finding("unstable output", "bad", words, edit, place)


def _unstable_part(subject: Subject) -> str:
    """The first part, in the order of the calls, whose output differs between two runs."""
    records: list[list[tuple[str, torch.Tensor]]] = []
    inner: Any = subject.model.module
    for seed in (0, 1):
        seen: list[tuple[str, torch.Tensor]] = []
        hooks = [
            part.register_forward_hook(
                lambda _part, _given, output, name=name, seen=seen: (
                    seen.append((name, output.clone())) if isinstance(output, torch.Tensor) else None
                )
            )
            for name, part in inner.inner.named_modules()
            if name
        ]
        torch.manual_seed(seed)
        call(inner, subject.tensors())
        for hook in hooks:
            hook.remove()
        records.append(seen)
    return next((a[0] for a, b in zip(*records, strict=False) if not torch.equal(a[1], b[1])), "")


class _Writing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the line that first writes into each of some tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: dict[int, Place | None] = {}
        self._held = {tensor.untyped_storage()._cdata: index for index, tensor in enumerate(tensors)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given, value in zip(func._schema.arguments, args, strict=False):
            if given.alias_info is not None and given.alias_info.is_write and isinstance(value, torch.Tensor):
                index = self._held.get(value.untyped_storage()._cdata)
                if index is not None:
                    self.places.setdefault(index, place_now())
        return func(*args, **(kwargs or {}))


def _writes(subject: Subject) -> Iterator[Finding]:
    written: Sequence[int] = getattr(subject.model.module, "written", ())
    if not written:
        return
    tensors = [tensor.clone() for tensor in subject.tensors()]
    inner: Any = subject.model.module
    args, kwargs = inner.frame.fill(tensors)
    with torch.no_grad(), _Writing(tensors) as seen:
        inner.inner(*args, **kwargs)
    for index in written:
        name = subject.model.signature.inputs[index].name
        words = f"forward changes its input {name!r} in place: elsewhere the caller's data is overwritten"
        edit = f"begin with {name} = {name}.clone()"
        yield Finding("writes into its input", "warn", words, edit, seen.places.get(index))


def _noted(module: Any) -> Iterator[Finding]:
    """What capture found out."""
    for note in getattr(module, "notes", ()):
        if note.startswith("forward changes buffers"):
            yield Finding("changed buffers", "warn", note, "return the new state, and pass it in with the next call")
        elif note != UNSTEADY:  # that is found here, with the part that it comes from
            yield Finding("axes", "warn" if "fixed" in note else "info", note)


def _memory_order(subject: Subject, first: Sequence[torch.Tensor]) -> Iterator[Finding]:
    """The same values in another memory order must give the same answer."""
    turned = [tensor.mT.contiguous().mT if tensor.ndim >= 2 else tensor for tensor in subject.tensors()]
    try:
        with torch.inference_mode():
            again = subject.model.module(*turned)
    except Exception as fault:
        found = failure.of(fault)
        words = f"fails on inputs that are not contiguous: {' '.join(str(fault).split())[:120]}"
        yield Finding("non-contiguous input", "warn", words, "use reshape instead of view", found.place)
        return
    if (
        worst_error(first, tuple(again)) > 1e-2
        and worst_error(first, call(subject.model.module, subject.tensors())) < 1e-5
    ):
        yield Finding(
            "non-contiguous input", "bad", "gives other results on inputs that are not contiguous", "x.contiguous()"
        )


def _suspects(subject: Subject) -> Iterator[Finding]:
    """What the source shows, and where values decided while forward ran that the source does not show."""
    seen = list(dict.fromkeys(suspects.scan(subject.module)))
    for name, place in seen:
        row = catalog.named(name)
        if row is not None and row.seen:  # the others are nothing odd in themselves
            yield Finding(name, "warn" if row.serious else "info", row.seen, "", place)
    lines = {(place.file, place.line) for _, place in seen}
    for place in getattr(subject.model.module, "decided", ()):
        if (place.file, place.line) not in lines:
            words = "values of a tensor decide here what runs, or how long a result is: a trace freezes that"
            yield Finding("values decide", "info" if is_installed(place.file) else "warn", words, "", place)
