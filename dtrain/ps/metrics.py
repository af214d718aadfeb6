"""A server's figures for Prometheus, on loopback. Needs the extra `dtrain[metrics]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dtrain.errors import UsageError

MEANINGS = {
    "workers": "Workers that have joined and not left",
    "epoch": "How often the job has gone back to its last commit",
    "rounds": "Sums that were completed",
    "steps": "Updates of parameters that were made",
    "received_bytes": "Payload bytes that came through sockets",
    "sent_bytes": "Payload bytes that went out through sockets",
    "shared_bytes": "Payload bytes that were summed or written in shared memory",
    "refused_messages": "Messages that could not be read",
    "waiting_tasks": "Sums and updates that wait for their turn",
}
"""Name of each figure of `Server.figures`, and what it counts."""

_GAUGES = ("workers", "epoch", "waiting_tasks")


class Metrics:
    """An HTTP server on 127.0.0.1 that tells a server's figures."""

    def __init__(self, port: int, server: int, figures: Callable[[], Mapping[str, float]]) -> None:
        """
        Args:
            port: 0 takes a free one, see `port` afterwards.
            server: number of the server, a label.

        Raises:
            UsageError: prometheus-client is not installed, or the port is taken.
        """
        try:
            from prometheus_client import CollectorRegistry, start_http_server
            from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
        except ImportError as error:
            raise UsageError("metrics need prometheus-client: pip install 'dtrain[metrics]'") from error

        class Collector:
            def collect(self) -> Iterator[Any]:
                for name, value in figures().items():
                    family = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
                    metric = family(f"dtrain_{name}", MEANINGS[name], labels=["server"])
                    metric.add_metric([str(server)], value)
                    yield metric

        registry = CollectorRegistry()
        registry.register(Collector())
        try:
            self._httpd, self._thread = start_http_server(port, "127.0.0.1", registry)
        except OSError as error:
            raise UsageError(f"--metrics-port {port}: {error.strerror}") from error
        self.port = int(self._httpd.server_port)

    def close(self) -> None:
        """Stop answering."""
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()
