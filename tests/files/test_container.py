"""Tensors and a document in one file: back to the bit, or one sentence."""

import io
import json
import math
import os
import resource
import time
import tracemalloc
import zlib

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i2am.files import FileRejected, canonical, open_regular
from i2am.files.container import DTYPES, Container, header_of, pack, read_container

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
DOCUMENTS = st.dictionaries(
    TEXTS.filter(lambda key: key not in ("tensors", "checksum")),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from([*DTYPES]))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = math.prod(shape)
    if dtype == torch.bool:
        values = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        flat = torch.tensor(values, dtype=torch.bool)
    else:
        # every pattern of bits, NaN with a message included
        size = count * dtype.itemsize
        flat = torch.frombuffer(
            bytearray(draw(st.binary(min_size=size, max_size=size)) + bytes(8)), dtype=torch.uint8
        )
        flat = flat[:size].clone().view(dtype)
    tensor = flat.reshape(shape)
    # other layouts in memory
    return tensor.mT.contiguous().mT if len(shape) > 1 and draw(st.booleans()) else tensor


CONTENTS = st.dictionaries(TEXTS.filter(lambda name: name != "__metadata__"), tensors(), max_size=4)


def packed(tensors, document):
    return b"".join(pack(tensors, document))


def read(data):
    """The document without what `pack` adds, and the tensors."""
    file = io.BytesIO(data)
    container = read_container(file, "the file")
    tensors = container.load_all(file)
    document = {key: value for key, value in container.document.items() if key != "tensors"}
    return document, tensors


def bits(tensors):
    return {
        name: (
            tensor.dtype,
            [*tensor.shape],
            tensor.contiguous().flatten().view(torch.uint8).tolist(),
        )
        for name, tensor in tensors.items()
    }


@settings(max_examples=200)
@given(CONTENTS, DOCUMENTS)
def test_what_was_packed_is_read_to_the_bit(tensors, document):
    data = packed(tensors, document)
    found, back = read(data)
    assert canonical(found) == canonical(document)
    assert bits(back) == bits(tensors)
    assert packed({name: tensors[name] for name in reversed(tensors)}, document) == data


@settings(max_examples=200)
@given(CONTENTS, DOCUMENTS)
def test_bytes_are_those_that_safetensors_writes(tensors, document):
    data = packed(tensors, document)
    with_strides = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (length,) = (int.from_bytes(data[:8], "little"),)
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert metadata.keys() == {"i2am"}
    assert safetensors.torch.save(with_strides, metadata) == data
    assert bits(safetensors.torch.load(data)) == bits(tensors)


def test_safetensors_opens_it(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor(2.5, dtype=torch.bfloat16)}
    (tmp_path / "file").write_bytes(packed(tensors, {"x": [1]}))
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert bits({name: file.get_tensor(name) for name in file.keys()}) == bits(tensors)
        assert json.loads(file.metadata()["i2am"])["x"] == [1]


# Damage

SAMPLE = {
    "one": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "same": torch.arange(12, dtype=torch.float32).reshape(3, 4) + 1,
    "flags": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 5, dtype=torch.float16),
    "scalar": torch.tensor(7),
}
DOCUMENT = {"schema": 1, "ids": ["a", "ä"], "inner": {"checksum": 5, "x": None}}
DATA = packed(SAMPLE, DOCUMENT)


@st.composite
def damaged(draw):
    data = bytearray(DATA)
    places = st.integers(0, len(data))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "swap", "set"]))
        start, end = sorted((draw(places), draw(places)))
        if kind == "cut":
            del data[start:]
        elif kind == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            data[start:start] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "remove":
            del data[start : start + draw(st.integers(1, 9))]
        elif kind == "swap":
            # equal numbers of bytes, so that all else stays in its place
            size = draw(st.integers(1, 48))
            one, other = data[start : start + size], data[end : end + size]
            if len(one) == len(other) and start + size <= end:
                data[start : start + size], data[end : end + size] = other, one
        elif kind == "set" and start < len(data):
            data[start] = draw(st.sampled_from(b'0123456789[]{},:"\\ -e.'))
    return bytes(data)


