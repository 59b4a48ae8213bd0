"""A served model as the command line asks it: by the URL that people paste."""

from __future__ import annotations

from collections.abc import Mapping

from torchship.errors import BadInput
from torchship.stage import Value
from torchship.tensors import Array, Tensors


class ServedModel:
    """A model at a URL such as `http://host:8000/v2/models/name`, `http://host:8000/name` or `grpc://host:8000/name`."""

    def __init__(self, url: str, *, token: str = "") -> None:
        """Asks for the model's metadata. Raises BadInput, BadConfig, Unavailable, NotFound, Denied."""
        from torchship.client import Client
        from torchship.client.address import parse
        from torchship.wire.oip_json import signature_of

        found = parse(url)
        if not found.model:
            raise BadInput(f"{url} names no model", hint="as in http://127.0.0.1:8000/v2/models/classify")
        self._model, self._version = found.model, found.version
        self._client = Client(found.server, token=token)
        try:
            self.signature = signature_of(self._client.metadata(self._model, self._version))
        except BaseException:
            self._client.close()
            raise

    def __call__(self, tensors: Tensors, parameters: Mapping[str, Value] = {}) -> dict[str, Array]:
        """One answer. Raises what the server says."""
        return self._client.infer(self._model, tensors, version=self._version, parameters=parameters)

    def close(self) -> None:
        """Hang up."""
        self._client.close()
