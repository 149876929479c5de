"""Drawing tokens: what is drawn follows the probabilities, and a row depends on its own seed alone."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import SettingsError
from zoo.generation.tokens import Sampling, choose, guide, sample_tokens, uniforms

PLAIN = Sampling()


def test_uniforms_depend_on_the_seed_alone_and_not_on_the_batch():
    together, alone = uniforms([3, 9, 2**40], 50), uniforms([9], 50)
    assert torch.equal(together[1], alone[0]) and not torch.equal(together[0], together[1])
    assert ((together >= 0) & (together < 1)).all()


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.bincount(choose(logits, uniform, PLAIN)) / 20_000
    assert share.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    sharper = torch.bincount(choose(logits, uniform, Sampling(temperature=0.5))) / 20_000
    squares = torch.tensor([0.25, 0.09, 0.04]) / 0.38
    assert sharper.tolist() == pytest.approx(squares.tolist(), abs=0.015)


def test_the_token_is_where_the_number_falls_and_never_one_of_probability_zero():
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    for number, token in ((0.0, 1), (0.49, 1), (0.51, 3), (1 - 1e-16, 3)):
        assert choose(logits[None], torch.tensor([number], dtype=torch.float64), PLAIN).tolist() == [token]


def test_top_k_and_top_p_keep_the_likeliest_only():
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().expand(2000, 5)
    uniform = torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = lambda **words: set(choose(logits, uniform, Sampling(**words)).tolist())  # noqa: E731
    assert kept(top_k=2) == {1, 3}
    assert kept(top_k=100) == {0, 1, 2, 3, 4}
    assert kept(top_p=0.7) == {1, 3}  # the least number of tokens that reach it
    assert kept(top_p=0.71) == {1, 3, 4}
    assert kept(top_p=0.71, top_k=1) == {1}
    assert kept(top_p=1e-9) == {1}
    assert kept(temperature=0) == {1}


def test_guidance_is_u_plus_scale_times_the_difference():
    c, u = torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(guide(c, u, 3.0), u + 3 * (c - u))
    torch.testing.assert_close(guide(c, u, 1.0), c)


def test_each_position_is_asked_once_with_the_token_before_and_given_ones_are_kept():
    asked, told = [], []

    def predict(tokens, position):
        asked.append((position, None if tokens is None else tokens.tolist()))
        return torch.zeros(2, 7)

    given = torch.tensor([[5, 6], [1, 2]])
    drawn = sample_tokens(predict, uniforms([0, 1], 5), PLAIN, given, lambda at, so_far: told.append(so_far.shape))
    assert [at for at, _ in asked] == [0, 1, 2, 3, 4]
    assert asked[0][1] is None
    assert [tokens for _, tokens in asked[1:]] == drawn[:, :-1].T.tolist()
    assert torch.equal(drawn[:, :2], given)
    assert told == [(2, n) for n in range(1, 6)]
    with pytest.raises(SettingsError, match="3 tokens are given"):
        sample_tokens(predict, uniforms([0, 1], 2), PLAIN, torch.zeros(2, 3, dtype=torch.int64))


def test_a_sequence_does_not_depend_on_the_batch_it_is_drawn_in():
    torch.manual_seed(0)
    table = torch.randn(9, 9)
    predict = lambda tokens, _: table[tokens] if tokens is not None else table[:1].expand(rows, -1)  # noqa: E731
    rows = 3
    together = sample_tokens(predict, uniforms([7, 8, 9], 20), PLAIN)
    rows = 1
    assert torch.equal(sample_tokens(predict, uniforms([8], 20), PLAIN), together[1:2])


@pytest.mark.parametrize("words", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}])
def test_settings_that_mean_nothing_are_refused(words):
    with pytest.raises(SettingsError, match=next(iter(words))):
        Sampling(**words)
