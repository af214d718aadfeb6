"""The trigram baseline against sums done by hand and by brute force."""

import numpy as np
import pytest

from dtrain.errors import UsageError
from dtrain.recipes.trigram import Tokens, mixture_weights, parts, trigram_perplexity


def tokens(text: str) -> Tokens:
    return np.array([ord(c) - ord("a") for c in text], dtype=np.int64)


def test_probabilities_by_hand() -> None:
    # abcabcabd: a 3, b 3, c 2, d 1; after ab: c twice, d once; after b: c twice, d once; after d: nothing
    got, seen = parts(tokens("abcabcabd"), tokens("abcadab"), vocabulary=4)
    third, ninth = 1 / 3, 1 / 9
    expected = [
        [2 * third, 2 * third, 2 * ninth, 0.25],  # c after ab
        [1, 1, 3 * ninth, 0.25],  # a after bc
        [0, 0, ninth, 0.25],  # d after ca, which b always follows, as it does after a
        [3 * ninth, 3 * ninth, 3 * ninth, 0.25],  # a after ad, unseen, and after d, which ends the text
        [1, 1, 3 * ninth, 0.25],  # b after da, unseen; after a
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-15)
    assert seen.tolist() == [3, 2, 2, 0, 0]


def test_every_column_is_a_distribution() -> None:
    train = np.random.default_rng(0).integers(0, 5, 60)
    for a in range(5):
        for b in range(5):
            total = sum(parts(train, np.array([a, b, c]), vocabulary=5)[0][0] for c in range(5))
            np.testing.assert_allclose(total, np.ones(4), rtol=1e-12)


def test_weights_are_the_likeliest() -> None:
    probabilities = np.random.default_rng(1).random((50, 2))
    grid = np.linspace(0.0005, 0.9995, 1000)
    likelihood = [
        np.log(probabilities @ [w, 1 - w]).sum() + np.log(w) + np.log(1 - w) for w in grid
    ]  # with one made-up token for each column
    np.testing.assert_allclose(mixture_weights(probabilities)[0], grid[np.argmax(likelihood)], atol=2e-3)


def test_no_weight_vanishes() -> None:
    weights = mixture_weights(np.array([[0.9, 1e-9]] * 98))
    np.testing.assert_allclose(weights, [0.99, 0.01], rtol=1e-6)


def test_perplexity_of_text_that_can_be_foreseen_and_of_noise() -> None:
    pattern = np.tile(tokens("abcd"), 500)
    assert trigram_perplexity(pattern, pattern[:400], 4) < 1.01
    noise = np.random.default_rng(2).integers(0, 8, 20_000)
    assert trigram_perplexity(noise[:18_000], noise[18_000:], 8) == pytest.approx(8, rel=0.02)


def test_order_three_is_used() -> None:
    # each token is the sum of the two before it, modulo 7, three times in four
    draw = np.random.default_rng(3)
    text = [1, 1]
    for noise in draw.integers(0, 28, 20_000):
        text.append(int(noise) if noise < 7 else (text[-1] + text[-2]) % 7)
    entropy = -(0.75 + 0.25 / 7) * np.log(0.75 + 0.25 / 7) - 6 * 0.25 / 7 * np.log(0.25 / 7)
    got = trigram_perplexity(np.array(text[:18_000]), np.array(text[18_000:]), 7)
    assert got == pytest.approx(np.exp(entropy), rel=0.05)


def test_unseen_tokens_cost_a_finite_amount() -> None:
    pattern = np.tile(tokens("ab"), 500)
    assert 1 < trigram_perplexity(pattern, tokens("abcab"), 3) < 1e3


def test_short_texts_are_refused() -> None:
    with pytest.raises(UsageError, match="texts of 3 and 9 tokens"):
        trigram_perplexity(tokens("abc"), tokens("abcabcabc"), 3)
