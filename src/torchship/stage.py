"""The Stage: Tensors in, Tensors out; and how one is made of a function or of an opened engine.

A *row* stage (`signature.batched`) is called with the rows of many jobs joined and its output is split back by rows.
A *job* stage is called with one job's tensors and may change the number of rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import msgspec
import numpy as np

from torchship.errors import BadConfig, BadInput, StageFailed, Unavailable
from torchship.plugins import make_callable
from torchship.tensors import Array, Signature, Tensors, as_array

Value: TypeAlias = str | int | float | bool
Parameters: TypeAlias = Mapping[str, Value]


class Parameter(msgspec.Struct, frozen=True):
    """A value that a request may set for a stage: a threshold, top-k. Bounds are inclusive."""

    name: str
    default: Value
    low: float | None = None
    high: float | None = None
    about: str = ""

    def check(self, value: object) -> Value:
        """`value` in the type of the default. Raises BadInput naming parameter, type and bounds."""
        kind = type(self.default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is float and number:
            value = float(cast(float, value))
        if type(value) is not kind:
            raise BadInput(f"parameter {self.name!r} is {value!r}, expected {kind.__name__}", hint=self.about)
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        if number and not low <= float(cast(float, value)) <= high:  # NaN lies within no bounds
            raise BadInput(f"parameter {self.name!r} is {value}, expected {self.low} to {self.high}", hint=self.about)
        return value


@runtime_checkable
class Stage(Protocol):
    """Tensors in, Tensors out. Not called from two threads at once. `close` may be called twice."""

    signature: Signature
    max_batch: int
    parameters: tuple[Parameter, ...]

    def __call__(self, tensors: Tensors, parameters: Parameters = ...) -> Tensors:
        """Run on `tensors`, already checked against the signature; `parameters` holds the request's."""

    def close(self) -> None:
        """Give memory, files and devices back."""


def select(wanted: Sequence[Parameter], given: Parameters, defaults: Parameters = {}) -> dict[str, Value]:
    """The values for `wanted` out of a request's parameters, checked; else the pipeline's or the stage's default."""
    chosen: dict[str, Value] = {}
    for parameter in wanted:
        value = given.get(parameter.name, defaults.get(parameter.name, parameter.default))
        chosen[parameter.name] = parameter.check(value)
    return chosen


def stage(text: str, *, batched: bool = False, max_batch: int = 0) -> Callable[[Any], Any]:
    """Declare the signature of a function or class that is to be used as a stage; it changes nothing else.

    `text` reads `image:BYTES[1] -> pixels:FP32[1,3,224,224]`. A function without `batched` is a job stage.
    Positional parameters are the tensors it consumes, with a default where the input is optional (`mask?:BOOL[-1]`);
    keyword-only ones are the values a request may set, bounded by `Annotated[float, msgspec.Meta(ge=0, le=1,
    description=...)]`. It returns a mapping, or the arrays in the order of the outputs. A generator function streams
    several answers. A class is made once in each worker with the stage's options, then called the same way; it may
    have `close`, and a class method `declare(**options) -> str` where its signature depends on its options.
    """
    signature = Signature.parse(text, batched=batched)

    def declared(body: Any) -> Any:
        body.torchship_stage = (signature, max_batch or (64 if batched else 1))
        return body

    return declared


def declaration(body: Any, options: Mapping[str, Any] = {}) -> tuple[Signature, int]:
    """The signature and `max_batch` of a declared function or class, for its options. Raises BadConfig."""
    declared = getattr(body, "torchship_stage", None)
    if declared is None:
        raise BadConfig(f"{body!r} declares no signature", hint='put @stage("inputs -> outputs") on it')
    signature, max_batch = declared
    if isinstance(body, type):
        try:
            inspect.signature(body).bind(**options)
        except TypeError as fault:
            raise BadConfig(f"options of {body.__qualname__}: {fault}") from None
        if hasattr(body, "declare"):
            signature = Signature.parse(body.declare(**options), batched=signature.batched)
    elif options:
        raise BadConfig(f"{body.__qualname__} takes no options: {sorted(options)}", hint="set parameters instead")
    defaults_of(body, signature)
    return signature, max_batch


def defaults_of(body: Any, signature: Signature) -> dict[str, Any]:
    """What stands for each optional input of a declared function or class where it is left out.

    Raises BadConfig for one that has no default.
    """
    if len(signature.required) == len(signature.inputs):
        return {}
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [one for one in inspect.signature(called(body)).parameters.values() if one.kind in kinds]
    places = places[1:] if isinstance(body, type) else places  # without self
    known = {spec.name: one.default for spec, one in zip(signature.inputs, places, strict=False)}
    found = {spec.name: known.get(spec.name, inspect.Parameter.empty) for spec in signature.inputs if spec.optional}
    bare = [name for name, default in found.items() if default is inspect.Parameter.empty]
    if bare:
        raise BadConfig(
            f"{body.__qualname__} has no default for its optional inputs {bare}", hint="as in def f(x, mask=None)"
        )
    return found


