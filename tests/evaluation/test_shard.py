"""One shard: what goes in comes out, equal content is equal bytes, and any damage is found."""

import json
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from i2am.evaluation.errors import StoreConflict, StoreDamaged
from i2am.evaluation.shard import SAMPLE, Reason, Shard
from i2am.evaluation.testing import make_plan, make_shard
from i2am.files import canonical
from i2am.metrics.names import IMACS_NAMES

FIELDS = ("setting", "number", "fingerprint", "ids", "score_names", "reasons", "batches", "images")
TENSORS = ("index", "status", "scores")


def shard(**options):
    return make_shard(make_plan(), **options)[0]


def assert_same(first, second, maps=None):
    for name in FIELDS:
        assert getattr(first, name) == getattr(second, name), name
    for name in TENSORS:
        ours, theirs = getattr(first, name), getattr(second, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.nan_to_num(nan=-9), theirs.nan_to_num(nan=-9)), name
    assert second.maps.keys() == (first.maps.keys() if maps is None else maps)
    for name, tensor in second.maps.items():
        assert tensor.dtype == first.maps[name].dtype
        assert torch.equal(tensor, first.maps[name]), name


def rewritten(data, change, *, seal=True):
    """The file with another description; `seal` makes its checksum right again."""
    length = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["i2am"])
    change(document)
    if seal:
        document.pop("checksum")
        document["checksum"] = zlib.crc32(canonical(document))
    return save(load(data), {"i2am": canonical(document).decode()})


# What comes out


@pytest.mark.parametrize(
    "options",
    [{}, {"maps": False}, {"failed": 0}, {"undefined": 1}, {"setting": "unpaired", "number": 2}],
    ids=["whole", "no maps", "failed", "undefined", "last unpaired"],
)
def test_round_trip(options):
    before = shard(**options)
    data = before.to_bytes()
    after = Shard.from_bytes(data)
    assert_same(before, after)
    assert after.to_bytes() == data


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@settings(max_examples=30)
@given(st.data())
def test_round_trip_of_anything(data):
    ids = data.draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    names = data.draw(st.lists(NAMES.filter(lambda name: name != SAMPLE), max_size=3, unique=True))
    floats = st.floats(width=64, allow_nan=True, allow_infinity=True)
    rows = data.draw(st.lists(st.tuples(*[floats] * len(names)), min_size=len(ids)))[: len(ids)]
    scores = torch.tensor(rows, dtype=torch.float64).reshape(len(ids), len(names))
    failed = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    why = Reason(data.draw(NAMES), data.draw(NAMES))
    reasons = {}
    for id, bad, row in zip(ids, failed, rows, strict=False):
        undefined = {n: why for n, value in zip(names, row, strict=True) if value != value}
        reasons[id] = {**undefined, SAMPLE: why} if bad else undefined
    shape = (len(ids), *data.draw(st.tuples(*[st.integers(0, 3)] * 4)))
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32]))
    maps = {"r2g_mask": torch.rand(shape).to(dtype), "r2g_mask_scale": torch.rand(shape[:3])}
    before = Shard(
        setting=data.draw(NAMES),
        number=data.draw(st.integers(0, 10**9)),
        fingerprint=data.draw(NAMES),
        ids=tuple(ids),
        score_names=tuple(names),
        index=torch.arange(len(ids)),
        status=torch.tensor(failed, dtype=torch.uint8),
        scores=scores,
        maps=maps if data.draw(st.booleans()) else {},
        reasons={id: of for id, of in reasons.items() if of},
        batches=tuple((place,) for place in range(len(ids))),
        images={ids[0]: data.draw(st.integers(0, 2**32 - 1))},
    )
    assert_same(before, Shard.from_bytes(before.to_bytes()))


def test_any_safetensors_reader_opens_it_and_metadata_is_one_key(tmp_path):
    path, ours = tmp_path / "shard.safetensors", shard()
    path.write_bytes(ours.to_bytes())
    with safe_open(path, "pt") as file:
        assert [*file.metadata()] == ["i2am"]
        assert {*file.keys()} == {*TENSORS, *ours.maps}
        for name, tensor in {**ours.maps, "scores": ours.scores}.items():
            assert torch.equal(file.get_tensor(name), tensor)


