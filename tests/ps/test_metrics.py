"""A server's figures over HTTP."""

from __future__ import annotations

import urllib.request

import pytest

from dtrain.errors import UsageError
from dtrain.ps.members import Terms
from dtrain.ps.metrics import MEANINGS, serve
from dtrain.ps.server import Server

pytest.importorskip("prometheus_client", reason="the extra dtrain[metrics] is not installed")


def test_figures_are_told_on_loopback(own_temporary_directory):
    server = Server(f"ipc://{own_temporary_directory}/metrics", Terms(world_size=2))
    try:
        assert set(server.figures()) == set(MEANINGS)
        metrics = serve(0, 3, server.figures)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
            with pytest.raises(UsageError, match=f"--metrics-port {metrics.port}"):
                serve(metrics.port, 3, server.figures)
        finally:
            metrics.close()
    finally:
        server.close()
    assert 'dtrain_workers{server="3"} 0.0' in text
    assert 'dtrain_rounds_total{server="3"} 0.0' in text
