"""A server's figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dtrain.prometheus import Metrics

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

_COUNTERS = MEANINGS.keys() - {"workers", "epoch", "waiting_tasks"}


def serve(port: int, server: int, figures: Callable[[], Mapping[str, float]]) -> Metrics:
    """Tell the figures of that server; see `dtrain.prometheus.Metrics`."""
    return Metrics(port, figures, meanings=MEANINGS, counters=_COUNTERS, server=str(server))