@pytest.mark.parametrize("tensors", [(), ("g2r_uniform",), ["r2g_uniform", "r2g_uniform_scale"]])
def test_only_the_maps_asked_for(tensors):
    whole = shard()
    assert_same(whole, Shard.from_bytes(whole.to_bytes(), tensors=tensors), maps={*tensors})


def test_nothing_else_of_the_file_is_read(tmp_path):
    data = bytearray(shard().to_bytes())
    whole = Shard.from_bytes(bytes(data))
    # the largest tensor is damaged, and only it
    start = data.index(whole.maps["r2g_uniform"].numpy().tobytes())
    data[start] ^= 1
    assert_same(whole, Shard.from_bytes(bytes(data), tensors=["g2r_uniform"]), {"g2r_uniform"})
    with pytest.raises(StoreDamaged, match="r2g_uniform does not match its checksum"):
        Shard.from_bytes(bytes(data))
    assert not torch.equal(
        Shard.from_bytes(bytes(data), check=False).maps["r2g_uniform"], whole.maps["r2g_uniform"]
    )


# Equal content, equal bytes


def test_order_of_dictionaries_and_memory_layout_do_not_matter():
    ours = shard(failed=0, undefined=1)
    twisted = replace(
        ours,
        scores=ours.scores.T.contiguous().T,
        maps=dict(
            reversed(
                {
                    n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in ours.maps.items()
                }.items()
            )
        ),
        reasons=dict(reversed(ours.reasons.items())),
        images=dict(reversed(ours.images.items())),
    )
    assert twisted.to_bytes() == ours.to_bytes()


def test_reasons_that_are_empty_do_not_matter():
    ours = shard()
    assert replace(ours, reasons={id: {} for id in ours.ids}).to_bytes() == ours.to_bytes()


def test_maps_that_share_memory_are_stored():
    ours = shard()
    tensor = ours.maps["r2g_uniform"]
    both = replace(ours, maps={"r2g_uniform": tensor, "r2g_mask": tensor})
    assert_same(both, Shard.from_bytes(both.to_bytes()))


PRINT = """
import sys, zlib
from i2am.evaluation.testing import make_plan, make_shard
sys.stdout.write(str(zlib.crc32(make_shard(make_plan(), failed=0, undefined=1)[0].to_bytes())))
"""


def test_equal_bytes_in_another_process(fork):
    printed, _ = fork(PRINT).communicate()
    assert printed == str(zlib.crc32(shard(failed=0, undefined=1).to_bytes()))


# Damage


def test_every_truncation_is_found():
    data = shard(failed=0).to_bytes()
    for length in range(len(data)):
        with pytest.raises(StoreDamaged, match=r"the shard is (truncated|damaged)"):
            Shard.from_bytes(data[:length], tensors=())


def test_bytes_behind_the_end_are_found():
    with pytest.raises(StoreDamaged, match="its tensors take"):
        Shard.from_bytes(shard().to_bytes() + b"\0")


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_the_header_is_found(bit):
    # with an escape in it, whose digits have two ways to be written
    plan = make_plan(pairs=2)
    plan["data"]["pairs"]["paired"][0][0] = "caf\u00e9"
    data = bytearray(make_shard(plan, undefined=0)[0].to_bytes())
    for place in range(8 + int.from_bytes(data[:8], "little")):
        data[place] ^= 1 << bit
        with pytest.raises(StoreDamaged, match=r"the shard is (truncated|damaged)"):
            Shard.from_bytes(bytes(data), tensors=(), check=False)
        data[place] ^= 1 << bit


def test_every_flipped_byte_of_the_tensors_is_found():
    data = bytearray(shard().to_bytes())
    for place in range(8 + int.from_bytes(data[:8], "little"), len(data)):
        data[place] ^= 0x10
        with pytest.raises(StoreDamaged, match="does not match its checksum"):
            Shard.from_bytes(bytes(data))
        data[place] ^= 0x10


def test_a_newer_schema_is_named():
    data = rewritten(shard().to_bytes(), lambda document: document.update(schema=2, more=[]))
    with pytest.raises(StoreConflict, match="has schema 2 and this i2am reads schema 1; read it"):
        Shard.from_bytes(data)


@pytest.mark.parametrize(
    ("change", "seal", "message"),
    [
        (lambda d: d.update(number=7), False, "its description does not match its checksum"),
        (lambda d: d.pop("checksum"), False, "damaged, or not a file of i2am"),
        (lambda d: d.pop("tensors"), True, "'tensors'"),
        (lambda d: d.pop("ids"), True, "'ids'"),
        (lambda d: d["tensors"].pop("index"), True, "'index'"),
        (lambda d: d["tensors"].update(more={}), True, "more is missing"),
        (lambda d: d["tensors"]["index"].update(shape=[1, 2]), True, "index is not as described"),
        (lambda d: d["ids"].pop(), True, "must be torch.int64 .1."),
        (lambda d: d["reasons"].update(a={"b": {}}), True, "code"),
    ],
)
def test_a_changed_description_is_found(change, seal, message):
    with pytest.raises(StoreDamaged, match=message):
        Shard.from_bytes(rewritten(shard().to_bytes(), change, seal=seal))


def test_tensors_of_another_type_of_the_same_size_are_found():
    with pytest.raises(StoreDamaged, match="index is not as described"):
        Shard.from_bytes(shard().to_bytes().replace(b'"I64"', b'"F64"', 1))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        b"\0" * 8,
        b"not tensors at all",
        b"\xff" * 64,
        (20).to_bytes(8, "little") + b"[" * 20,
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        save({"weight": torch.ones(2)}),
        save({"weight": torch.ones(2)}, {"i2am": "[1]"}),
        save({"weight": torch.ones(2)}, {"i2am": '"text"'}),
    ],
    ids=[
        "empty",
        "short",
        "zeros",
        "text",
        "ones",
        "list",
        "deep",
        "other",
        "list entry",
        "text entry",
    ],
)
def test_foreign_files_are_refused(data):
    with pytest.raises(StoreDamaged, match=r"the shard is (truncated|damaged)"):
        Shard.from_bytes(data)


def test_a_map_that_is_not_there():
    with pytest.raises(ValueError, match=r"tensors must be of \['g2r.*'\], got r2g_mask"):
        Shard.from_bytes(shard().to_bytes(), tensors=["r2g_mask"])


# Parts that do not fit together

TWO = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ()}, r"ids must be at least one and distinct, got \[\]"),
        ({"ids": ("a", "a")}, r"ids must be .* distinct, got \['a', 'a'\]"),
        ({"index": TWO}, r"index must be torch.int64 \[2\], got torch.float32 \[2\]"),
        ({"index": torch.arange(3)}, r"index must be torch.int64 \[2\], got torch.int64 \[3\]"),
        ({"status": TWO}, r"status must be torch.uint8 \[2\]"),
        ({"scores": TWO}, r"scores must be torch.float64 \[2, 4\], got torch.float32 \[2\]"),
        ({"maps": {"index": TWO}}, "maps must not be named like another tensor, got index"),
        ({"maps": {"a": TWO}}, r"map a must be float16 or float32 \[2, time groups, .* got"),
        ({"maps": {"a": torch.zeros(2, 1, 1, 1, 1).double()}}, "got torch.float64"),
        ({"maps": {"a": torch.zeros(3, 1, 1, 1, 1)}}, r"map a must be .* got .* \[3, 1, 1, 1, 1\]"),
        ({"maps": {"a_scale": torch.zeros(3, 1, 1)}}, r"map a_scale must be torch.float32 \[2, 1"),
        (
            {"maps": {"a": torch.zeros(2, 1, 1, 1, 1), "a_scale": torch.zeros(2, 1, 2)}},
            r"map a_scale must be torch.float32 \[2, 1, 1\], got torch.float32 \[2, 1, 2\]",
        ),
        ({"reasons": {"b": {}}}, "reasons must be of samples of the shard, got b"),
        ({"images": {"b": 1}}, "images must be of samples of the shard, got b"),
        ({"status": torch.tensor([1, 0], dtype=torch.uint8)}, "status must be 1 with a reason"),
        ({"status": torch.tensor([2, 0], dtype=torch.uint8)}, "status must be .* got 2"),
        (
            {"reasons": {"00000_00": {SAMPLE: Reason("a", "b")}}},
            "status must be 1 with a reason 'sample', or 0 without one, got 0",
        ),
        (
            {"scores": torch.full((2, 4), torch.nan, dtype=torch.float64)},
            f"score {IMACS_NAMES[0]} of 00000_00 is NaN, which needs a reason",
        ),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        replace(shard(), **change)


def test_what_json_cannot_hold():
    with pytest.raises(ValueError, match="not JSON serializable"):
        replace(shard(), fingerprint=b"1").to_bytes()
