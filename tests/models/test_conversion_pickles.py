"""Small files that would take all memory, all of the stack or all time are refused at once."""

import io
import pickle
import struct
import zipfile

import pytest
import torch

from i2am.models.conversion import read_checkpoint
from i2am.models.conversion.pickles import MOST_INSTRUCTIONS, read_pickle
from i2am.models.conversion.reading import LARGEST_PICKLE
from i2am.models.weights import read_weight_file

START = b"\x80\x02"
MANY = MOST_INSTRUCTIONS + 10


def doubled(times):
    """A tuple of two that are one tuple of two, and so on: 2 ** times items when written out."""
    return b")q\x000" + b"h\x00h\x00\x86q\x000" * times + b"h\x00"


BOMBS = {
    "lists": (b"]" * MANY, "more than 2000000 instructions"),
    "dictionaries": (b"}" * MANY, "more than 2000000 instructions"),
    "nested": (b"N" + b"\x85" * MANY, "more than 2000000 instructions"),
    "marks": (b"(" * MANY, "more than 2000000 instructions"),
    # hashing would take all of C's stack, or for ever
    "deep name": (b"}N" + b"\x85" * 1_000_000 + b"Ns", "a name is an object of tuple"),
    "wide name": (b"}" + doubled(80) + b"Ns", "a name is an object of tuple"),
    "wide item": (b"}X\x01\x00\x00\x00a" + doubled(80) + b"s", "'a' is a tuple"),
    "wide storage": (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + doubled(80) + b"NNtQ",
        "ValueError a storage has no name",
    ),
    "long name": (b"c" + b"a" * 2000 + b"\nb\n", "a name is longer than 1000 characters"),
    "pairs again and again": (
        b"ccollections\nOrderedDict\nq\x00](" + b"NN\x86" * 100_000 + b"eq\x01"
        b"" + b"h\x00h\x01\x85R" * 30,
        "more than 2000000 instructions",
    ),
    "number of the memo": (b"Np99999999999999999999\n", "number of the memo is too large"),
    "text that is not there": (b"\x8d" + struct.pack("<Q", 1 << 60), "damaged or no checkpoint"),
    "bytes that are not there": (b"\x8e" + struct.pack("<Q", 1 << 60), "damaged or no checkpoint"),
    "registered extension": (b"\x82\x01", "has the instruction EXT1"),
    "buffers": (b"\x97", "has the instruction NEXT_BUFFER"),
}


def zipped(path, pickled):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickled)


@pytest.mark.parametrize("bomb", BOMBS)
def test_small_pickles_that_make_much_work(tmp_path, bomb):
    instructions, sentence = BOMBS[bomb]
    zipped(tmp_path / "x.ckpt", START + instructions + b".")
    assert (tmp_path / "x.ckpt").stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=sentence) as refusal:
        read_checkpoint(tmp_path / "x.ckpt")
    assert len(str(refusal.value)) < 1000


def test_small_files_with_a_large_pickle(tmp_path):
    zipped(tmp_path / "x.ckpt", bytes(LARGEST_PICKLE + 1))
    with pytest.raises(ValueError, match=r"record x/data\.pkl has 16777217 bytes, more than"):
        read_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "y.ckpt").write_bytes(START + b"X\x00\x00\x00\x7f" + bytes(LARGEST_PICKLE + 9))
    with pytest.raises(ValueError, match="is damaged or no checkpoint: ValueError"):
        read_checkpoint(tmp_path / "y.ckpt")


def test_tensors_that_repeat_what_little_is_stored(tmp_path):
    large = torch.zeros(1).expand(1 << 40)
    torch.save({"a": large}, tmp_path / "x.bin")
    sentence = "holds tensors of 1099511627776 values and stores 1"
    with pytest.raises(ValueError, match=sentence):
        read_weight_file(tmp_path / "x.bin")
    shared = torch.zeros(1 << 20)
    torch.save({f"a{number}": shared for number in range(5)}, tmp_path / "x.bin")
    assert len(read_weight_file(tmp_path / "x.bin")[0]) == 5
    torch.save({f"a{number}": shared for number in range(6)}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="holds tensors of 6291456 values and stores 1048576"):
        read_weight_file(tmp_path / "x.bin")


PLAIN = [
    *(None, True, False, 0, -1, 255, 1 << 20, -(1 << 40), 1 << 2100, 0.5, "", "a\n'ä\u2028"),
    *((), (1,), (1, 2), (1, 2, 3), tuple(range(9)), [], [1, [2]], {}, ["a" * 300, "a" * 300]),
    {"a": {"b": [1, (2, None)]}},
]
BYTES = [b"", b"a\xff", b"b" * 300, [b"b"]]  # in older protocols calls, which are not made


@pytest.mark.parametrize(
    ("value", "protocol"),
    [(value, protocol) for value in PLAIN for protocol in range(6)]
    + [(value, protocol) for value in BYTES for protocol in range(3, 6)],
    ids=lambda value: repr(value)[:20],
)
def test_plain_values_are_those_of_pickle(value, protocol):
    stream = io.BytesIO(pickle.dumps(value, protocol) + b"behind")
    found, _ = read_pickle(stream)
    assert found == value
    assert type(found) is type(value)
    assert stream.read() == b"behind"


def legacy(path, edit):
    """Writes a file as torch did before 1.6, its last pickle and its storages changed."""
    torch.save({"a": torch.arange(8.0)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    stream = io.BytesIO(data)
    for _ in range(4):
        read_pickle(stream)
    begin = stream.tell()
    keys, _ = read_pickle(stream)
    path.write_bytes(data[:begin] + edit(keys, data[stream.tell() :]))


def count(data, number):
    return number.to_bytes(8, "little") + data[8:]


LEGACY = {
    "fewer elements": (lambda k, d: pickle.dumps(k, 2) + count(d, 4), "4 elements in place of 8"),
    "more elements": (lambda k, d: pickle.dumps(k, 2) + count(d, 9), "9 elements in place of 8"),
    "all elements": (lambda k, d: pickle.dumps(k, 2) + count(d, (1 << 64) - 1), "in place of 8"),
    "another name": (lambda k, d: pickle.dumps(["z"], 2) + d, "names one that is not there"),
    "twice": (lambda k, d: pickle.dumps(k * 2, 2) + d * 2, "not there, or twice"),
    "no names": (lambda k, d: pickle.dumps([], 2) + d, "is missing"),
    "no list": (lambda k, d: pickle.dumps(5, 2) + d, "TypeError"),
    "cut": (lambda k, d: pickle.dumps(k, 2) + d[:-1], "storages are cut off"),
}


@pytest.mark.parametrize("case", LEGACY)
def test_storages_of_old_files(tmp_path, case):
    edit, sentence = LEGACY[case]
    legacy(tmp_path / "x.ckpt", lambda keys, data: pickle.dumps(keys, 2) + data)
    assert read_checkpoint(tmp_path / "x.ckpt")["a"].tolist() == list(range(8))
    legacy(tmp_path / "x.ckpt", edit)
    with pytest.raises(ValueError, match=sentence) as refusal:
        read_checkpoint(tmp_path / "x.ckpt")
    assert str(refusal.value).startswith(f"checkpoint {tmp_path / 'x.ckpt'} is damaged or no check")
