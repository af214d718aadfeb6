"""Published scaling, predicted by the model of `dtrain plan` from published inputs alone.

    python benchmarks/published.py                  the table, with sources
    python benchmarks/published.py --json FILE

Nothing is fitted: a row's inputs are the rate of one machine, the size of the model and the link, as published. What is
assumed for all rows alike: a backward takes twice as long as a forward (Goyal et al. give it), links give their line
rate, gradients become ready evenly over backward (for VGG-16, by the operations of its layers, as most of its weights
are in the layers whose gradients come first), and buckets have 64 MB, Horovod's default. Where an input is not
published the row is left out, and said so; where the model misses by more than 10 % that is said too.

For six rows over TCP what the link really gave is not published, and line rate is far from it. So each of them is also
predicted with one number that is fitted: the rate at which the model comes nearest to the *other* five ("rate of the
others"). That tests what the model says of models and numbers of machines, not the rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dtrain.measure.step import Bucket, Wiring, Work, boxes
from dtrain.tables import table

NEAR = 0.10
"""A prediction this close counts as met."""

BUCKET_BYTES = 64e6
BACKWARD = 2 / 3
"""Part of forward and backward together."""

KERAS = "parameters: keras.io/api/applications"
TF = "TensorFlow's benchmarks, May 2017 (tensorflow/docs_src/performance/benchmarks.md)"
HOROVOD = "Horovod's docs/benchmarks.rst: 128 servers with 4 Pascal GPUs each, RoCE at 25 Gbit/s"
BYTEPS = (
    "BytePS's docs/performance.md, Horovod's bars read off its chart to a pixel (1 to 5 %): 8 V100 each, 20 Gbit/s TCP"
)
GOYAL = "Goyal et al. 2017 (arXiv 1706.02677): section 4 and 5.5"
NCCL = "latencies of a ring's step: NCCL's tuning.cc, Simple protocol: 5.7 us inside a host (PCI), 9.6 us between hosts"

PARAMETERS = {"InceptionV3": 23.9e6, "ResNet-50": 25.6e6, "ResNet-152": 60.4e6, "VGG-16": 138.4e6}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published figure, and what it is predicted from."""

    what: str
    """Model and system."""
    gpus: int
    """Of the published figure."""
    published: float
    """What was measured: samples per second, or efficiency."""
    unit: str
    """Which."""
    predicted: float
    """By the model."""
    sources: list[str] = field(default_factory=list)
    """Of the figure and its inputs."""
    by_others: float | None = None
    """By the model, with the link's rate as its neighbours have it; None where it is published."""
    others_gbit_s: float | None = None
    """That rate."""

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.published - 1

    @property
    def met(self) -> bool:
        """Whether it is within 10 %."""
        return abs(self.error) <= NEAR

    @property
    def error_by_others(self) -> float | None:
        """Relative, of `by_others`."""
        return None if self.by_others is None else self.by_others / self.published - 1


LEFT_OUT = {
    "Horovod, ResNet-101, 512 GPUs (90 %)": "the rate of a single GPU is published nowhere near it",
    "BytePS, VGG-16 and ResNet-50, 20 Gbit/s": "the number of server machines is not published with the chart",
    "BytePS, BERT-large, 256 V100 (90 %; Horovod 70 %)": "the rate of a single machine is not published with it",
    "TensorFlow, AlexNet": "was not run on several machines",
}
"""Published figures that are not predicted, and why."""


def rows() -> list[Row]:
    """All of them."""
    return [*_ec2(), *_goyal(), *_horovod(), *_byteps()]


# -- inputs -----------------------------------------------------------------------------------------------------------


def _work(model: str, step_s: float, backward_s: float | None = None) -> Work:
    """One worker alone."""
    backward_s = step_s * BACKWARD if backward_s is None else backward_s
    return Work(forward_s=step_s - backward_s, backward_s=backward_s, buckets=_buckets(model))


def _buckets(model: str) -> tuple[Bucket, ...]:
    if model == "VGG-16":
        return _fused(vgg16())
    total = PARAMETERS[model] * 4
    pieces = 100
    return _fused([(total / 4 / pieces, 1.0)] * pieces)


def vgg16() -> list[tuple[float, float]]:
    """(weights, operations) of each layer, in the order of forward, for images of 224 pixels (Simonyan 2015, table 1,
    D)."""
    layers, channels, side = [], 3, 224
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            weights = 9.0 * channels * width + width
            layers.append((weights, weights * side * side))
            channels = width
        side //= 2
    for inputs, outputs in ((512 * 7 * 7, 4096), (4096, 4096), (4096, 1000)):
        layers.append((float(inputs * outputs + outputs),) * 2)
    return layers