def called(body: Any) -> Callable[..., Any]:
    """The function that runs when a declared function, or an instance of a declared class, is called.

    Raises BadConfig for a class whose instances cannot be called.
    """
    if not isinstance(body, type):
        return cast("Callable[..., Any]", body)
    for owner in body.__mro__:
        if "__call__" in vars(owner):
            return cast("Callable[..., Any]", vars(owner)["__call__"])
    raise BadConfig(f"{body.__qualname__} has no __call__", hint="write what the stage does as __call__(self, tensors)")


def declared_parameters(body: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The values that a request may set: the keyword-only parameters of a function. Raises BadConfig."""
    found = []
    for name, parameter in inspect.signature(body).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if not isinstance(parameter.default, str | int | float | bool):
            raise BadConfig(f"stage parameter {name!r} needs a default that is a string, number or boolean")
        annotation = parameter.annotation
        # text because of `from __future__ import annotations`; those of tensors may name what only type checkers import
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, getattr(inspect.unwrap(body), "__globals__", {}))  # noqa: S307  # own code
            except Exception as fault:
                raise BadConfig(
                    f"stage parameter {name!r}: its annotation {annotation!r} cannot be read: {fault}",
                    hint="import what it names outside of `if TYPE_CHECKING`",
                ) from None
        metas = [meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
        meta = metas[0] if metas else msgspec.Meta()
        low, high = (None if bound is None else float(bound) for bound in (meta.ge, meta.le))
        found.append(Parameter(name, parameter.default, low, high, meta.description or ""))
    return tuple(found)


class FunctionStage:
    """A declared function, or an instance of a declared class, as a Stage."""

    def __init__(self, body: Callable[..., Any], *, options: Mapping[str, Any] = {}) -> None:
        """Raises BadConfig when `body` is not declared with `@stage` or does not take its options."""
        self.signature, self.max_batch = declaration(body, options)
        self._absent = defaults_of(body, self.signature)
        self._body: Callable[..., Any] = body(**options) if isinstance(body, type) else body
        call = called(body)
        self.parameters = declared_parameters(call)
        self.streams = inspect.isgeneratorfunction(call)

    def __call__(self, tensors: Tensors, parameters: Parameters = {}) -> Tensors:
        """One answer. Raises BadInput for a parameter that is out of its bounds."""
        return self._named(self._run(tensors, parameters))

    def stream(self, tensors: Tensors, parameters: Parameters = {}) -> Iterator[Tensors]:
        """All answers of a generator, or the one answer of a function."""
        answers = self._run(tensors, parameters)
        yield from map(self._named, answers if self.streams else (answers,))

    def _run(self, tensors: Tensors, parameters: Parameters) -> Any:
        given: Mapping[str, Any] = {**self._absent, **tensors} if self._absent else tensors
        consumed = (given[spec.name] for spec in self.signature.inputs)
        return self._body(*consumed, **select(self.parameters, parameters))

    def _named(self, answer: Any) -> Tensors:
        names = [spec.name for spec in self.signature.outputs]
        if not isinstance(answer, Mapping):
            answer = dict(zip(names, answer if isinstance(answer, tuple) else (answer,), strict=True))
        missing = [name for name in names if name not in answer]
        if missing:
            raise BadConfig(
                f"the stage returned {sorted(answer)} without {missing}", hint="return every declared output"
            )
        try:
            return {name: as_array(answer[name]) for name in names}
        except BadInput as fault:  # the stage's, not the caller's
            raise StageFailed(f"the stage returned what is no tensor: {fault}", hint=fault.hint) from None

    def close(self) -> None:
        """Close the instance, if it is one that can be closed."""
        close = getattr(self._body, "close", None)
        if close is not None:
            close()


class EngineStage:
    """A model that an engine has opened: `run` takes the tensors and gives arrays in the order of the outputs."""

    def __init__(self, run: Callable[[Tensors], Sequence[Array]], *, signature: Signature) -> None:
        self.signature, self.max_batch = signature, signature.max_rows
        self.parameters: tuple[Parameter, ...] = ()
        self._run: Callable[[Tensors], Sequence[Array]] | None = run

    def __call__(self, tensors: Tensors, parameters: Parameters = {}) -> Tensors:
        """Run on the host's arrays. Raises Unavailable once it is closed."""
        if self._run is None:
            raise Unavailable("the stage is closed")
        return {spec.name: array for spec, array in zip(self.signature.outputs, self._run(tensors), strict=True)}

    def close(self) -> None:
        """Forget the engine, which frees its memory."""
        self._run = None


def join(jobs: Sequence[Tensors]) -> Tensors:
    """The rows of several jobs as one batch; the jobs hold the same tensors."""
    if len(jobs) == 1:
        return jobs[0]
    return {name: np.concatenate([job[name] for job in jobs]) for name in jobs[0]}


make_callable(__name__, verb="torchship.stage:stage")
