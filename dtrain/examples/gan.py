"""A GAN's discriminator sees real and generated images in batches of their own; whose statistics does it keep?

In training, each batch is normalised by its own statistics. The running ones, which evaluation uses, would be an
average of real and generated images, right for neither: under `no_update`, generated ones leave them alone.

Two discriminators, trained alike but for that. Then, over the digits: how far the running means of each are from the
means of real images (in standard deviations, by `diagnose`), and how much its outputs on real images change when it
goes from batch statistics, as in training, to the running ones.

Expect: with `no_update` both are a fraction of what they are without.

python -m dtrain.examples.gan [--seed 0] [--epochs 4]
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain import norm
from dtrain.examples import Data, digits, parsed, shuffled

NOISE = 16  # numbers that an image is made from


def networks() -> tuple[nn.Module, nn.Module]:
    """Generator [n, NOISE] -> [n, 1, 8, 8], and discriminator [n, 1, 8, 8] -> [n, 1]."""
    generator = nn.Sequential(
        nn.Linear(NOISE, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(),
        nn.Unflatten(1, (1, 8, 8)),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(64, 1),
    )  # fmt: skip
    return generator, discriminator


def trained(train: Data, *, seed: int, epochs: int, protect: bool) -> nn.Module:
    """The discriminator; with `protect`, batches of generated images leave its running statistics alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, discriminator = networks()
    random = torch.Generator().manual_seed(seed)
    makes, judges = (torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.5, 0.99)) for m in (generator, discriminator))

    def judged(images: Tensor, *, real: bool, wanted: float) -> Tensor:
        with contextlib.nullcontext() if real or not protect else norm.no_update(discriminator):
            verdict = discriminator(images)
        return F.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, wanted))

    for _ in range(epochs):
        for images, _labels in shuffled(train, 64, random):
            fakes = generator(torch.randn(len(images), NOISE, generator=random))
            judges.zero_grad()
            (judged(images, real=True, wanted=1.0) + judged(fakes.detach(), real=False, wanted=0.0)).backward()
            judges.step()
            makes.zero_grad()
            judged(fakes, real=False, wanted=1.0).backward()
            makes.step()
    return discriminator


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """`distance` of the running means in standard deviations, root mean square over layers, and the relative `change`
    of the outputs, each with and without `no_update`."""
    flags = parsed(__doc__ or "", argv, epochs=4)
    train, _ = digits()
    found = {}
    for name, protect in (("without", False), ("with", True)):
        discriminator = trained(train, seed=flags.seed, epochs=flags.epochs, protect=protect)
        diagnosis = norm.diagnose(discriminator, train[0].split(64))
        squares = [layer.mean_shift**2 for layer in diagnosis.layers]
        found[f"distance {name}"] = (sum(squares) / len(squares)) ** 0.5
        found[f"change {name}"] = diagnosis.output_shift
        print(
            f"{name:>7} no_update: running means are {found[f'distance {name}']:.2f} standard deviations from those of "
            f"real images; outputs on them change by {100 * found[f'change {name}']:.0f} %"
        )
    return found


if __name__ == "__main__":
    main()