def _fused(layers: Sequence[tuple[float, float]]) -> tuple[Bucket, ...]:
    """Buckets of the size at which Horovod sends, the last layer's gradient first; ready when their last one is."""
    operations = sum(cost for _, cost in layers)
    buckets, nbytes, done = [], 0.0, 0.0
    for weights, cost in reversed(layers):
        nbytes += 4 * weights
        done += cost / operations
        if nbytes >= BUCKET_BYTES:
            buckets.append(Bucket(nbytes=nbytes, ready=min(done, 1.0)))
            nbytes = 0.0
    if nbytes:
        buckets.append(Bucket(nbytes=nbytes, ready=1.0))
    return tuple(buckets)


def _step_s(model: str, step_s: float, wiring: Wiring, backward_s: float | None = None) -> float:
    return boxes(_work(model, step_s, backward_s), wiring).step_ms / 1e3


# -- rows -------------------------------------------------------------------------------------------------------------


_EC2 = (
    # model, batch per GPU, images/s of one machine, {machines: (images/s, parameter servers)}
    ("InceptionV3", 64, 229.0, {2: (459.0, 2), 4: (902.0, 4), 8: (1783.0, 6)}),
    ("ResNet-50", 64, 378.0, {2: (751.0, 2), 4: (1388.0, 4), 8: (2744.0, 8)}),
    ("ResNet-152", 32, 146.0, {2: (291.0, 2), 4: (565.0, 4), 8: (981.0, 4)}),
    ("InceptionV3", 32, 219.0, {2: (427.0, 2), 4: (820.0, 4), 8: (1608.0, 8)}),
    ("ResNet-50", 32, 333.0, {2: (667.0, 2), 4: (1180.0, 4), 8: (2315.0, 4)}),
)


def _ec2() -> list[Row]:
    """Parameter servers beside the workers, p2.8xlarge: 8 K80 and 10 Gbit/s; a machine's gradients are added first."""
    found = []
    for model, batch, rate, measured in _EC2:
        for machines, (published, servers) in measured.items():
            wiring = Wiring(
                backend="ps", place="beside", workers=machines, servers=servers, alpha_s=30e-6, bytes_per_s=10e9 / 8
            )
            step_s = _step_s(model, 8 * batch / rate, wiring)
            found.append(
                Row(
                    what=f"{model}, batch {batch}, {servers} parameter servers, EC2 K80",
                    gpus=8 * machines,
                    published=published,
                    unit="images/s",
                    predicted=8 * batch * machines / step_s,
                    sources=[TF, KERAS, "network of p2.8xlarge: 10 Gbit/s (AWS, EC2 instance types)"],
                )
            )
    return found


def _goyal() -> list[Row]:
    """ResNet-50 over 32 servers of 8 P100: a ring between servers in the place of the paper's halving and doubling."""
    step_s = 32 / 195.0  # images/s of one P100 at batch 32
    wiring = Wiring(backend="allreduce", workers=32, alpha_s=9.6e-6, bytes_per_s=50e9 / 8)
    return [
        Row(
            what="ResNet-50, batch 32, all-reduce between 32 servers, P100",
            gpus=256,
            published=0.90,
            unit="efficiency, 8 to 256 GPUs",
            predicted=step_s / _step_s("ResNet-50", step_s, wiring, backward_s=0.120),
            sources=[GOYAL + ": 100 MB, backward 120 ms, 50 Gbit/s, ~90 %", f"195 images/s of one P100: {TF}", NCCL],
        )
    ]


def _horovod() -> list[Row]:
    """512 GPUs in one ring, of which every fourth step crosses a network."""
    latency_s = (128 * 9.6e-6 + 384 * 5.7e-6) / 512
    wiring = Wiring(backend="allreduce", workers=512, alpha_s=latency_s, bytes_per_s=25e9 / 8)
    found = []
    for model, rate, efficiency in (("InceptionV3", 142.0, 0.90), ("VGG-16", 154.0, 0.68)):
        step_s = 64 / rate
        found.append(
            Row(
                what=f"{model}, batch 64, Horovod, P100, 25 Gbit/s",
                gpus=512,
                published=efficiency,
                unit="efficiency",
                predicted=step_s / _step_s(model, step_s, wiring),
                sources=[HOROVOD, f"{rate:g} images/s of one P100: {TF}", KERAS, NCCL],
            )
        )
    return found


