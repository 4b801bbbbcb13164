"""IMACS as a torchmetrics Metric: streaming, merging and processes equal the function."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is an extra")

from i2am.metrics import IMACS, imacs  # noqa: E402 - needs torchmetrics


def batch(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(samples, 5, 4, generator=generator)
    return maps, (torch.rand(samples, 20, 16, generator=generator) > 0.6).float()


def updated(*batches, **options):
    metric = IMACS(**options)
    for maps, masks in batches:
        metric.update(maps, masks)
    return metric


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"penalty": 1.0, "threshold": 0.2},
        {"preset": "official", "direction": "generated_to_reference"},
        {"preset": "official", "invert": False},
    ],
    ids=str,
)
def test_the_class_is_the_mean_of_the_function(options):
    metric = IMACS(**options)
    scores = []
    for seed, samples in enumerate([3, 1, 4]):
        maps, masks = batch(samples, seed)
        scores.append(imacs(maps, masks, **options))
        torch.testing.assert_close(metric(maps, masks), scores[-1].mean())  # forward
    result = metric.compute()
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, torch.cat(scores).mean())
    assert (metric.n.item(), metric.n_undefined.item()) == (8, 0)


def test_processed_maps():
    maps, masks = torch.rand(2, 6, 6), torch.eye(6).expand(2, -1, -1)
    metric = updated((maps, masks), processed=True)
    torch.testing.assert_close(metric.compute(), imacs(maps, masks, processed=True).mean())


def test_undefined_samples_are_counted_and_left_out():
    maps, masks = batch(3)
    masks[1] = 0
    metric = updated((maps, masks), undefined="nan")
    assert (metric.n.item(), metric.n_undefined.item()) == (2, 1)
    torch.testing.assert_close(metric.compute(), imacs(maps, masks, undefined="nan").nanmean())
    only = updated((maps[1:2], masks[1:2]), undefined="nan")
    assert only.compute().isnan()


def test_a_refused_batch_is_not_counted():
    metric = updated(batch(2))
    before = metric.total.clone()
    maps, masks = batch(2, seed=1)
    masks[1] = 0
    with pytest.raises(ValueError, match="sample 1 has no score"):
        metric.update(maps, masks)
    maps[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        metric.update(maps, batch(2)[1])
    assert (metric.total, metric.n.item()) == (before, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "v2"}, "preset must be"),
        ({"direction": "up"}, "'up' is not a valid Direction"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        IMACS(**options)


def test_reset_clone_and_pickle():
    metric = updated(batch(3), penalty=2.0)
    value = metric.compute()
    clone, twin = metric.clone(), pickle.loads(pickle.dumps(metric))
    metric.reset()
    assert metric.n == 0
    for copy in (clone, twin):
        assert copy.penalty == 2.0
        assert torch.equal(copy.compute(), value)
    twin.update(*batch(2, seed=1))
    expected = torch.cat([imacs(*batch(3), penalty=2.0), imacs(*batch(2, seed=1), penalty=2.0)])
    torch.testing.assert_close(twin.compute(), expected.mean())


@given(sizes=st.lists(st.integers(0, 3), min_size=3, max_size=3))
@settings(max_examples=15)
def test_merging_states_in_any_order_equals_one_pass(sizes):
    batches = [batch(samples, seed) for seed, samples in enumerate(sizes)]
    whole = updated(*batches)
    left = updated(batches[0])
    left.merge_state(updated(batches[1]))
    left.merge_state(updated(batches[2]))
    right = updated(batches[2])
    right.merge_state(updated(batches[1]))
    right.merge_state(updated(batches[0]))
    for merged in (left, right):
        assert merged.n == whole.n == sum(sizes)
        torch.testing.assert_close(merged.total, whole.total, rtol=1e-12, atol=1e-12)


def test_a_collection_scores_as_each_alone():
    options = {"paper": {}, "official": {"preset": "official"}, "mild": {"penalty": 1.0}}
    collection = torchmetrics.MetricCollection({k: IMACS(**v) for k, v in options.items()})
    batches = [batch(3), batch(2, seed=1)]
    for maps, masks in batches:
        collection.update(maps, masks)
    for name, value in collection.compute().items():
        assert torch.equal(value, updated(*batches, **options[name]).compute())


def test_sums_stay_fp64_whatever_the_model_is_cast_to():
    metric = updated(batch(3))
    value = metric.compute()
    for cast in (metric.half(), metric.float(), metric.set_dtype(torch.float16)):
        assert cast.total.dtype == torch.float64
        assert cast.n.dtype == torch.int64
    assert torch.equal(metric.compute(), value)


def test_what_torchmetrics_wants_to_know():
    metric = IMACS(penalty=2.0)
    assert metric.higher_is_better is True
    assert metric.full_state_update is False
    assert (metric.plot_lower_bound, metric.plot_upper_bound) == (-2.0, 1.0)
    assert metric.state_dict() == {}
    assert pickle.loads(pickle.dumps(IMACS)) is IMACS


WORKER = """
import json, sys
import torch
import torch.distributed as dist
from i2am.metrics import IMACS

rank, rendezvous, data = int(sys.argv[1]), sys.argv[2], torch.load(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
results = {}
for name, ranks in data.items():
    metric = IMACS(undefined="nan")
    for maps, masks in ranks[rank]:
        metric.update(maps, masks)
    value = metric.compute().item()
    with metric.sync_context(should_unsync=True):
        results[name] = [value, metric.n.item(), metric.n_undefined.item()]
dist.destroy_process_group()
print(json.dumps(results))
"""


def test_two_processes_uneven_or_one_empty_equal_one(fork, tmp_path):
    batches = [batch(samples, seed) for seed, samples in enumerate([3, 1, 2, 4])]
    batches[1][1].zero_()
    ranks = {
        "even": [batches[:2], batches[2:]],
        "uneven": [batches[:1], batches[1:]],
        "one empty": [[], batches],
    }
    torch.save(ranks, tmp_path / "data")
    workers = [fork(WORKER, rank, tmp_path / "rendezvous", tmp_path / "data") for rank in range(2)]
    outputs = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    whole = updated(*batches, undefined="nan")
    for output in outputs:
        results = json.loads(output)
        assert results.keys() == ranks.keys()
        for value, n, n_undefined in results.values():
            assert value == pytest.approx(whole.compute().item(), rel=1e-12)
            assert (n, n_undefined) == (9, 1)
