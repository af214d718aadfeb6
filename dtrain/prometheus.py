"""Figures for Prometheus, on loopback. Needs the extra `dtrain[metrics]`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from dtrain.errors import UsageError


class Metrics:
    """An HTTP server on 127.0.0.1 that tells the figures of a process when it is asked."""

    def __init__(
        self,
        port: int,
        figures: Callable[[], Mapping[str, float]],
        *,
        meanings: Mapping[str, str],
        counters: Collection[str],
        **labels: str,
    ) -> None:
        """
        Args:
            port: 0 takes a free one, see `port` afterwards.
            figures: called from another thread at each question. A figure `x` is told as `dtrain_x`.
            meanings: what figures are; one that is not among them is told without.
            counters: names of those that only grow.
            labels: of each figure, as `server="0"`.

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
                    family = CounterMetricFamily if name in counters else GaugeMetricFamily
                    metric = family(f"dtrain_{name}", meanings.get(name, name.replace("_", " ")), labels=list(labels))
                    metric.add_metric(list(labels.values()), value)
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
