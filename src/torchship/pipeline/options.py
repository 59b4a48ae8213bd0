"""Checks the options of a Python stage against the annotations of its class, before the class is made."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from torchship.errors import BadConfig

_PLAIN = {str, int, float, bool, list, dict, tuple, type(None), Any, object, Sequence, Mapping, typing.Union,
          types.UnionType}  # fmt: skip


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
    return (origin or annotation) in _PLAIN and all(map(_is_plain, parts))
