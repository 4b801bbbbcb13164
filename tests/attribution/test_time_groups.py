"""Time groups change places; whoever adds, adds at one address."""

from types import SimpleNamespace

import pytest
import torch

from i2am.attribution import Accumulator, accumulator, buffers, pair_sums, resized
from i2am.attribution.time_groups import TimeGroups, refuse_capture
from i2am.testing import make_qkv, make_site


@pytest.mark.parametrize(
    "order", [[0, 0, 1, 2, 3], [3, 1, 0, 2], [0, 2, 0, 3, 1, 1, 2, 0, 3], [2]], ids=str
)
def test_sums_are_filed_under_their_group_in_any_order(order):
    groups = TimeGroups(4)
    sums, other = torch.zeros(2, 4, 3), torch.zeros(2, 4, 1, 2)
    wanted = torch.zeros(2, 4, 3)
    address = sums[:, 0].data_ptr()
    for step, group in enumerate(order):
        groups.begin(group, [sums, other])
        assert groups.current == group
        assert sums[:, 0].data_ptr() == address
        sums[:, 0] += 2.0**step
        other[:, 0] += 2.0**step
        wanted[:, group] += 2.0**step
    assert torch.equal(groups.ordered(sums), wanted)
    assert torch.equal(groups.ordered(other)[..., 0, :], wanted[..., :2])
    assert [int(sums[0, slot, 0]) for slot in groups.slots] == wanted[0, :, 0].tolist()


def test_a_copy_goes_its_own_way():
    groups = TimeGroups(3)
    groups.begin(1, [])
    copied = groups.copy()
    copied.begin(2, [])
    assert (groups.current, copied.current) == (1, 2)


@pytest.mark.parametrize("sums", ["native", "resized"])
def test_buffers_stay_where_they_are(sums):
    """What a captured graph was given stays valid: nothing is allocated after the second call."""
    accumulator = Accumulator(time_groups=3, sums=sums, pairs=True)
    site = make_site("a", (4, 3), (2, 2))
    query, key, _ = make_qkv(1, 2, 12, 4, 8)
    addresses = []
    for group in (0, 0, 1, 1, 2):
        accumulator.begin(group)
        accumulator.add(site, query, key, group=group)
        layer = accumulator._layers["a", "reference"]
        resized = accumulator._resized or {}
        held = [sums for each in resized.values() for sums in each.tensors]
        tensors = [*layer.sums, *held, *accumulator._pairs.tensors]
        addresses.append([tensor.data_ptr() for tensor in tensors])
    assert all(later == addresses[1] for later in addresses[1:])


def test_there_is_no_such_group():
    with pytest.raises(ValueError, match=r"group must be in range\(3\), got -1"):
        TimeGroups(3).begin(-1, [])


def test_sums_are_not_made_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refuse_capture(SimpleNamespace(is_cuda=False))
    with pytest.raises(RuntimeError, match="sums must exist before a CUDA graph is captured"):
        refuse_capture(SimpleNamespace(is_cuda=True))


@pytest.mark.parametrize("sums", ["native", "resized"])
def test_it_is_asked_wherever_sums_are_made(monkeypatch, sums):
    asked = []
    for module in (buffers, resized, pair_sums):
        monkeypatch.setattr(module, "refuse_capture", lambda like, name=module: asked.append(name))
    recording = accumulator.Accumulator(time_groups=2, sums=sums, pairs=True)
    site = make_site("a", (4, 3), (2, 2))
    query, key, _ = make_qkv(1, 2, 12, 4, 8)
    for group, made in ((0, True), (1, False), (1, False)):
        asked.clear()
        recording.add(site, query, key, group=group)
        recording.begin(group)  # the evaluation is over
        assert set(asked) == ({buffers, pair_sums} if made else set()) | (
            {resized} if made and sums == "resized" else set()
        )
