"""What is odd about a module itself, whatever the route: modes, sharing, formats, randomness, constants."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchship.doctor import catalog, failure, source
from torchship.doctor.catalog import Level
from torchship.doctor.subject import Subject, call, worst_error
from torchship.optimize.axes import UNSTEADY
from torchship.optimize.places import Place, is_installed, place_now

_HUGE = 16 * 2**20
_MODES = ("Dropout", "BatchNorm", "InstanceNorm")


class Finding(msgspec.Struct, frozen=True):
    """One thing to know: `bad` gives wrong results, `warn` costs speed or an export, `info` is worth knowing."""

    name: str
    level: Level
    words: str
    edit: str = ""
    place: Place | None = None


def examine(subject: Subject) -> list[Finding]:
    """All findings, the worst first."""
    checks = (_modes, _sharing, _weights, _constants, _runs, _seen)
    found = [finding for check in checks for finding in check(subject)]
    return sorted(found, key=lambda finding: ("bad", "warn", "info").index(finding.level))


def _told(key: str, place: Place | None = None, **facts: object) -> Finding:
    """The finding of the catalog's row, with what the check found out."""
    row = next(row for row in catalog.tables().finding if key == (row.key or row.name))
    return Finding(row.name, row.level, row.seen.format(**facts), row.edit.format(**facts), place)


def _listed(key: str, names: Iterable[str], **facts: Any) -> Iterator[Finding]:
    """The finding about these parts of the module, at most four of them named; none where there are none."""
    every = [name or "(the module itself)" for name in names]
    if every:
        more = f" and {len(every) - 4} more" if len(every) > 4 else ""
        yield _told(key, found=", ".join(every[:4]) + more, **facts)


def _modes(subject: Subject) -> Iterator[Finding]:
    inner: Any = subject.model.module
    fixed = _training(inner.inner)
    yield from _listed("train mode for ever", fixed)
    yield from _listed("train mode", [name for name in _training(subject.module) if name not in fixed])


def _training(module: torch.nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if part.training and type(part).__name__.startswith(_MODES)]


def _sharing(subject: Subject) -> Iterator[Finding]:
    module = subject.module
    shared = _doubled(module.named_modules(remove_duplicate=False))
    if shared:
        yield _told("shared module", found="; ".join(" = ".join(group[:3]) for group in shared[:3]))
    calls = Counter(name for name, part, _ in _calls(subject) if not any(part.children()))
    # as torchvision's ResNet blocks do their ReLU
    yield from _listed("module used twice", (f"{name} ({count} times)" for name, count in calls.items() if count > 1))
    weights = _doubled(module.named_parameters(remove_duplicate=False))
    owners = [{name.rpartition(".")[0] for name in names} for names in weights]
    tied = [
        " = ".join(names)
        for names, parts in zip(weights, owners, strict=True)
        if len(parts) > 1 and not any(parts <= set(group) for group in shared)
    ]
    if tied:
        yield _told("tied weights", found="; ".join(tied[:3]))


