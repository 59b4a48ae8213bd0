"""Runs in an environment of its own, which holds KServe's client: asks a server both ways and prints what it heard."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

NUMBERS = np.arange(16, dtype=np.int32).reshape(1, 16)


def question(*, binary: bool) -> Any:
    inputs = [InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
    for one in inputs:
        one.set_data_from_numpy(NUMBERS, binary_data=binary)
    return InferRequest(model_name="add_sub", infer_inputs=inputs, request_id="k")


async def main(http: str, grpc: str) -> None:
    heard: dict[str, Any] = {}
    rest, base = InferenceRESTClient(RESTConfig(protocol="v2", verbose=False)), f"http://{http}"
    heard["rest ready"] = [
        await rest.is_server_ready(base), await rest.is_server_live(base), await rest.is_model_ready(base, "add_sub")
    ]  # fmt: skip
    remote = InferenceGRPCClient(grpc)
    heard["grpc ready"] = [await remote.is_server_ready(), await remote.is_model_ready("add_sub")]
    for binary in (False, True):
        for name, ask in (
            ("rest", rest.infer(base, question(binary=binary), model_name="add_sub")),
            ("grpc", remote.infer(question(binary=binary))),
        ):
            answer = await ask
            heard[f"{name} {binary}"] = [answer.id, answer.outputs[0].as_numpy().tolist()]
    await remote.close()
    print(json.dumps(heard))


asyncio.run(main(*sys.argv[1:]))
