"""Means and intervals: closed forms, and no dependence on order or blocks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2am.evaluation.scores import bootstrap
from i2am.evaluation.scores.bootstrap import interval, mean, resampled_means, resamples

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=50), st.randoms(use_true_random=False))
def test_mean_has_the_same_bits_in_any_order(values, random):
    shuffled = random.sample(values, len(values))
    assert mean(np.array(values)) == mean(np.array(shuffled))


@given(st.lists(finite, min_size=1, max_size=50))
def test_mean_is_the_mean(values):
    assert math.isclose(mean(np.array(values)), sum(values) / len(values), abs_tol=1e-9)


def test_mean_of_many_scores_is_exact_to_1e_12():
    # thirds do not sum exactly in floating point, one after the other
    values = np.tile([1 / 3, -2.7, 0.1], 10_000)
    assert abs(mean(values) - (1 / 3 - 2.7 + 0.1) / 3) < 1e-12


def test_a_resample_draws_as_many_as_there_are():
    (block,) = resamples(7, 20, seed=3)
    assert block.shape == (20, 7)
    assert (block.sum(1) == 7).all()
    assert len({tuple(row) for row in block}) > 15


def test_resamples_do_not_depend_on_the_size_of_blocks(monkeypatch):
    whole = np.concatenate(list(resamples(7, 20, seed=3)))
    monkeypatch.setattr(bootstrap, "_CELLS", 21)
    blocks = list(resamples(7, 20, seed=3))
    assert len(blocks) == 7
    assert (np.concatenate(blocks) == whole).all()


def test_seed_and_stream_change_the_resamples():
    draws = [
        np.concatenate(list(resamples(9, 5, seed=seed, stream=stream))).tobytes()
        for seed, stream in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3


def test_every_sample_is_drawn_once_on_average():
    counts = np.concatenate(list(resamples(50, 4000, seed=0))).mean(0)
    assert np.abs(counts - 1).max() < 5 / math.sqrt(4000)


def test_the_interval_is_that_of_the_central_limit_theorem():
    values = np.random.default_rng(0).standard_normal(2000) + 5
    low, high = interval(resampled_means(values, 4000, seed=0))
    half = 1.96 * values.std() / math.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=half / 10)
    assert high == pytest.approx(values.mean() + half, abs=half / 10)


def test_equal_values_have_an_interval_of_no_width():
    assert interval(resampled_means(np.full(4, 0.25), 100, seed=0)) == (0.25, 0.25)
