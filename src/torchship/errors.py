"""Every error that torchship raises on purpose, as one small tree; each carries a hint on how to mend it.

TorchshipError
├── BadInput          a tensor or a request does not fit the signature
├── BadConfig         a configuration, a recipe or a command line is wrong; the message starts with its path
├── NotFound          no such model, version, artifact, stage or file
├── Unsupported       a valid wish that this part cannot fulfil
├── Denied            the caller may not do this
│   └── Unauthenticated   nobody knows who the caller is
├── Busy              the line is full: try again after `retry_after` seconds
├── Expired           the deadline passed before an answer was ready
├── Cancelled         the caller went away, or the line was closed
├── Unavailable       nothing is there to do the work: a backend, a device, a remote server, a model that is not ready
├── StageFailed       a stage raised, died or hung while it ran this job
├── ArtifactError
│   ├── CorruptArtifact   the files are not what the manifest says
│   ├── UnsafeArtifact    opening it would run code or leave the folder
│   └── WrongMachine      native code that was built for another machine
└── OptimizeError
    ├── CaptureFailed     the module could not be turned into a Model
    ├── BuildFailed       a transform or a backend could not build a recipe
    ├── GuardRefused      the outputs differ too much from the reference
    └── NoWinner          no trial was both valid and inside the constraints
"""

from __future__ import annotations


class TorchshipError(Exception):
    """Root of the tree. `str(error)` is one line; `hint` says how to mend it and may be empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def line(self) -> str:
        """Message and hint on one line, as terminals and servers show it."""
        message = " ".join(str(self).split())
        return f"{message} ({self.hint})" if self.hint else message


class BadInput(TorchshipError):
    """A tensor or a request does not fit the signature."""


class BadConfig(TorchshipError):
    """A configuration, a recipe or a command line is wrong."""


class NotFound(TorchshipError):
    """No such model, version, artifact, stage or file."""


class Unsupported(TorchshipError):
    """A valid wish that this part cannot fulfil."""


class Denied(TorchshipError):
    """The caller may not do this."""


class Unauthenticated(Denied):
    """Nobody knows who the caller is."""


class Busy(TorchshipError):
    """The line is full."""

    def __init__(self, message: str, *, hint: str = "", retry_after: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class Expired(TorchshipError):
    """The deadline passed before an answer was ready."""


class Cancelled(TorchshipError):
    """The caller went away, or the line was closed."""


class Unavailable(TorchshipError):
    """Nothing is there to do the work. `retry_after`: it may be there in so many seconds, where that is known."""

    def __init__(self, message: str, *, hint: str = "", retry_after: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class StageFailed(TorchshipError):
    """A stage raised, died or hung while it ran this job."""


class ArtifactError(TorchshipError):
    """An artifact cannot be opened."""


class CorruptArtifact(ArtifactError):
    """The files are not what the manifest says."""


class UnsafeArtifact(ArtifactError):
    """Opening the artifact would run code or leave its folder."""


class WrongMachine(ArtifactError):
    """Native code that was built for another machine."""


class OptimizeError(TorchshipError):
    """A model could not be optimized."""


class CaptureFailed(OptimizeError):
    """The module could not be turned into a Model."""


class BuildFailed(OptimizeError):
    """A transform or a backend could not build a recipe."""


class GuardRefused(OptimizeError):
    """The outputs differ too much from the reference."""


class NoWinner(OptimizeError):
    """No trial was both valid and inside the constraints."""
