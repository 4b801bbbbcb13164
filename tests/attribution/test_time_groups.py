"""Time groups change places; whoever adds, adds at one address."""

import pytest
import torch

from i2am.attribution import Accumulator
from i2am.attribution.time_groups import TimeGroups
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
    accumulator = Accumulator(time_groups=3, sums=sums, joint=True)
    site = make_site("a", (4, 3), (2, 2))
    query, key, _ = make_qkv(1, 2, 12, 4, 8)
    addresses = []
    for group in (0, 0, 1, 1, 2):
        accumulator.begin(group)
        accumulator.add(site, query, key, group=group)
        layer = accumulator._layers["a"]
        held = accumulator._resized.tensors if accumulator._resized else []
        tensors = [*layer.sums, *held, *accumulator._joint.tensors]
        addresses.append([tensor.data_ptr() for tensor in tensors])
    assert all(later == addresses[1] for later in addresses[1:])
