"""Faults of stages: whatever a stage raises, as plain data that cannot fail, and back as an error that names the stage.

A pipeline in one process and a line of processes say the same about the same fault, because both go this way.
"""

from __future__ import annotations

import msgspec

from torchship import errors
from torchship.errors import Busy, StageFailed, TorchshipError, Unavailable

_LONGEST = 2000  # characters of a message or a hint
_KINDS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TorchshipError)
}
_FOREIGN = "Exception"  # any error that is not of our tree
_OUT_OF_MEMORY = "OutOfMemoryError"  # torch's and CuPy's; its text tells of other processes
_AGAIN = 1.0  # seconds after which a device may have memory again
# After one of these nothing works on that device in this process: CUDA Runtime API, "Error Handling", cudaError_t;
# cuBLAS and cuDNN say it in their own way. A lack of memory is none.
_LOST = ("CUDA error", "CUDA failure", "device-side assert", "illegal memory access", "unspecified launch failure",
         "misaligned address", "illegal instruction", "launch timed out", "uncorrectable ECC",
         "CUBLAS_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_EXECUTION_FAILED")  # fmt: skip
_KEPT = ("CUDA error: out of memory", "CUDA failure 2:")


class Fault(msgspec.Struct, array_like=True, frozen=True):
    """Why a job has no answer; `kind` is the name of an error class, `job` counts within the batch that it was in, and
    `retry_after` seconds it may be worth to try again (0: not known)."""

    job: int
    kind: str
    message: str
    hint: str = ""
    retry_after: float = 0.0


def words_of(fault: BaseException, *, most: int = _LONGEST) -> str:
    """What an exception says, on one line; what is no UTF-8 is escaped, what is too long is cut. Never raises."""
    try:
        text = str(fault)
    except BaseException as broken:  # a `__str__` may raise anything
        return f"(its message cannot be read: {type(broken).__name__})"
    return _line(text.partition("\n")[0] if "CUDA error" in text else text, most)  # CUDA goes on with advice


def named(fault: BaseException) -> str:
    """An exception with its kind, cut short."""
    return f"{type(fault).__name__}: {words_of(fault, most=300)}"


def describe(fault: BaseException, *, job: int = 0) -> Fault:
    """An exception as data: errors of our own keep their kind, a device without memory is Unavailable, all others
    become StageFailed."""
    text = words_of(fault)
    if isinstance(fault, TorchshipError):
        kind = next(kind.__name__ for kind in type(fault).__mro__ if kind.__name__ in _KINDS)
        wait = float(fault.retry_after) if isinstance(fault, Busy | Unavailable) else 0.0
        return Fault(job, kind, text, _line(str(getattr(fault, "hint", "")), _LONGEST), wait)
    if type(fault).__name__ == _OUT_OF_MEMORY:
        words = (
            "its device has no memory left",
            "try again later, with a smaller input; torchship doctor tells who holds a card",
        )
        return Fault(job, Unavailable.__name__, *words, _AGAIN)
    name = _line(type(fault).__name__, 200)
    return Fault(job, _FOREIGN, f"raised {name}: {text}" if text else f"raised {name}")


def revive(fault: Fault, *, stage: str) -> TorchshipError:
    """The error that a Fault describes; it names the stage."""
    colon = " " if fault.kind == _FOREIGN else ": "
    error = _KINDS.get(fault.kind, StageFailed)(f"stage {stage!r}{colon}{fault.message}", hint=fault.hint)
    if isinstance(error, Busy | Unavailable):
        error.retry_after = fault.retry_after
    return error


def is_device_lost(text: str) -> bool:
    """Whether an error with this text leaves a process without its device: nothing will run there any more."""
    return any(word in text for word in _LOST) and not any(word in text for word in _KEPT)


def blame(fault: TorchshipError, *, where: str) -> TorchshipError:
    """The same error with the path of what it is about in front."""
    return type(fault)(f"{where}: {fault}", hint=fault.hint)


def _line(text: str, most: int) -> str:
    return " ".join(text[: 8 * most].encode(errors="backslashreplace").decode().split())[:most]