@settings(max_examples=600)
@given(damaged())
def test_damage_is_told_or_changes_nothing(data):
    try:
        document, tensors = read(data)
    except FileRejected as error:
        said = str(error)
    else:
        said = "the file is as it was"
        assert canonical(document) == canonical(DOCUMENT)
        assert bits(tensors) == bits(SAMPLE)
    assert said.startswith("the file is ")
    assert said.isprintable()


def test_every_truncation_is_told():
    for length in range(len(DATA)):
        with pytest.raises(FileRejected, match=r"^the file is truncated or"):
            read(DATA[:length])


def test_every_flipped_bit_is_told():
    for place in range(8 * len(DATA)):
        data = bytearray(DATA)
        data[place // 8] ^= 1 << place % 8
        with pytest.raises(FileRejected, match=r"^the file is "):
            read(bytes(data))


def test_swapped_tensors_are_told():
    length = int.from_bytes(DATA[:8], "little")
    start = DATA.index(SAMPLE["one"].numpy().tobytes())
    assert start > length
    one, other = DATA[start : start + 48], DATA[start + 48 : start + 96]
    with pytest.raises(FileRejected, match="the tensor one does not match its checksum"):
        read(DATA[:start] + other + one + DATA[start + 96 :])


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 100_000_001, len(DATA) - 7, 0, 1])
def test_a_header_of_another_length(length):
    with pytest.raises(FileRejected, match=r"^the file is truncated or not a safetensors file$"):
        read(length.to_bytes(8, "little") + DATA[8:])


@pytest.mark.parametrize(
    "begin", [b"", DATA, (2**60).to_bytes(8, "little"), (1000).to_bytes(8, "little")]
)
def test_a_large_empty_file_is_refused_at_once(tmp_path, begin):
    path = tmp_path / "file"
    path.write_bytes(begin)
    os.truncate(path, 6 * 10**9)
    tracemalloc.start()
    before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with open_regular(path) as file, pytest.raises(FileRejected, match="file is truncated or"):
            read_container(file, path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10**6
    assert time.process_time() - before[0] < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1] < 100_000


# Files that were made so on purpose: their checksums are right


def forged(entries, summaries, data=b"", **more):
    """A file with any entries in its header and any summaries in its description."""
    content = {**more, "tensors": summaries}
    content["checksum"] = zlib.crc32(canonical(content))
    header = {"__metadata__": {"i2am": canonical(content).decode()}, **entries}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def of_shape(shape, length=0, dtype="U8", crc32=0):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, length]}
    summary = {"dtype": dtype, "shape": shape, "crc32": crc32}
    return {"a": entry}, {"a": summary}


def test_a_forged_file_without_fault_is_read():
    data = b"abc"
    entries, summaries = of_shape([3, 1], 3, crc32=zlib.crc32(data))
    document, tensors = read(forged(entries, summaries, data, x=1))
    assert document == {"x": 1}
    assert bits(tensors) == {"a": (torch.uint8, [3, 1], [*data])}


@pytest.mark.parametrize(
    "shape",
    {
        "overflow": [2**40, 2**40],
        "overflow beside nothing": [2**40, 2**40, 0],
        "one large axis": [2**64, 0],
        "to zero in 64 bits": [2**32, 2**32],
        "negative": [-1, -1, 0],
        "float": [0.0],
        "bool": [False],
        "word": ["a", 10**12],
        "list": [[0]],
        "object": {},
        "number": 0,
        "string": "0",
        "none": None,
        "many axes": [0] * 65,
    }.values(),
    ids=lambda value: None,
)
def test_forged_shapes(shape):
    lengths = {0, 3}
    for length in lengths:
        with pytest.raises(FileRejected, match=r"^the file is truncated or damaged: "):
            read(forged(*of_shape(shape, length), bytes(length)))


