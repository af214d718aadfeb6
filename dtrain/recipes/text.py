"""Next-character prediction on a text: Python's own documentation, or any file in UTF-8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from dtrain.errors import DataError, UsageError
from dtrain.recipes.base import Recipe
from dtrain.recipes.data import WindowData, next_token
from dtrain.recipes.options import checked, choose
from dtrain.recipes.sequence import LSTM, Transformer
from dtrain.recipes.tasks import seeded, token_loss, token_score, warmup_cosine, with_perplexity
from dtrain.recipes.trigram import Tokens, trigram_perplexity

_TEST_SHARE = 10  # the last tenth of the text is the test


def text(
    *,
    seed: int,
    dtype: torch.dtype,
    data: str | None = None,
    model: str = "lstm",
    length: int = 64,
    vocabulary: int = 256,
    **sizes: object,
) -> Recipe:
    """A language model of characters; a sample is `length` characters and the ones that follow each.

    `model` is lstm or transformer, with their own sizes `hidden` and `layers`, and `heads` for the
    transformer. `vocabulary` bounds the number of tokens: the rarest characters of the training part beyond
    it, and those that only the test part has, share token 0, for the trigram baseline too. Samples do not
    overlap; the state of the LSTM is not carried from one to the next.

    Raises UsageError for a model or size that does not exist, DataError for a text that cannot be used.
    """
    make = choose(_MODELS, model, what="recipe 'text': model")
    keywords = checked(make, sizes, where=f"recipe 'text' with model {model}", beside=text)
    characters = _python_documentation() if data is None else _read(Path(data))
    if len(characters) < _TEST_SHARE * (length + 1):
        raise DataError(
            f"{data or 'the documentation'}: {len(characters)} characters are too few to learn from and test"
            f" on pieces of {length}: give at least {_TEST_SHARE * (length + 1)}, or a smaller length"
        )
    corpus = encode(characters, vocabulary)
    return Recipe(
        name="text",
        model=seeded(lambda: make(corpus.vocabulary, length, **keywords), seed=seed, dtype=dtype),
        train=_pieces(corpus.train, length),
        test=_pieces(corpus.test, length),
        loss=token_loss,
        score=token_score,
        optimizer=partial(torch.optim.Adam, lr=_LEARNING_RATES[model], betas=(0.9, 0.99)),
        schedule=warmup_cosine,
        global_batch=32,
        epochs=4,
        headline="perplexity",
        notes={"trigram_perplexity": _baseline(corpus, length)},
        finish=with_perplexity,
    )


def _lstm(vocabulary: int, length: int, *, hidden: int = 256, layers: int = 1) -> nn.Module:
    return LSTM(vocabulary, hidden=hidden, layers=layers)


def _transformer(vocabulary: int, length: int, *, hidden: int = 128, layers: int = 2, heads: int = 4) -> nn.Module:
    return Transformer(vocabulary, hidden=hidden, layers=layers, heads=heads, length=length)


_MODELS: Mapping[str, Callable[..., nn.Module]] = {"lstm": _lstm, "transformer": _transformer}
_LEARNING_RATES = {"lstm": 4e-3, "transformer": 2e-3}


class Corpus(NamedTuple):
    """A text as tokens in 0..vocabulary-1; 0 is any character that has no token of its own."""

    train: Tokens
    test: Tokens
    vocabulary: int


def encode(characters: str, limit: int) -> Corpus:
    """The tokens of a text, one for each of the `limit` - 1 most frequent characters of its training part.

    Characters that are equally frequent rank by code point. Raises UsageError for a limit below 2.
    """
    if limit < 2:
        raise UsageError(f"recipe 'text': vocabulary={limit}: must be at least 2")
    codes = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
    cut = len(codes) - len(codes) // _TEST_SHARE
    known, counts = np.unique(codes[:cut], return_counts=True)
    kept = np.sort(known[np.argsort(-counts, kind="stable")[: limit - 1]])
    places = np.searchsorted(kept, codes).clip(max=len(kept) - 1)
    tokens = np.where(kept[places] == codes, places + 1, 0)
    return Corpus(tokens[:cut], tokens[cut:], len(kept) + 1)


def _pieces(tokens: Tokens, length: int) -> WindowData:
    """Sample i: inputs are tokens i * length up to (i + 1) * length, targets the same places plus one."""
    bank, samples = torch.from_numpy(tokens), (len(tokens) - 1) // length
    return WindowData(bank, samples=samples, width=length + 1, stride=length, split=next_token)


def _baseline(corpus: Corpus, length: int) -> float:
    """The trigram model's perplexity on just the characters that are targets in the test samples."""
    targets = (len(corpus.test) - 1) // length * length
    # before the first target are two characters: the first to test on, and the last to learn from
    read = np.concatenate([corpus.train[-1:], corpus.test[: targets + 1]])
    return trigram_perplexity(corpus.train, read, corpus.vocabulary)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); --data must name a text file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the text, with iconv for example") from error


def _python_documentation() -> str:
    """What `help()` knows by topic, in the order of the topics' names; differs between versions of Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python comes without pydoc_data.topics; give a text file with --data") from error
    return "".join(topics[name] for name in sorted(topics))
