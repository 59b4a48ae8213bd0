"""A served model as the command line asks it: by a URL as it is pasted from a browser."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torchship.errors import BadInput
from torchship.stage import Value
from torchship.tensors import Array, Axis, Free, Signature, Tensors, TensorSpec

_URL = re.compile(
    r"(?P<server>(https?|grpcs?)://[^/]+)(/v2/models)?/(?P<model>[A-Za-z][\w.-]*)(/(versions/)?(?P<version>\w[\w.-]*))?/?"
)


class ServedModel:
    """A model at a URL such as `http://host:8000/v2/models/name`, `http://host:8000/name` or `grpc://host:8000/name`."""

    def __init__(self, url: str, *, token: str = "") -> None:
        """Asks for the model's metadata. Raises BadInput, Unavailable, NotFound, Denied."""
        from torchship.client import Client

        found = _URL.fullmatch(url)
        if not found:
            raise BadInput(f"{url} names no model", hint="as in http://127.0.0.1:8000/v2/models/classify")
        self._model, self._version = found["model"], found["version"] or ""
        self._client = Client(found["server"], token=token)
        try:
            facts = self._client.metadata(self._model, self._version)
        except BaseException:
            self._client.close()
            raise
        inputs, outputs = (tuple(map(_spec, facts.get(side, ()))) for side in ("inputs", "outputs"))
        self.signature = Signature(inputs, outputs, batched=False)

    def __call__(self, tensors: Tensors, parameters: Mapping[str, Value] = {}) -> dict[str, Array]:
        """One answer. Raises what the server says."""
        return self._client.infer(self._model, tensors, version=self._version, parameters=parameters)

    def close(self) -> None:
        """Hang up."""
        self._client.close()


def _spec(facts: Mapping[str, Any]) -> TensorSpec:
    shape: tuple[Axis, ...] = tuple(int(axis) if int(axis) >= 0 else Free(0) for axis in facts["shape"])
    return TensorSpec(facts["name"], facts["datatype"], shape)
