"""Models that read a sequence of tokens and, at each position, guess the next one.

Both map tokens [n, T] (int64, in 0..vocabulary-1) to logits [n, T, vocabulary]; the logits at t see tokens
0..t only. Neither has dropout: forward is a function of the weights and the tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.errors import UsageError


class LSTM(nn.Module):
    """Embedding, `layers` LSTM layers of `hidden` cells each, linear head.

    Every sample starts from a state of zeros. Forget gates start open, with a bias of 1 (Jozefowicz et al.,
    An Empirical Exploration of Recurrent Network Architectures, 2015, section 2.2).
    """

    def __init__(self, vocabulary: int, *, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)
        with torch.no_grad():
            for name, parameter in self.lstm.named_parameters():
                if name.startswith("bias"):  # gates lie in the order input, forget, cell, output
                    parameter.zero_()
                if name.startswith("bias_ih"):
                    parameter[hidden : 2 * hidden] = 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.head(states)
        return logits


class Attention(nn.Module):
    """Causal self-attention, [n, T, hidden] -> [n, T, hidden] (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(hidden, 3 * hidden)
        self.project_out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        split = self.project_in(x).unflatten(2, (3, self.heads, -1))  # [n, T, 3, heads, hidden / heads]
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, heads, T, hidden / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.project_out(mixed.transpose(1, 2).flatten(2))
        return out


class TransformerLayer(nn.Module):
    """x plus attention of the normalised x, then that plus two linear layers of the normalised same.

    The linear layers have four times the width between them.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.norm_feed = nn.LayerNorm(hidden)
        self.feed = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        out: Tensor = x + self.feed(self.norm_feed(x))
        return out


class Transformer(nn.Module):
    """A decoder with layer norms before each branch (Xiong et al. 2020, figure 1b) and learned positions.

    Takes at most `length` tokens at once. Weights start as in GPT-2: normal with deviation 0.02, divided by
    sqrt(2 * layers) where a branch is added back (Radford et al. 2019, section 2.3).

    Raises UsageError when `hidden` is no multiple of `heads`.
    """

    def __init__(self, vocabulary: int, *, hidden: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        if hidden % heads:
            raise UsageError(f"Transformer: hidden={hidden}: must be a multiple of heads={heads}")
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.position = nn.Parameter(torch.empty(length, hidden))
        self.layers = nn.Sequential(*(TransformerLayer(hidden, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary)
        self._initialise(added_back=0.02 / (2 * layers) ** 0.5)

    def _initialise(self, *, added_back: float) -> None:
        nn.init.normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("project_out.weight", "feed.2.weight")):
                nn.init.normal_(parameter, std=added_back)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits
