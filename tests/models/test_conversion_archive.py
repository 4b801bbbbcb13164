"""Records of an archive are those that its directory names, whole and undamaged, or are refused."""

import struct
import zipfile
import zlib

import pytest
import torch

from i2am.models.conversion import read_checkpoint, reading
from i2am.models.weights import read_weight_file

TENSORS = {"a": torch.arange(8.0), "b": torch.arange(8.0) * -1}
LOCAL, CENTRAL = "<4s5H3I2H", "<4s4B4H3I5H2I"


def pack(path, members, **changed):
    """Writes a zip archive by hand.

    Args:
        path: The new file.
        members: Name, bytes and compression of each.
        changed: What one of the headers claims instead, as "local_size" or "central_name"; of the
            member "x/data/0".
    """
    body, directory = b"", b""
    for name, data, method in members:
        deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        packed = deflate.compress(data) + deflate.flush() if method else data
        said = {"signature": b"PK\x03\x04", "name": name.encode(), "flags": 0, "method": method}
        said |= {"crc": zlib.crc32(data), "packed": len(packed), "size": len(data)}
        said |= {"place": len(body)}
        local, central = ({**said}, {**said})
        if name == "x/data/0":
            for place, values in (("local", local), ("central", central)):
                values |= {
                    key: value
                    for key in said
                    if (value := changed.get(f"{place}_{key}", changed.get(key))) is not None
                }
        body += struct.pack(
            LOCAL, local["signature"], 20, local["flags"], local["method"], 0, 0, local["crc"],
            local["packed"], local["size"], len(local["name"]), 0,
        )  # fmt: skip
        body += local["name"] + packed
        directory += struct.pack(
            CENTRAL, b"PK\x01\x02", 20, 0, 20, 0, central["flags"], central["method"], 0, 0,
            central["crc"], central["packed"], central["size"], len(central["name"]), 0, 0, 0, 0,
            0, central["place"],
        )  # fmt: skip
        directory += central["name"]
    count = len(members)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(body), 0)
    path.write_bytes(body + directory + end)


@pytest.fixture
def members(tmp_path):
    torch.save({"state_dict": TENSORS}, tmp_path / "saved")
    with zipfile.ZipFile(tmp_path / "saved") as archive:
        return [
            ("x/" + name.split("/", 1)[1], archive.read(name), 0) for name in archive.namelist()
        ]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.ckpt"


def compressed(members):
    return [(name, data, 8) for name, data, _ in members]


def assert_read(file):
    found = read_checkpoint(file)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_the_archives_of_these_tests_are_right(file, members):
    pack(file, members)
    assert_read(file)
    pack(file, compressed(members))
    assert_read(file)


LIES = {
    "longer than stored": ({"size": 48}, "is stored in 32 bytes and claims 48"),
    "reaches into the next": ({"size": 48, "packed": 48}, "overlaps another one"),
    "shorter": ({"size": 16, "packed": 16}, "storage 0 has 16 bytes in place of 8 elements"),
    "other length in front": ({"local_size": 48}, "x/data/0 is described in two ways"),
    "other packed length in front": ({"local_packed": 4}, "x/data/0 is described in two ways"),
    "other name in front": ({"local_name": b"x/data/1"}, "x/data/0 is described in two ways"),
    "other signature": ({"local_signature": b"PK\x05\x06"}, "x/data/0 is described in two ways"),
    "other method in front": ({"local_method": 8}, "x/data/0 is described in two ways"),
    "other checksum in front": ({"local_crc": 1}, "x/data/0 is described in two ways"),
    "wrong checksum": ({"crc": 1}, "x/data/0 is damaged: its checksum is another one"),
    "no checksum": ({"crc": 0}, "x/data/0 is damaged: its checksum is another one"),
    "two of one name": ({"name": b"x/data/1"}, "two records are named x/data/1"),
    "its neighbour's place": ({"central_place": 0}, r"overlaps another one|described in two ways"),
    "beyond the archive": ({"central_place": 1 << 20}, "record x/data/0 is cut off"),
    "encrypted": ({"flags": 1}, "record x/data/0 is encrypted"),
    "other compression": ({"method": 14}, "compressed by method 14, which torch cannot read"),
    "no compression at all": ({"method": 8}, "damaged or no checkpoint: "),
}