_BYTEPS = (
    ("VGG-16", 1630.0, {2: 1580.0, 4: 2070.0, 8: 3320.0}),
    ("ResNet-50", 2450.0, {2: 3950.0, 4: 7620.0, 8: 11430.0}),
)


_LINE_GBIT_S = 20.0


def _byteps() -> list[Row]:
    """Horovod between machines with a virtual network of 20 Gbit/s."""
    cases = [
        (model, alone, machines, published)
        for model, alone, measured in _BYTEPS
        for machines, published in measured.items()
    ]
    found = []
    for case in cases:
        model, alone, machines, published = case
        rate = _rate_of([other for other in cases if other is not case])
        found.append(
            Row(
                what=f"{model}, batch 64, Horovod, V100, 20 Gbit/s TCP",
                gpus=8 * machines,
                published=published,
                unit="images/s",
                predicted=_over_tcp(model, alone, machines, _LINE_GBIT_S),
                sources=[BYTEPS, KERAS],
                by_others=_over_tcp(model, alone, machines, rate),
                others_gbit_s=rate,
            )
        )
    return found


def _over_tcp(model: str, alone: float, machines: int, gbit_s: float) -> float:
    """Images per second."""
    wiring = Wiring(backend="allreduce", workers=machines, alpha_s=30e-6, bytes_per_s=gbit_s * 1e9 / 8)
    return 512 * machines / _step_s(model, 512 / alone, wiring)


def _rate_of(cases: Sequence[tuple[str, float, int, float]]) -> float:
    """Gbit/s, in tenths, at which the model is nearest to published figures: by the mean square of relative errors."""

    def miss(gbit_s: float) -> float:
        return sum((_over_tcp(*case[:3], gbit_s) / case[3] - 1) ** 2 for case in cases)

    return min((tenth / 10 for tenth in range(10, int(10 * _LINE_GBIT_S) + 1)), key=miss)


# -- the table --------------------------------------------------------------------------------------------------------


def text(found: Sequence[Row]) -> str:
    head = ["what", "GPUs", "published", "predicted", "error", "within 10 %", "at the rate of the others"]
    cells = [
        [
            r.what,
            str(r.gpus),
            _figure(r.published),
            _figure(r.predicted),
            f"{r.error:+.1%}",
            "yes" if r.met else "MISSED",
            ""
            if r.error_by_others is None
            else f"{_figure(r.by_others)} {r.error_by_others:+.1%} ({r.others_gbit_s} Gbit/s)",
        ]
        for r in found
    ]
    met = sum(r.met for r in found)
    near = [abs(r.error_by_others) <= NEAR for r in found if r.error_by_others is not None]
    sources = sorted({s for r in found for s in r.sources})
    return "\n".join(
        [
            table(head, cells),
            "",
            f"{met} of {len(found)} within 10 %; at the rate of the others {sum(near)} of {len(near)} over TCP.",
            "Below 2: efficiency; else images per second. All misses are on the side of the optimist: at line rate.",
            "",
            "Sources:",
            *(f"  {s}" for s in sources),
            "",
            "Left out, as an input is not published:",
            *(f"  {what}: {why}" for what, why in LEFT_OUT.items()),
        ]
    )


def _figure(value: float) -> str:
    return f"{value:.3f}" if value < 2 else f"{value:.0f}"


def record(found: Sequence[Row]) -> dict[str, Any]:
    rows = [{**asdict(r), "error": r.error, "met": r.met, "error_by_others": r.error_by_others} for r in found]
    return {"rows": rows, "left_out": LEFT_OUT}


def main() -> None:
    import pictures  # here: it is beside this script, and not where others import this module from

    parser = argparse.ArgumentParser(description="Published scaling against the model of `dtrain plan`.")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file")
    parser.add_argument("--picture", type=pictures.target, metavar="FILE", help=pictures.HELP)
    arguments = parser.parse_args()
    found = rows()
    print(text(found))
    if arguments.json:
        import common  # as above

        about = {"command": "python benchmarks/published.py", "commit": common.commit(), "versions": common.versions()}
        Path(arguments.json).write_text(json.dumps({**about, **record(found)}, indent=1) + "\n", encoding="utf-8")
    pictures.save("published", record(found)["rows"], arguments.picture)


if __name__ == "__main__":
    main()
