"""Q-learning whose target network has batch norm: running averages, or statistics made precise at each sync.

A corridor of rooms: left or right, a reward at the far end, and a slip now and then. The agent does not see the number
of its room but a noisy vector. The online network learns with batch statistics; its copy, the target network, evaluates
next states with running ones, which lag behind the weights (momentum 0.01 here: Keras's default of 0.99). `precise`
computes them again from observations seen before, whenever the target is copied.

How good the targets are is known: exact values come from value iteration over the rooms. Printed are root mean square
errors of the target network, over the first third of training and at its end.

Expect: with running averages, errors are 1.4 to 3.5 times as large over the first third, and 3 to 6 times at the end
(seeds 0 to 4). With torch's momentum of 0.1 there is little in it here: 1.1 to 1.4 times over the first third.

python -m dtrain.examples.qlearning [--seed 0] [--steps 900]
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain import norm
from dtrain.examples import parsed

ROOMS, SIGHT, DISCOUNT, SLIP = 8, 12, 0.9, 0.1
BATCH, SYNC = 64, 30


class Corridor:
    """Action 1 leads right, 0 left, a slip the other way. Leaving the last room to the right pays 1 and goes to 0."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.looks = 3 + 2 * torch.randn(ROOMS, SIGHT, generator=self.random)

    def observed(self, rooms: Tensor) -> Tensor:
        """(n,) rooms -> (n, SIGHT)."""
        return self.looks[rooms] + 0.5 * torch.randn(len(rooms), SIGHT, generator=self.random)

    def move(self, rooms: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Where it leads, and the reward."""
        out = right.bool() & (rooms == ROOMS - 1)
        after = (rooms + 2 * right - 1).clamp(0, ROOMS - 1)
        return torch.where(out, 0, after), out.float()

    def experience(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Observations, actions, rewards and next observations of a batch, from rooms and actions at random."""
        rooms = torch.randint(ROOMS, (BATCH,), generator=self.random)
        actions = torch.randint(2, (BATCH,), generator=self.random)
        slips = (torch.rand(BATCH, generator=self.random) < SLIP).long()
        after, rewards = self.move(rooms, actions ^ slips)
        return self.observed(rooms), actions, rewards, self.observed(after)

    def exact(self) -> Tensor:
        """Q (ROOMS, 2) by value iteration."""
        rooms, q = torch.arange(ROOMS), torch.zeros(ROOMS, 2)
        for _ in range(300):
            ways = [(after, pay) for after, pay in (self.move(rooms, torch.full_like(rooms, a)) for a in (0, 1))]
            worth = torch.stack([pay + DISCOUNT * q.amax(1)[after] for after, pay in ways], 1)
            q = (1 - SLIP) * worth + SLIP * worth.flip(1)
        return q


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(SIGHT, 32), nn.BatchNorm1d(32, momentum=0.01), nn.ReLU(),
            nn.Linear(32, 32), nn.BatchNorm1d(32, momentum=0.01), nn.ReLU(),
            nn.Linear(32, 2),
        )  # fmt: skip


def errors(seed: int, steps: int, *, exact_statistics: bool) -> list[float]:
    """Rms error of the target network's Q at each sync."""
    world, online = Corridor(seed), network(seed)
    optimizer = torch.optim.Adam(online.parameters(), lr=3e-3)
    rooms = torch.arange(ROOMS).repeat_interleave(32)
    truth, looks = world.exact()[rooms], world.observed(rooms)
    target, found, seen = copy.deepcopy(online).eval(), [], list[Tensor]()
    for step in range(1, steps + 1):
        before, actions, rewards, after = world.experience()
        seen = [*seen[-9:], before]
        with torch.no_grad():
            wanted = rewards + DISCOUNT * target(after).amax(1)
        optimizer.zero_grad()
        F.mse_loss(online(before).gather(1, actions.unsqueeze(1)).squeeze(1), wanted).backward()
        optimizer.step()
        if step % SYNC == 0:
            target = copy.deepcopy(online).eval()
            if exact_statistics:
                norm.precise(target, seen)
            with torch.no_grad():
                found.append((target(looks) - truth).square().mean().sqrt().item())
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Rms errors of Q, `early` and at the `end`, with `running` averages and `precise` statistics."""
    flags = parsed(__doc__ or "", argv, steps=900)
    found = {}
    for name, exact_statistics in (("running", False), ("precise", True)):
        curve = errors(flags.seed, flags.steps, exact_statistics=exact_statistics)
        third = curve[: max(1, len(curve) // 3)]
        found[f"early {name}"], found[f"end {name}"] = sum(third) / len(third), curve[-1]
        print(
            f"{name} statistics: error of Q {found[f'early {name}']:.3f} early, {found[f'end {name}']:.3f} at the end"
        )
    scale = Corridor(flags.seed).exact().square().mean().sqrt().item()
    print(f"(exact values have a root mean square of {scale:.3f})")
    return found


if __name__ == "__main__":
    main()