@pytest.mark.parametrize("lie", LIES)
def test_records_that_are_not_what_they_claim(file, members, lie):
    changed, sentence = LIES[lie]
    pack(file, members, **changed)
    with pytest.raises(ValueError, match=sentence) as refusal:
        read_checkpoint(file)
    assert str(refusal.value).startswith(f"checkpoint {file} is damaged or no checkpoint: ")


@pytest.mark.parametrize("size", [28, 36, 1 << 31])
def test_compressed_records_of_another_size(file, members, size):
    pack(file, compressed(members), size=size)
    with pytest.raises(ValueError, match=rf"storage 0 has {size} bytes in place of 8 elements"):
        read_checkpoint(file)


def test_compressed_records_that_unpack_to_another_size(file, members):
    other = dict.fromkeys(["x/data/0"], b"\x00" * 10_000_000)
    members = [(name, other.get(name, data), 8) for name, data, _ in members]
    pack(file, members, size=32, crc=zlib.crc32(b"\x00" * 32))
    with pytest.raises(ValueError, match="x/data/0 does not have the 32 bytes it claims"):
        read_checkpoint(file)


def test_a_record_inside_another(file, members):
    """The second storage is a piece of the first: with a header of its own, which is right."""
    inner = struct.pack(
        LOCAL, b"PK\x03\x04", 20, 0, 0, 0, 0, zlib.crc32(bytes(32)), 32, 32, 8, 0
    )  # fmt: skip
    data = inner + b"x/data/1" + bytes(32)
    by_name = dict((name, value) for name, value, _ in members) | {"x/data/0": data}
    names = [name for name in by_name if name != "x/data/1"]
    pack(file, [(name, by_name[name], 0) for name in names])
    archive = bytearray(file.read_bytes())
    place = archive.index(inner)
    directory = archive.index(b"PK\x01\x02")
    entry = struct.pack(
        CENTRAL, b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, zlib.crc32(bytes(32)), 32, 32, 8, 0, 0, 0,
        0, 0, place,
    )  # fmt: skip
    end = struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, len(names) + 1, len(names) + 1,
        len(archive) - 22 - directory + len(entry) + 8, directory, 0,
    )  # fmt: skip
    file.write_bytes(archive[:-22] + entry + b"x/data/1" + end)
    with zipfile.ZipFile(file) as found:
        assert found.namelist()[-1] == "x/data/1"
    with pytest.raises(ValueError, match="record x/data/1 overlaps another one"):
        read_checkpoint(file)


@pytest.mark.parametrize("method", [0, 8], ids=["stored", "deflated"])
def test_every_flipped_bit_of_the_tensors_shows(file, members, method):
    pack(file, [(name, data, method) for name, data, _ in members])
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo("x/data/1")
    begin = info.header_offset + 30 + len(info.filename)
    for at in range(begin, begin + info.compress_size):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or no checkpoint"):
            read_checkpoint(file)
        with pytest.raises(ValueError, match="is damaged or no checkpoint"):
            read_weight_file(file)


@pytest.fixture
def without_checksums():
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.mark.usefixtures("without_checksums")
def test_archives_that_torch_wrote_without_checksums(file, caplog):
    torch.save({"state_dict": TENSORS}, file)
    assert_read(file)
    assert caplog.messages == [
        f"checkpoint {file} was written without checksums: damage may not show"
    ]


def test_methods_that_torch_cannot_read(file, members):
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, data, _ in members:
                archive.writestr(name, data)
        with pytest.raises(ValueError, match=rf"compressed by method {method}, which torch cannot"):
            read_checkpoint(file)


def test_compressed_tensors_have_to_fit_into_memory(file, members, monkeypatch):
    pack(file, compressed(members))
    monkeypatch.setattr(reading, "available_memory", lambda device: 63)
    with pytest.raises(ValueError, match=r"takes 0\.1 KiB of memory, because its tensors are comp"):
        read_checkpoint(file)
    monkeypatch.setattr(reading, "available_memory", lambda device: 64)
    assert_read(file)


def test_tensors_that_are_not_aligned_have_to_fit_into_memory(file, members, monkeypatch):
    monkeypatch.setattr(reading, "available_memory", lambda device: 0)
    torch.save(TENSORS, file)  # aligned, so that they are mapped
    assert_read(file)
    pack(file, members)
    with pytest.raises(ValueError, match=r"takes 0\.\d KiB of memory, because .* or not aligned"):
        read_checkpoint(file)
