"""OpenTelemetry spans of requests and of their stations, made after the answer from the clock that each job carries.

Callers pass their trace on by the W3C header `traceparent`. Needs the extra `otel`.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torchship
from torchship.errors import Unavailable
from torchship.serve.config import TraceConfig
from torchship.serve.engine.queue import Job
from torchship.wire.messages import Request

HEADERS = "traceparent|tracestate"


class Traces:
    """Makes spans and hands them to an exporter, which sends them from a thread of its own."""

    def __init__(self, config: TraceConfig, *, exporter: Any = None) -> None:
        """`exporter` is an OpenTelemetry SpanExporter; by default one to `config.endpoint` by OTLP over HTTP.

        Raises Unavailable where OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=config.endpoint)
        except ImportError as fault:
            raise Unavailable(
                f"traces need OpenTelemetry: {fault}",
                hint="pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
            ) from None
        self._sample = config.sample
        self._provider = TracerProvider(resource=Resource.create({"service.name": config.service}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("torchship", torchship.__version__)
        self._offset = time.time() - time.monotonic()

    def wanted(self, request: Request) -> bool:
        """Whether this request is traced: as its caller has decided, else by the share that is sampled."""
        parent = request.headers.get("traceparent", "")
        if parent:
            return parent[-1:] in "13579bdf"  # the last bit of the flags: sampled
        return random.random() < self._sample  # noqa: S311  # no secret

    def record(self, job: Job, request: Request, version: str) -> str:
        """The span of an answered request, and one beneath it for each station that it was at; its traceparent."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(request.headers)
        facts: dict[str, Any] = {"model": request.model, "version": version, "request.id": request.id, "rows": job.rows}
        top = self._tracer.start_span(
            f"infer {request.model}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            attributes=facts,
            start_time=self._time(job.arrived),
        )
        below = trace.set_span_in_context(top)
        for span in job.spans or ():
            made = self._tracer.start_span(
                f"stage {span.station}",
                context=below,
                start_time=self._time(span.since),
                attributes={"batch.rows": span.rows, "queued.ms": (span.sent - span.since) * 1e3},
            )
            made.add_event("run", timestamp=self._time(span.began))
            made.add_event("done", timestamp=self._time(span.ended))
            made.end(end_time=self._time(span.back))
        if job.fault is not None:
            top.set_status(trace.Status(trace.StatusCode.ERROR, str(job.fault)))
        top.end(end_time=self._time(time.monotonic()))
        mine = top.get_span_context()
        return f"00-{mine.trace_id:032x}-{mine.span_id:016x}-{mine.trace_flags:02x}"

    def _time(self, moment: float) -> int:
        """A moment of the monotonic clock in nanoseconds since 1970."""
        return int((moment + self._offset) * 1e9)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
