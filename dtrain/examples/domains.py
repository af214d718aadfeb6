"""One classifier for two kinds of images: digits, and digits inverted and paler. Three ways to normalise them.

Batches come from the two domains in turn. With plain batch norm each batch is normalised by its own statistics in
training, and by an average of both domains', right for neither, in evaluation. `per_domain` keeps statistics for each
(Chang et al. 2019). Mixed batches are another cure, where both domains are at hand at all times.

Expect: with plain batch norm and batches in turn, one domain at least is far below what `per_domain` has in both. Mixed
batches do as well as `per_domain` here.

python -m dtrain.examples.domains [--seed 0] [--epochs 4]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dtrain import norm
from dtrain.examples import Data, accuracy, classifier, digits, fit, parsed, shuffled

DOMAINS = ("dark", "pale")


def both(data: Data) -> dict[str, Data]:
    """The images of each domain: as they are, and inverted with half the contrast."""
    images, labels = data
    return {"dark": data, "pale": (0.5 - 0.5 * images, labels)}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Accuracies in percent, `plain`, `mixed` and `per domain`, of each domain."""
    flags = parsed(__doc__ or "", argv, epochs=4)
    train, test = (both(data) for data in digits())
    generator = torch.Generator().manual_seed(flags.seed)

    def in_turn() -> Iterator[Data]:
        """Within each, its domain is set; plain layers take no notice of it."""
        for pair in zip(*(shuffled(train[name], 64, generator) for name in DOMAINS), strict=True):
            for name, batch in zip(DOMAINS, pair, strict=True):
                with norm.domain(name):
                    yield batch

    def mixed() -> Iterator[Data]:
        for dark, pale in zip(*(shuffled(train[name], 32, generator) for name in DOMAINS), strict=True):
            yield torch.cat([dark[0], pale[0]]), torch.cat([dark[1], pale[1]])

    models: dict[str, nn.Module] = {name: classifier(flags.seed) for name in ("plain", "mixed", "per domain")}
    norm.per_domain(models["per domain"], DOMAINS)
    found = {}
    for name, model in models.items():
        fit(model, flags.epochs, mixed if name == "mixed" else in_turn, lr=0.05)
        for where in DOMAINS:
            with norm.domain(where):
                found[f"{name}, {where}"] = accuracy(model, test[where])
        print(f"{name:>10}: " + ", ".join(f"{found[f'{name}, {where}']:.1f} % of {where} digits" for where in DOMAINS))
    return found


if __name__ == "__main__":
    main()