def _doubled(named: Iterable[tuple[str, object]]) -> list[list[str]]:
    """The names of each object that has several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, part in named:
        names[id(part)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _calls(subject: Subject, *, seed: int = 0, keep: bool = False) -> list[tuple[str, torch.nn.Module, Any]]:
    """What one forward calls, in the order in which it ends: name, part, and its output where that is to be kept."""
    inner: Any = subject.model.module
    seen: list[tuple[str, torch.nn.Module, Any]] = []

    def note(part: torch.nn.Module, output: Any, name: str) -> None:
        seen.append((name, part, output.clone() if keep and isinstance(output, torch.Tensor) else None))

    named = [(name, part) for name, part in inner.inner.named_modules() if name]
    hooks = [part.register_forward_hook(lambda part, _, output, n=name: note(part, output, n)) for name, part in named]
    torch.manual_seed(seed)
    call(inner, subject.tensors())
    for hook in hooks:
        hook.remove()
    return seen


def _weights(subject: Subject) -> Iterator[Finding]:
    named = dict((*subject.module.named_parameters(), *subject.module.named_buffers()))
    yield from _listed("float64 weights", (name for name, tensor in named.items() if tensor.dtype == torch.float64))
    half = {name: tensor.dtype for name, tensor in named.items() if tensor.dtype in (torch.float16, torch.bfloat16)}
    yield from _listed("half weights", half, dtype=next(iter(half.values()), None))
    yield from _listed("non-contiguous weights", (name for name, tensor in named.items() if not _in_order(tensor)))
    placed = {str(tensor.device) for tensor in named.values()}
    yield from _listed("several devices", sorted(placed) if len(placed) > 1 else [])


def _in_order(tensor: torch.Tensor) -> bool:
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last or tensor.is_contiguous()


def _constants(subject: Subject) -> Iterator[Finding]:
    loose = {
        f"{name}.{key}".strip("."): value
        for name, part in subject.module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    }
    yield from _listed("loose tensor", loose)
    held = (*subject.module.named_buffers(), *loose.items())
    huge = [f"{name} ({tensor.nbytes / 2**20:.0f} MiB)" for name, tensor in held if tensor.nbytes >= _HUGE]
    yield from _listed("huge constant", huge)


def _runs(subject: Subject) -> Iterator[Finding]:
    """What some runs tell: randomness, writes into inputs, memory order, other lengths."""
    module, tensors = subject.model.module, subject.tensors()
    torch.manual_seed(0)
    first = call(module, tensors)
    torch.manual_seed(1)
    error = worst_error(first, call(module, tensors))
    if error > 1e-5:
        yield _unstable(subject, error)
    if any(not torch.isfinite(output).all() for output in first if output.is_floating_point()):
        yield _told("NaN or infinity")
    yield from _writes(subject)
    yield from _memory_order(subject, first)
    for note in getattr(module, "notes", ()):
        if note.startswith("forward changes buffers"):
            yield _told("changed buffers", note=note)
        elif note != UNSTEADY:  # that is found here, with the part that it comes from
            yield _told("fixed axes" if "fixed" in note else "axes", note=note)
    try:
        call(module, subject.unseen())
    except Exception as fault:
        yield _told("free axes", failure.of(fault).place, fault=" ".join(str(fault).split()))


def _unstable(subject: Subject, error: float) -> Finding:
    """Random numbers where two runs from one seed agree; else something that outlives the call."""
    pairs = zip(_calls(subject, seed=0, keep=True), _calls(subject, seed=1, keep=True), strict=False)
    tensors = ((a[0], a[2], b[2]) for a, b in pairs if a[2] is not None and b[2] is not None)
    part = next((name for name, one, other in tensors if not torch.equal(one, other)), "")
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(call(subject.model.module, subject.tensors()))
    drawn = worst_error(*runs) <= 1e-5
    kinds = ("random numbers", "dropout that eval() cannot switch off") if drawn else ("side effect in Python",)
    place = next((place for name, place in source.scan(subject.module) if name in kinds), None)
    key = "unstable by random numbers" if drawn else "unstable by what outlives the call"
    return _told(key, place, error=error, part=f", first in {part}" if part else "")


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
    inner: Any = subject.model.module
    written: Sequence[int] = getattr(inner, "written", ())
    if not written:
        return
    tensors = [tensor.clone() for tensor in subject.tensors()]
    args, kwargs = inner.frame.fill(tensors)
    with torch.no_grad(), _Writing(tensors) as seen:
        inner.inner(*args, **kwargs)
    for index in written:
        name = subject.model.signature.inputs[index].name
        yield _told("writes into its input", seen.places.get(index), input=name)


def _memory_order(subject: Subject, first: Sequence[torch.Tensor]) -> Iterator[Finding]:
    """The same values in another memory order must give the same answer."""
    turned = [tensor.mT.contiguous().mT if tensor.ndim >= 2 else tensor for tensor in subject.tensors()]
    try:
        again = call(subject.model.module, turned)
    except Exception as fault:
        yield _told("contiguous inputs only", failure.of(fault).place, fault=" ".join(str(fault).split()))
        return
    same = call(subject.model.module, subject.tensors())
    if worst_error(first, again) > 1e-2 and worst_error(first, same) < 1e-5:
        yield _told("non-contiguous input")


def _seen(subject: Subject) -> Iterator[Finding]:
    """What the source shows, and where values decided while forward ran that the source does not show."""
    seen = list(dict.fromkeys(source.scan(subject.module)))
    for name, place in seen:
        row = catalog.constructs()[name]
        if row.seen:  # the others are nothing odd in themselves
            yield Finding(name, row.level, row.seen, "", place)
    lines = {(place.file, place.line) for _, place in seen}
    for place in getattr(subject.model.module, "decided", ()):
        if (place.file, place.line) not in lines:
            yield _told("values decide in a package" if is_installed(place.file) else "values decide", place)