@pytest.mark.parametrize(
    ("entry", "summary"),
    [
        ({"data_offsets": [0, 4]}, {}),
        ({"data_offsets": [1, 4]}, {}),
        ({"data_offsets": [0, 3, 3]}, {}),
        ({"data_offsets": None}, {}),
        ({"data_offsets": {"0": 3}}, {}),
        ({"data_offsets": [-3, 0]}, {}),
        ({"dtype": "F8_E4M3"}, {"dtype": "F8_E4M3"}),
        ({"dtype": ["U8"]}, {"dtype": ["U8"]}),
        ({"dtype": None}, {"dtype": None}),
        ({"dtype": "BOOL"}, {}),
        ({"shape": [1, 3]}, {}),
        ({}, {"crc32": None}),
        ({}, {"crc32": "0"}),
        ({}, {"crc32": 1}),
    ],
)
def test_forged_entries(entry, summary):
    entries, summaries = of_shape([3], 3, crc32=zlib.crc32(b"abc"))
    entries["a"] |= entry
    summaries["a"] |= summary
    with pytest.raises(FileRejected, match=r"^the file is (truncated or )?damaged: \S"):
        read(forged(entries, summaries, b"abc"))


def test_a_tensor_without_a_checksum():
    entries, summaries = of_shape([3], 3)
    del summaries["a"]["crc32"]
    with pytest.raises(
        FileRejected, match=r"^the file is truncated or damaged: a has no shape, or no checksum$"
    ):
        read(forged(entries, summaries, b"abc"))


@pytest.mark.parametrize("wrong", [None, 1, "a", [], [[]], {"a": None}, {"a": []}, {"b": {}}])
def test_forged_tables(wrong):
    entries, summaries = of_shape([3], 3, crc32=zlib.crc32(b"abc"))
    with pytest.raises(FileRejected, match=r"^the file is truncated or damaged"):
        read(forged(entries, wrong, b"abc"))
    if isinstance(wrong, dict):
        with pytest.raises(FileRejected, match=r"^the file is truncated or damaged"):
            read(forged(wrong, summaries, b"abc"))


@pytest.mark.parametrize(
    "header", ["[]", "1", '"a"', "null", "{}", '{"__metadata__": 1}', '{"__metadata__": {}}']
)
@pytest.mark.parametrize("metadata", [False, True])
def test_forged_headers(header, metadata):
    text = header.encode()
    if metadata:
        text = json.dumps({"__metadata__": {"i2am": header}}).encode()
    with pytest.raises(FileRejected, match=r"^the file is (truncated|damaged)"):
        read(len(text).to_bytes(8, "little") + text)


def test_a_tensor_that_does_not_fit_into_memory():
    document = {"tensors": {"a": {"dtype": "U8", "shape": [2**60], "crc32": 0}}}
    container = Container(document, {"a": (0, 2**60)}, "the file")
    with pytest.raises(MemoryError, match=r"the file holds a of 1,152,921,504,606,846,976 bytes"):
        container.load(io.BytesIO(), "a")


def test_unchecked_tensors_are_read_as_they_are():
    data = bytearray(DATA)
    data[-1] ^= 1  # of the last one, which is bool
    file = io.BytesIO(data)
    container = read_container(file, "the file")
    with pytest.raises(FileRejected, match="tensor flags does not match"):
        container.load(file, "flags")
    assert container.load(file, "flags", check=False).tolist() == [True, False, False]
    assert container.load(file, "one").equal(SAMPLE["one"])


def test_header_of_places_wide_types_first():
    names, header = header_of(
        [("b", torch.uint8, [3]), ("a", torch.bool, [2]), ("c", torch.int64, [])], {"k": "v"}
    )
    assert names == ["c", "b", "a"]
    assert len(header) % 8 == 0
    entries = json.loads(header[8:])
    assert entries.pop("__metadata__") == {"k": "v"}
    assert [entry["data_offsets"] for entry in entries.values()] == [[0, 8], [8, 11], [11, 13]]


def test_what_json_cannot_hold_is_not_packed():
    with pytest.raises(ValueError, match="not JSON compliant"):
        packed({}, {"x": float("nan")})
