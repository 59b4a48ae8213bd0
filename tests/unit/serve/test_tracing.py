"""Spans: one for a request, one for each station, under the caller's trace."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import uvloop
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.serving import HERE
from torchship.artifact import Store
from torchship.pipeline.config import StageConfig
from torchship.serve.catalog import Catalog
from torchship.serve.config import ModelConfig, TraceConfig
from torchship.serve.service import Service
from torchship.serve.tracing import Traces
from torchship.wire.messages import Request

TRACE = "0af7651916cd43dd8448eb211c80319c"


def test_spans_of_a_pipeline(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    traces = Traces(TraceConfig(sample=0.0), exporter=exporter)
    stages = (StageConfig(run=f"{HERE}:double"), StageConfig(run=f"{HERE}:sums"))

    async def work() -> list[str]:
        catalog = Catalog(store=Store(tmp_path))
        try:
            async with asyncio.timeout(60):
                await catalog.load(ModelConfig(name="m", stages=stages))
                service = Service(catalog, traces=traces)
                row = np.ones((1, 4), np.float32)
                told = []
                for flags in ("01", "00"):
                    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-{flags}"}
                    told.append((await service.submit(Request("m", {"x": row}, id="r1", headers=headers))).trace)
                await service.submit(Request("m", {"x": row}))
                return told
        finally:
            await catalog.close()

    told = uvloop.run(work())
    traces.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert sorted(spans) == ["infer m", "stage double", "stage sums"]
    top = spans["infer m"]
    assert f"{top.context.trace_id:032x}" == TRACE
    assert told == [f"00-{TRACE}-{top.context.span_id:016x}-01", ""]
    assert top.attributes is not None
    assert top.attributes["request.id"] == "r1"
    for name in ("stage double", "stage sums"):
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == top.context.span_id
        moments = [top.start_time, spans[name].start_time, spans[name].end_time, top.end_time]
        assert moments == sorted(moment for moment in moments if moment is not None)
