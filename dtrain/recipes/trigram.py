"""An interpolated trigram model of tokens: the baseline that a neural language model has to beat.

p(c | a, b) = w3 p3(c | a, b) + w2 p2(c | b) + w1 p1(c) + w0 / vocabulary

p3, p2 and p1 are relative frequencies. The weights are fitted by expectation maximisation on held-out text,
one set for each range of how often the context (a, b) was seen (Jelinek and Mercer 1980; Chen and Goodman, An
Empirical Study of Smoothing Techniques, 1999, section 2.3).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.errors import UsageError

Tokens: TypeAlias = npt.NDArray[np.int64]
Reals: TypeAlias = npt.NDArray[np.float64]

_HELD_OUT = 10  # one part in so many of the training text fits the weights
_FEWEST = 100  # held-out tokens that a context range needs for weights of its own
_ROUNDS = 100


def trigram_perplexity(train: Tokens, text: Tokens, vocabulary: int) -> float:
    """Perplexity, per token, of `text[2:]` given the two tokens before each, under a model fitted on `train`.

    Tokens are in 0..vocabulary-1. Raises UsageError when `train` has fewer than four, or `text` than three.
    """
    cut = len(train) - max(len(train) // _HELD_OUT, 1)
    if cut < 3 or len(text) < 3:
        raise UsageError(f"trigram model: texts of {len(train)} and {len(text)} tokens: give at least 4 and 3")
    fitted, seen = parts(train[:cut], train[cut - 2 :], vocabulary)
    whole = mixture_weights(fitted)
    mixed, test_seen = parts(train, text, vocabulary)
    weights = np.tile(whole, (65, 1))  # one row for each possible range
    for i in np.unique(_range(seen)):
        inside = _range(seen) == i
        if inside.sum() >= _FEWEST:
            weights[i] = mixture_weights(fitted[inside])
    likelihood = (mixed * weights[_range(test_seen)]).sum(axis=1)
    return float(np.exp(-np.log(likelihood).mean()))


def parts(train: Tokens, text: Tokens, vocabulary: int) -> tuple[Reals, Tokens]:
    """For each token of `text[2:]`: its probability by trigram, bigram, unigram and uniformly, [n - 2, 4].

    Where `train` never shows a context, the next shorter one stands in, so that each column is a
    distribution. Also returns how often `train` has a token after each two-token context, [n - 2].
    """
    a, b, c = text[:-2], text[1:-1], text[2:]
    uniform = np.full(len(c), 1 / vocabulary)
    unigram = _counts(train, c) / len(train)
    followed = _counts(train[:-1], b)
    bigram = _ratio(_counts(train[:-1] * vocabulary + train[1:], b * vocabulary + c), followed, unigram)
    pairs = train[:-2] * vocabulary + train[1:-1]
    context = a * vocabulary + b
    seen = _counts(pairs, context)
    trigram = _ratio(_counts(pairs * vocabulary + train[2:], context * vocabulary + c), seen, bigram)
    return np.stack([trigram, bigram, unigram, uniform], axis=1), seen


def mixture_weights(probabilities: Reals) -> Reals:
    """The weights [k], summing to 1, for mixing the columns of [n, k]: the likeliest given those n tokens.

    By expectation maximisation (Dempster et al. 1977), with one made-up token to the credit of each column.
    So no weight vanishes, and a character that held-out text lacks cannot cost infinitely much later.
    """
    tokens, columns = probabilities.shape
    weights = np.full(columns, 1 / columns)
    for _ in range(_ROUNDS):
        shares = probabilities * weights
        credits = (shares / shares.sum(axis=1, keepdims=True)).sum(axis=0)
        weights = (credits + 1) / (tokens + columns)
    return weights


def _range(seen: Tokens) -> Tokens:
    """0 for a context never seen, then 1, 2, 3, ... for 1, 2-3, 4-7, ... times."""
    return np.frexp(seen.astype(np.float64))[1].astype(np.int64)


def _counts(keys: Tokens, asked: Tokens) -> Tokens:
    """How often each of `asked` is among `keys`."""
    known, counts = np.unique(keys, return_counts=True)
    places = np.searchsorted(known, asked).clip(max=len(known) - 1)
    return np.where(known[places] == asked, counts[places], 0)


def _ratio(numerator: Tokens, denominator: Tokens, otherwise: Reals) -> Reals:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), otherwise)
