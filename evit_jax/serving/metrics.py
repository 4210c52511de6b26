"""Metrics of the server in the text format of Prometheus."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts requests and batches. Each server has its own registry."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter('evit_requests', 'Requests by path and status code', ['path', 'code'],
                                 registry=self.registry)
        self._latency = Histogram('evit_request_seconds', 'Time from the head of a request to the end of its response',
                                  ['path'], buckets=_SECONDS, registry=self.registry)
        self._images = Counter('evit_images', 'Images computed, by plan', ['plan'], registry=self.registry)
        self._batch = Histogram('evit_batch_images', 'Images in a batch, without padding', buckets=_SIZES,
                                registry=self.registry)
        self._program = Histogram('evit_batch_seconds', 'Time of a batch in the engine, by plan', ['plan'],
                                  buckets=_SECONDS, registry=self.registry)

    def watch(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Adds a gauge whose value is read when the metrics are."""
        Gauge(name, description, registry=self.registry).set_function(read)

    def observe_batch(self, plan: str, count: int, seconds: float) -> None:
        """Counts a batch."""
        self._images.labels(plan).inc(count)
        self._batch.observe(count)
        self._program.labels(plan).observe(seconds)

    def observe_request(self, path: str, code: int, begin: float) -> None:
        """Counts a request that began at `begin`, a value of `time.perf_counter`."""
        self._requests.labels(path, code).inc()
        self._latency.labels(path).observe(time.perf_counter() - begin)

    def text(self) -> bytes:
        """Returns the metrics as text."""
        return generate_latest(self.registry)
