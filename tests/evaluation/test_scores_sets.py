"""FID and KID against torchmetrics, closed forms and what resampling really does."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from i2am.evaluation.scores.bootstrap import resamples
from i2am.evaluation.scores.frechet import FrechetDistance, Moments
from i2am.evaluation.scores.kernel import (
    kernel_distance,
    resampled_kernel_distances,
    subset_kernel_distance,
)
from i2am.evaluation.scores.samples import Samples
from i2am.evaluation.scores.sets import FeatureSet, SetScores
from i2am.evaluation.scores.testing import tiny_extractor
from i2am.evaluation.shard import Reason


def drawn(n, features, seed, shift=0.0):
    """Features like a network's: correlated, not negative, of different sizes."""
    mixing = torch.randn(features, features, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(n, features, generator=torch.Generator().manual_seed(seed))
    return (noise @ mixing / features**0.5).relu() + shift


def moments(features, chunk=7):
    found = Moments()
    for part in features.split(chunk):
        found.add(part)
    return found


def fid(generated, real):
    return FrechetDistance(moments(generated), moments(real))


class Given(torch.nn.Module):
    """Takes features for pictures, so that torchmetrics gets exactly ours."""

    def __init__(self, features):
        super().__init__()
        self.num_features = features

    def forward(self, pictures):
        return pictures


def torchmetrics_fid(generated, real):
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Given(generated.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


# FID


@pytest.mark.parametrize(
    ("n", "m", "features"),
    [(200, 200, 16), (150, 90, 64), (40, 60, 64), (2, 2, 5), (30, 30, 1)],
    ids=["many", "unequal", "fewer-than-features", "two", "one-feature"],
)
def test_fid_agrees_with_torchmetrics(n, m, features):
    generated, real = drawn(n, features, 1), drawn(m, features, 2, shift=0.1)
    expected = torchmetrics_fid(generated, real)
    assert fid(generated, real).value == pytest.approx(expected, rel=1e-6)


def test_fid_of_pictures_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(0)
    extractor = tiny_extractor()
    sets = [
        torch.randint(low, high, (40, 3, 32, 24), generator=generator).to(torch.uint8)
        for low, high in ((0, 200), (80, 256))
    ]
    metric = FrechetInceptionDistance(feature=extractor)
    metric.update(sets[0], real=False)
    metric.update(sets[1], real=True)
    ours = fid(*(extractor(pictures) for pictures in sets)).value
    # theirs goes through fp32 at the end
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_fid_of_one_feature_is_the_closed_form():
    generated, real = drawn(50, 1, 1).double(), drawn(80, 1, 2, shift=1.0).double()
    means = float((generated.mean() - real.mean()) ** 2)
    spreads = float((generated.std() - real.std()) ** 2)
    assert fid(generated, real).value == pytest.approx(means + spreads, rel=1e-12)


def test_fid_of_a_set_with_itself_is_zero():
    features = drawn(40, 64, 1)
    assert fid(features, features).value == pytest.approx(0, abs=1e-10)


def test_fid_is_symmetric():
    generated, real = drawn(40, 24, 1), drawn(60, 24, 2)
    assert fid(generated, real).value == pytest.approx(fid(real, generated).value, rel=1e-10)


def test_fid_does_not_depend_on_how_the_sets_are_cut():
    generated, real = drawn(60, 16, 1), drawn(60, 16, 2)
    values = [
        FrechetDistance(moments(generated, chunk), moments(real, 61 - chunk)).value
        for chunk in (1, 7, 60)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-10)


def test_far_away_features_lose_no_digits():
    generated, real = drawn(60, 8, 1).double(), drawn(60, 8, 2).double()
    near, far = fid(generated, real).value, fid(generated + 1e4, real + 1e4).value
    assert far == pytest.approx(near, rel=1e-6)


def test_identical_pictures_have_no_covariance():
    same = torch.ones(5, 4)
    assert fid(same, same + 2).value == pytest.approx(16, rel=1e-12)
    assert fid(same, same + 2).influence(same, of=0).tolist() == pytest.approx([0] * 5, abs=1e-12)


def test_fid_needs_two_pictures_on_each_side():
    with pytest.raises(ValueError, match="real pictures must be at least 2, got 1"):
        fid(drawn(5, 3, 1), drawn(1, 3, 2))
    with pytest.raises(ValueError, match="generated pictures must be at least 2, got 0"):
        fid(torch.empty(0, 3), drawn(5, 3, 2))


def weighted_fid(generated, real, weights):
    """FID when the generated pictures have weights that sum to 1."""
    x, y = generated.double().numpy(), real.double().numpy()
    centre = weights @ x
    n = len(x)
    covariance = n / (n - 1) * ((x - centre).T * weights) @ (x - centre)
    other = np.cov(y.T)
    root = sqrtm(covariance @ other)
    difference = centre - y.mean(0)
    return difference @ difference + np.trace(covariance + other - 2 * np.real(root))


def test_influence_is_the_derivative_by_a_pictures_weight():
    generated, real = drawn(30, 5, 1), drawn(25, 5, 2, shift=0.2)
    found = fid(generated, real).influence(generated, of=0)
    step = 1e-5
    for picture in (0, 11, 29):
        toward = np.full(30, 1 / 30)
        direction = -toward.copy()
        direction[picture] += 1
        up, down = (
            weighted_fid(generated, real, toward + sign * step * direction) for sign in (1, -1)
        )
        assert float(found[picture]) == pytest.approx((up - down) / (2 * step), rel=1e-4)


def test_influences_of_a_whole_set_cancel():
    # fewer pictures than features, where covariances are singular
    generated, real = drawn(20, 40, 1), drawn(30, 40, 2)
    distance = fid(generated, real)
    for number, side in enumerate((generated, real)):
        influence = distance.influence(side, of=number)
        assert abs(float(influence.mean())) < 1e-10 * float(influence.abs().max())


def test_influences_tell_how_much_fid_varies_from_set_to_set():
    n, features = 300, 4
    values = [
        fid(drawn(n, features, 2 * seed), drawn(n, features, 2 * seed + 1, shift=0.3)).value
        for seed in range(300)
    ]
    spreads = []
    for seed in range(10):
        sides = (drawn(n, features, 2 * seed), drawn(n, features, 2 * seed + 1, shift=0.3))
        distance = fid(*sides)
        parts = [distance.influence(side, of=of).var() / n for of, side in enumerate(sides)]
        spreads.append(math.sqrt(sum(parts)))
    assert np.mean(spreads) == pytest.approx(np.std(values), rel=0.12)


# KID


def direct_kid(generated, real):
    """Sum by sum, as the definition has it."""

    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    x, y = generated.double(), real.double()
    n, m = len(x), len(y)
    within = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return within + other - 2 * between


@pytest.mark.parametrize(("n", "m"), [(12, 12), (9, 15), (2, 2)])
def test_kid_is_its_definition(n, m):
    generated, real = drawn(n, 6, 1), drawn(m, 6, 2, shift=0.3)
    expected = direct_kid(generated, real)
    assert kernel_distance(generated, real) == pytest.approx(expected, rel=1e-12)


def test_kid_agrees_with_torchmetrics_over_one_subset_of_all():
    from torchmetrics.image.kid import KernelInceptionDistance

    generated, real = drawn(60, 16, 1).double(), drawn(60, 16, 2, shift=0.3).double()
    metric = KernelInceptionDistance(feature=Given(16), subsets=1, subset_size=60)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    expected, _ = metric.compute()
    assert kernel_distance(generated, real) == pytest.approx(float(expected), rel=1e-6)


def test_kid_does_not_depend_on_blocks(monkeypatch):
    generated, real = drawn(30, 8, 1), drawn(20, 8, 2)
    whole = kernel_distance(generated, real)
    monkeypatch.setattr("i2am.evaluation.scores.kernel._ROWS", 7)
    assert kernel_distance(generated, real) == pytest.approx(whole, rel=1e-12)


def test_subsets_of_all_pictures_are_all_alike():
    generated, real = drawn(50, 8, 1), drawn(50, 8, 2, shift=0.2)
    found = subset_kernel_distance(generated, real, subsets=5)
    assert found.value == pytest.approx(kernel_distance(generated, real), rel=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_subsets_estimate_the_whole_and_are_reproducible():
    generated, real = drawn(400, 8, 1), drawn(400, 8, 2, shift=0.4)
    found = subset_kernel_distance(generated, real, seed=3)
    assert found == subset_kernel_distance(generated, real, seed=3)
    assert found != subset_kernel_distance(generated, real, seed=4)
    error = found.value - kernel_distance(generated, real)
    assert abs(error) < 4 * found.std / 10
    assert found.std > 0


def test_resampled_kid_leaves_out_pairs_of_a_picture_with_itself():
    generated, real = drawn(8, 4, 1).double(), drawn(6, 4, 2).double()
    value, found = resampled_kernel_distances(generated, real, 4, seed=5)
    assert value == kernel_distance(generated, real)
    assert len(found) == 4
    (w,), (v,) = (resamples(n, 4, seed=5, stream=stream) for stream, n in enumerate((8, 6)))
    kernels = [(a @ b.T / 4 + 1).numpy() ** 3 for a in (generated, real) for b in (generated, real)]
    for row in range(4):

        def within(kernel, counts):
            pairs = np.outer(counts, counts) * (1 - np.eye(len(counts)))
            return (kernel * pairs).sum() / pairs.sum()

        between = w[row] @ kernels[1] @ v[row] / (w[row].sum() * v[row].sum())
        expected = within(kernels[0], w[row]) + within(kernels[3], v[row]) - 2 * between
        assert found[row] == pytest.approx(expected, rel=1e-10)


def test_resamples_of_a_single_picture_are_left_out():
    # of two pictures half of all resamples hold one of them only
    _, found = resampled_kernel_distances(drawn(2, 4, 1), drawn(9, 4, 2), 200, seed=0)
    assert 60 < len(found) < 140
    assert np.isfinite(found).all()


@pytest.mark.parametrize("sizes", [(1, 5), (5, 0)])
def test_kid_needs_two_pictures_on_each_side(sizes):
    with pytest.raises(ValueError, match="pictures must be at least 2, got"):
        kernel_distance(drawn(sizes[0], 3, 1), drawn(sizes[1], 3, 2))


def test_kid_needs_as_many_pictures_as_a_subset():
    with pytest.raises(ValueError, match=r"generated pictures must be at least 50, .* got 49"):
        subset_kernel_distance(drawn(49, 3, 1), drawn(60, 3, 2))


# Both, of one setting


def a_setting(persons, **more):
    ids = [f"{number:03d}" for number in range(len(persons))]
    status = np.full(len(ids), "ok", dtype="<U7")
    return Samples("unpaired", ids, persons, persons, [0], 1, status, **more)


def test_entries_have_values_intervals_and_counts():
    samples = a_setting([f"p{number}" for number in range(60)])
    scores = SetScores(samples)
    generated, real = drawn(60, 8, 1), drawn(60, 8, 2, shift=0.3)
    for start in range(0, 60, 16):
        rows = range(start, min(60, start + 16))
        scores.add(list(rows), generated[list(rows)], real[list(rows)])
    entries = scores.entries(["fid", "kid"], replicates=200, seed=0)
    assert entries["fid"]["value"] == pytest.approx(fid(generated, real).value, rel=1e-10)
    assert entries["kid_full"]["value"] == kernel_distance(generated, real)
    for name in ("fid", "kid_full"):
        low, high = entries[name]["interval"]
        assert low < entries[name]["value"] < high
    subset = subset_kernel_distance(generated, real)
    assert (entries["kid_subset50"]["value"], entries["kid_subset50"]["std"]) == subset
    assert "standard deviation" in entries["kid_subset50"]["interval_reason"]
    for name in ("kid_full", "kid_subset50"):
        thousand = entries[f"{name}_x1000"]
        assert thousand["value"] == 1000 * entries[name]["value"]
    assert entries["kid_full_x1000"]["interval"][0] == 1000 * entries["kid_full"]["interval"][0]
    assert {made["n_ok"] for made in entries.values()} == {60}
    assert {made["status"] for made in entries.values()} == {"ok"}


def test_a_person_in_several_pairs_counts_once_among_the_real_pictures():
    persons = ["a", "b", "a", "c", "b", "a"]
    generated, real = drawn(6, 4, 1), drawn(3, 4, 2)
    shown = real[[0, 1, 0, 2, 1, 0]]
    scores = SetScores(a_setting(persons))
    scores.add([0, 1, 2], generated[:3], shown[:3])
    scores.add([3, 4, 5], generated[3:], shown[3:])
    made = scores.entries(["fid"], replicates=0, seed=0)["fid"]
    assert (made["n_ok"], made["n_real"]) == (6, 3)
    assert made["value"] == pytest.approx(fid(generated, real).value, rel=1e-10)
    assert made["interval"] is None
    assert made["interval_reason"] == "no bootstrap was asked for"


def test_samples_without_features_are_left_out_and_explained():
    generated, real = drawn(5, 4, 1), drawn(5, 4, 2)
    generated[2] = torch.nan
    scores = SetScores(a_setting(list("abcde")))
    scores.add(range(5), generated, real)
    scores.explain(2, Reason("picture", "generated picture x.png does not exist"))
    made = scores.entries(["fid"], replicates=0, seed=0)["fid"]
    others = [0, 1, 3, 4]
    assert made["value"] == pytest.approx(fid(generated[others], real[others]).value, rel=1e-10)
    assert (made["n_ok"], made["n_real"], made["n_undefined"]) == (4, 4, 1)
    assert made["status"] == "partial"
    assert [of["code"] for of in made["undefined"]] == ["picture"]


def test_too_few_pictures_leave_both_undefined_with_a_reason():
    scores = SetScores(a_setting(["a"]))
    scores.add([0], drawn(1, 4, 1), drawn(1, 4, 2))
    entries = scores.entries(["fid", "kid"], replicates=10, seed=0)
    for name, made in entries.items():
        assert (name, made["value"], made["status"]) == (name, None, "undefined")
        assert made["reason"].startswith(name[:3].upper())
        assert "must be at least" in made["reason"]


def test_a_subset_larger_than_the_set_leaves_the_rest_defined():
    scores = SetScores(a_setting([str(number) for number in range(20)]))
    scores.add(range(20), drawn(20, 4, 1), drawn(20, 4, 2))
    entries = scores.entries(["fid", "kid"], replicates=10, seed=0)
    defined = {name for name, made in entries.items() if made["value"] is not None}
    assert defined == {"fid", "kid_full", "kid_full_x1000"}
    assert "must be at least 50, as many as a subset has" in entries["kid_subset50"]["reason"]


def test_of_many_pictures_only_some_features_are_kept():
    side = FeatureSet(planned=100, kept=10)
    features = drawn(100, 4, 1)
    for start in range(0, 100, 8):
        rows = list(range(start, min(100, start + 8)))
        side.add(features[rows], rows)
    again = FeatureSet(planned=100, kept=10)
    again.add(features, range(100))
    assert side.moments.n == 100
    assert side.features.shape == (10, 4)
    assert torch.equal(side.features, again.features)
    assert torch.allclose(side.moments.mean, features.double().mean(0))


def test_the_interval_of_fid_stays_that_of_all_pictures_when_some_are_kept():
    samples = a_setting([str(number) for number in range(2000)])
    generated, real = drawn(2000, 4, 1), drawn(2000, 4, 2, shift=0.3)
    widths = []
    for kept in (2000, 500):
        scores = SetScores(samples, kept=kept)
        scores.add(range(2000), generated, real)
        low, high = scores.entries(["fid"], replicates=400, seed=0)["fid"]["interval"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0], rel=0.2)
