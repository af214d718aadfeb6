"""ZeRO's table against its formulas."""

from __future__ import annotations

import pytest

from dtrain.errors import UsageError
from dtrain.largebatch import zero_bytes


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_papers_example(stage: int, gigabytes: float) -> None:
    """7.5 billion parameters on 64 workers (1910.02054, figure 1)."""
    assert zero_bytes(7.5e9, workers=64, stage=stage) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_float32_with_momentum() -> None:
    kinds = {"parameter_bytes": 4.0, "gradient_bytes": 4.0, "state_bytes": 4.0}
    assert [zero_bytes(100, workers=4, stage=s, **kinds) for s in range(4)] == [1200, 900, 600, 300]
    assert zero_bytes(100, workers=1, stage=3, **kinds) == 1200


@pytest.mark.parametrize("wrong", [{"stage": 4, "workers": 2}, {"stage": 1, "workers": 0}])
def test_what_cannot_be_meant(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="stages are 0 to 3"):
        zero_bytes(1, **wrong)
