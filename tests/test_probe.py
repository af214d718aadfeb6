"""The probe: what it finds of a model is right where that does not depend on how fast this machine is."""

from __future__ import annotations

import math

import pytest
import torch

from dtrain import probe as probing
from dtrain.errors import UsageError
from dtrain.probe import Effort, probe
from dtrain.spec import RunSpec

QUICK = Effort(compute_s=0.1, fewest=2, most=2, link_s=0.1, crowd_s=0.1)


def small(**more: object) -> RunSpec:
    options = ("model=mlp", "hidden=64", "layers=2", "classes=10", "samples=4096")
    return RunSpec(**{"recipe": "synthetic", "options": options, "device": "cpu", **more})  # type: ignore[arg-type]


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """No crowd to be made of: no processes."""
    monkeypatch.setattr(probing, "cores", lambda: 1)


@pytest.mark.usefixtures("one_core")
def test_what_is_sent_is_what_the_model_has():
    before = torch.get_num_threads()
    found = probe(small(), [8, 32], links=(), effort=QUICK)
    assert torch.get_num_threads() == before
    assert found.parameters == 2 * (64 * 64 + 64) + 64 * 10 + 10
    for buckets in (found.buckets, found.packed):
        # Gradients, and with the last message a flag for each tensor and the share of samples.
        assert sum(b.nbytes for b in buckets) == 4 * (found.parameters + 6 + 1)
        assert [b.ready for b in buckets] == sorted(b.ready for b in buckets)
    assert found.norms == ()
    assert found.threads == found.cores == 1
    assert found.global_batch == 64


@pytest.mark.usefixtures("one_core")
def test_halves_are_half_the_bytes():
    found = probe(small(send_as="bf16"), [8], links=(), effort=QUICK)
    assert found.send_as == "bf16"
    for buckets in (found.buckets, found.packed):
        assert sum(b.nbytes for b in buckets) == 2 * (found.parameters + 6 + 1)


@pytest.mark.usefixtures("one_core")
def test_buckets_are_of_the_size_that_is_asked_for():
    one, several = (probe(small(bucket_mb=mb), [8], links=(), effort=QUICK) for mb in (8.0, 0.01))
    assert len(several.buckets) > len(one.buckets) == 1


@pytest.mark.usefixtures("one_core")
def test_lines_of_a_model_rise():
    found = probe(small(), [8, 2048], links=(), effort=QUICK)
    assert found.forward.at(2048) > found.forward.at(8) > 0
    assert found.backward.at(2048) > 0
    assert found.optimizer.at(0) > 0
    assert found.rest_s > 0
    assert found.probed["samples"] == [8, 2048]
    assert math.isfinite(found.scatter)


@pytest.mark.usefixtures("one_core")
def test_batch_norm_layers_are_counted():
    found = probe(RunSpec(recipe="digits", device="cpu"), [8], links=(), effort=QUICK)
    assert len(found.norms) == 3
    assert all(norm.forward_bytes == norm.backward_bytes + 16 for norm in found.norms)


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(UsageError, match="give auto, cpu, cuda or cuda:N"):
        probe(small(device="abacus"), [8], links=())


def test_no_size_is_refused():
    with pytest.raises(UsageError, match="above 0"):
        probe(small(), [0], links=())
