"""What a worker keeps if parameters, gradients and optimizer state are in parts (Rajbhandari et al., "ZeRO", 2020)."""

from __future__ import annotations

from dtrain.errors import UsageError


def zero_bytes(
    parameters: float,
    *,
    workers: int,
    stage: int,
    parameter_bytes: float = 2,
    gradient_bytes: float = 2,
    state_bytes: float = 12,
) -> float:
    """Bytes of model states on each worker (1910.02054, section 5 and figure 1); activations come on top.

    The defaults are mixed precision with Adam: halves for weights and gradients, and a float32 copy, m and v. With
    float32 throughout they are 4, 4 and 8 for Adam, 4 for SGD with momentum, 0 for plain SGD.

    Args:
        parameters: how many numbers the model has.
        stage: 0: all on each; 1: the state in parts (`update="sharded"`; P_os); 2: gradients too (P_os+g); 3: weights
            too (P_os+g+p; torch's `fully_shard`).

    Raises:
        UsageError: another stage, or no worker.
    """
    if stage not in (0, 1, 2, 3) or workers < 1:
        raise UsageError(f"stage is {stage}, workers {workers}: stages are 0 to 3, and there is a worker")
    kept = parameter_bytes / (workers if stage >= 3 else 1)
    kept += gradient_bytes / (workers if stage >= 2 else 1)
    kept += state_bytes / (workers if stage >= 1 else 1)
    return parameters * kept
