"""Models on a real card behind a real server: faults cost the guilty one only, and a killed worker comes back."""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.models import ON_CARD, WORDS, Hungry, Lookup, Perceptron, expected, packed, rows_for
from tests.journeys.test_server_process import Running, gone, metrics, serving, workers_of
from torchship.recipe import Options
from torchship.tensors import Array

pytestmark = ON_CARD


def infer(server: Running, model: str, name: str, array: Array) -> tuple[int, Any]:
    kind = {"f": "FP32", "i": "INT64"}[array.dtype.kind]
    given = {"name": name, "shape": list(array.shape), "datatype": kind, "data": array.ravel().tolist()}
    status, answer = server.ask(f"/v2/models/{model}/infer", {"inputs": [given]})
    return status, answer["outputs"][0]["data"] if status == 200 else answer["error"]


def test_a_killed_worker_comes_back_and_the_server_stops_cleanly(tmp_path: Path) -> None:
    options: Options = {"device": "cuda", "precision": "fp16", "graphs": True}
    packed(Perceptron, tmp_path / "mlp", backend="eager", options=options)
    text = f'[http]\nreceivers = 0\n[[model]]\nname = "mlp"\nartifact = "{tmp_path / "mlp"}"\n'
    with serving(text, tmp_path) as server:  # all its children are workers
        x = rows_for(Perceptron, 3)
        for _ in range(2):
            status, answer = infer(server, "mlp", "x", x)
            assert status == 200, answer
            np.testing.assert_allclose(np.reshape(answer, (3, 8)), expected(Perceptron, x), atol=1e-2)
            workers = workers_of(server)
            for worker in workers:
                worker.kill()
            assert gone(workers)
        workers = workers_of(server)
        server.child.send_signal(signal.SIGTERM)
        log = server.finish()
        assert server.child.returncode == 0
        assert "Traceback" not in log
        assert gone(workers)


def test_a_share_of_the_card_is_kept_and_a_request_beyond_it_may_try_again_later(tmp_path: Path) -> None:
    packed(Hungry, tmp_path / "hungry", backend="hybrid", options={"device": "cuda"})
    text = f'[[model]]\nname = "hungry"\nartifact = "{tmp_path / "hungry"}"\ntrust = true\nmemory_share = 0.02\n'
    with serving(text, tmp_path) as server:
        assert infer(server, "hungry", "x", np.ones((1, 1), np.float32)) == (200, [2.0])
        workers = {worker.pid for worker in workers_of(server)}
        body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [8000.0]}]}
        request = urllib.request.Request(f"{server.url}/v2/models/hungry/infer", data=json.dumps(body).encode())
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        with caught.value as refusal:
            assert (refusal.code, refusal.headers["retry-after"]) == (503, "1")
            words = refusal.read().decode()
        assert "no memory left" in words
        assert "GiB" not in words
        assert infer(server, "hungry", "x", np.ones((1, 1), np.float32)) == (200, [2.0])
        assert workers <= {worker.pid for worker in workers_of(server)}, "nobody had to be replaced"


def test_a_spare_worker_takes_over(tmp_path: Path) -> None:
    packed(Perceptron, tmp_path / "mlp", backend="eager", options={"device": "cuda", "graphs": True})
    text = f'[http]\nreceivers = 0\n[[model]]\nname = "mlp"\nartifact = "{tmp_path / "mlp"}"\n'
    with serving(text, tmp_path) as server:  # all its children are workers
        x = rows_for(Perceptron, 2)
        for restarts in (1, 2):
            wait_for_spare(server)
            workers = sorted(workers_of(server), key=lambda worker: float(worker.create_time()))
            workers[0].kill()
            status, answer = infer(server, "mlp", "x", x)
            assert status == 200, answer
            np.testing.assert_allclose(np.reshape(answer, (2, 8)), expected(Perceptron, x), atol=1e-4)
            text = metrics(server)
            assert f'torchship_worker_restarts_total{{model="mlp",version="1",stage="mlp"}} {restarts}' in text


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees one card")
def test_copies_run_on_several_cards_compiled_code_too(tmp_path: Path) -> None:
    options: Options = {"device": "cuda", "precision": "fp16"}
    packed(Perceptron, tmp_path / "mlp", backend="kernels", options=options, most=2)
    where = 'device = ["cuda:0", "cuda:1"]\ncopies = 2\ntrust = true'
    text = f'[http]\nreceivers = 0\n[[model]]\nname = "mlp"\nartifact = "{tmp_path / "mlp"}"\n{where}\n'
    with serving(text, tmp_path) as server:
        told = [(Path("/proc") / str(worker.pid) / "environ").read_bytes() for worker in workers_of(server)]
        assert sorted(b"CUDA_VISIBLE_DEVICES=1" in words for words in told) == [False, True]
        assert 'torchship_workers_ready{model="mlp",version="1",stage="mlp"} 2' in metrics(server)
        x = rows_for(Perceptron, 2)
        with ThreadPoolExecutor(8) as callers:
            for status, answer in callers.map(lambda _: infer(server, "mlp", "x", x), range(64)):
                assert status == 200, answer
                np.testing.assert_allclose(np.reshape(answer, (2, 8)), expected(Perceptron, x), atol=1e-2)


def wait_for_spare(server: Running) -> None:
    """Until a spare worker has opened."""
    end = time.monotonic() + 90
    while 'torchship_workers_spare{model="mlp",version="1",stage="mlp"} 1' not in metrics(server):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_an_assert_on_the_card_costs_the_guilty_one_its_request_and_nobody_else(tmp_path: Path) -> None:
    example = torch.arange(8).reshape(2, 4)
    packed(Lookup, tmp_path / "lookup", backend="hybrid", options={"device": "cuda"}, example=example)
    text = f'[[model]]\nname = "lookup"\nartifact = "{tmp_path / "lookup"}"\ntrust = true\n'
    with serving(text, tmp_path) as server, ThreadPoolExecutor(6) as callers:
        end = time.monotonic() + 8

        def ask(number: int) -> list[tuple[int, Any]]:
            found = []
            while time.monotonic() < end:
                found.append(infer(server, "lookup", "ids", np.full((1, 4), number)))
            return found

        good = [callers.submit(ask, number) for number in range(4)]
        time.sleep(1)
        status, words = infer(server, "lookup", "ids", np.full((1, 4), WORDS + 7))
        assert status == 500
        assert "CUDA error" in words
        for number, asked in enumerate(good):
            assert {(status, *answer) for status, answer in asked.result()} == {(200, number * 4)}
        server.child.send_signal(signal.SIGTERM)
        log = server.finish()
        assert log.count("Assertion") < 20, "a thousand threads assert, one line tells it"
