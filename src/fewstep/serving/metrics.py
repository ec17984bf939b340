"""What Prometheus can ask; one registry per server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fewstep.serving.batcher import Batcher
from fewstep.serving.store import PictureStore

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of requests and batches, and gauges of queue and store."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "fewstep_requests", "Requests by route and status (499: the client left)", ["route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._request_seconds = Histogram(
            "fewstep_request_seconds", "From the head of a request to its answer", ["route"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._batch_size = Histogram(
            "fewstep_batch_size", "Pictures per batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self._registry
        )
        self._batch_seconds = Histogram(
            "fewstep_batch_seconds", "Drawing a batch", buckets=_SECONDS, registry=self._registry
        )
        self._failed = Counter("fewstep_batches_failed", "Batches that raised an error", registry=self._registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request; routes are those of the application, never what a client wrote."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def batch(self, size: int, seconds: float, failed: bool) -> None:
        """Count a finished batch."""
        self._batch_size.observe(size)
        self._batch_seconds.observe(seconds)
        self._failed.inc(failed)

    def watch(self, batcher: Batcher, store: PictureStore) -> None:
        """Show what waits and what is kept, as of the moment of asking."""
        gauges = {
            "fewstep_waiting_pictures": ("Pictures that wait to be drawn", lambda: batcher.waiting),
            "fewstep_kept_pictures": ("Pictures that can be fetched by URL", lambda: len(store)),
            "fewstep_kept_bytes": ("Their bytes", lambda: store.size),
        }
        for name, (what, value) in gauges.items():
            Gauge(name, what, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
