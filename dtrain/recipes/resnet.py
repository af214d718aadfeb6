"""Residual networks of 18 and 50 layers (He et al., Deep Residual Learning, CVPR 2016).

The layout is table 1 of that paper with the option B shortcuts; for 50 layers the stride sits in the 3x3
convolution of a bottleneck, as in most later code ("version 1.5").
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from dtrain.errors import UsageError


def convolution(inputs: int, outputs: int, *, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width when its stride is 1, without bias: a batch norm follows."""
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """Residual block: [n, inputs, H, W] -> [n, width * expansion, H / stride, W / stride]."""

    expansion: ClassVar[int]

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.residual = self._residual(inputs, width, stride)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = convolution(inputs, outputs, kernel=1, stride=stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def _residual(self, inputs: int, width: int, stride: int) -> nn.Sequential:
        """The branch beside the shortcut; its last module is a batch norm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.residual(x) + self.shortcut(x))
        return out


class Basic(Block):
    """Two 3x3 convolutions: the block of the 18-layer network."""

    expansion = 1

    def _residual(self, inputs: int, width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            convolution(inputs, width, kernel=3, stride=stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            convolution(width, width, kernel=3),
            nn.BatchNorm2d(width),
        )


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions: the block of the 50-layer network."""

    expansion = 4

    def _residual(self, inputs: int, width: int, stride: int) -> nn.Sequential:
        outputs = width * self.expansion
        return nn.Sequential(
            convolution(inputs, width, kernel=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            convolution(width, width, kernel=3, stride=stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            convolution(width, outputs, kernel=1),
            nn.BatchNorm2d(outputs),
        )


_STEMS = {"imagenet": (7, 2), "half": (3, 2), "small": (3, 1)}  # kernel and stride of the first convolution
_DEPTHS: dict[int, tuple[type[Block], tuple[int, ...]]] = {
    18: (Basic, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


def _stem(kind: str, in_channels: int, width: int) -> nn.Sequential:
    kernel, stride = _STEMS[kind]
    first = convolution(in_channels, width, kernel=kernel, stride=stride)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    if kind == "imagenet":
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    return nn.Sequential(*layers)


class ResNet(nn.Module):
    """Images [n, in_channels, H, W] -> logits [n, classes].

    `width` is the number of channels of the first stage; each of the four stages doubles it. `stem` says what
    comes before them: `imagenet` divides height and width by four (7x7 convolution, pooling), `half` by two
    (3x3 convolution), `small` keeps them (3x3 convolution). With the defaults, 18 layers have 11,689,512
    parameters and 50 layers 25,557,032.

    `calm` starts the last batch-norm scale of each block at zero, so that every block begins as its shortcut
    (Goyal et al., Accurate, Large Minibatch SGD, 2017, section 5.1).

    Raises UsageError for a depth or a stem that does not exist.
    """

    def __init__(
        self,
        depth: int = 18,
        width: int = 64,
        classes: int = 1000,
        stem: str = "imagenet",
        in_channels: int = 3,
        calm: bool = False,
    ) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise UsageError(f"ResNet: depth={depth}: must be one of {', '.join(map(str, _DEPTHS))}")
        if stem not in _STEMS:
            raise UsageError(f"ResNet: stem={stem!r}: must be one of {', '.join(_STEMS)}")
        block, counts = _DEPTHS[depth]
        self.stem = _stem(stem, in_channels, width)
        self.blocks = nn.Sequential()
        channels = width
        for stage, count in enumerate(counts):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                self.blocks.append(block(channels, width << stage, stride))
                channels = (width << stage) * block.expansion
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)
        self._initialise(calm)

    def _initialise(self, calm: bool) -> None:
        """He et al., Delving Deep into Rectifiers, 2015, equation 14; batch norms start at (1, 0)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif calm and isinstance(module, Block):
                last = module.residual[-1]
                if isinstance(last, nn.BatchNorm2d):
                    nn.init.zeros_(last.weight)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(self.blocks(self.stem(images))).flatten(1)
        logits: Tensor = self.head(features)
        return logits
