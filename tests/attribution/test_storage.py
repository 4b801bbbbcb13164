"""Files of maps: complete or absent, the same bytes for the same content, damage found."""

import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from i2am.attribution import AttributionMaps, load_maps, save_maps
from i2am.files import canonical
from i2am.files.container import pack
from i2am.testing import make_maps, make_site

SITES = (make_site("down.0", (4, 3), (3, 2)), make_site("up.0", (2, 2), None))
PROVENANCE = {"model": "pocket é", "steps": [3, {"seed": 7}], "branch": None, "cfg": 0.1}


def record(**recording):
    return make_maps(SITES, provenance=PROVENANCE, **recording)


def rewrite(path, change):
    """Stores the file's tensors again with a changed description."""
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["i2am"])
    change(document)
    metadata = {"i2am": json.dumps(document, sort_keys=True, separators=(",", ":"))}
    path.write_bytes(save(load(path.read_bytes()), metadata=metadata))


def seal(path, change):
    """Stores the file's tensors again with another description and the checksums of that."""
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["i2am"])
    del document["checksum"], document["tensors"]
    change(document)
    path.write_bytes(b"".join(pack(load(path.read_bytes()), document)))


@pytest.mark.parametrize(
    "recording",
    [
        {},
        {"keep_keys": True},
        {"directions": ["reference_to_generated"]},
        {"mask": torch.eye(4), "regions": {"hem": torch.eye(4)}, "samples": 3},
    ],
    ids=["both", "by key", "r2g only", "rows"],
)
def test_round_trip(tmp_path, recording):
    maps, path = record(**recording), tmp_path / "maps.safetensors"
    maps.save(path)
    loaded = AttributionMaps.load(str(path))
    assert repr(loaded) == repr(maps)
    assert (loaded.votes, loaded.rows, loaded.provenance) == (maps.votes, maps.rows, PROVENANCE)
    for ours, theirs in zip(maps.layer_sums, loaded.layer_sums, strict=True):
        assert ours.site == theirs.site
        for name in vars(ours).keys() - {"site"}:
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert mine is other is None or torch.equal(mine, other)


def test_any_safetensors_reader_opens_it_and_metadata_is_one_key(tmp_path):
    path = tmp_path / "maps.safetensors"
    maps = record()
    save_maps(maps, path)
    with safe_open(path, "pt") as file:
        assert [*file.metadata()] == ["i2am"]
        assert set(file.keys()) == {
            "000.reference_to_generated",
            "000.generated_to_reference",
            "000.attention_share",
            "000.calls",
            "001.reference_to_generated",
            "001.attention_share",
            "001.calls",
        }
        stored = file.get_tensor("000.reference_to_generated")
    assert stored.dtype == torch.float32
    assert torch.equal(stored, maps.layer_sums[0].reference_to_generated)


SAVE = """
import sys
from i2am.attribution import load_maps
maps = load_maps(sys.argv[1])
maps.provenance = dict(reversed(maps.provenance.items()))
maps.save(sys.argv[2])
"""


def test_equal_content_gives_equal_bytes_in_other_processes(fork, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    record().save(first)
    other = fork(SAVE, first, second)
    _, err = other.communicate()
    assert other.returncode == 0, err
    assert first.read_bytes() == second.read_bytes()


def test_integer_keys_survive_as_strings(tmp_path):
    maps = make_maps(SITES, provenance={"groups": {2: "a", 10: "b"}})
    maps.save(tmp_path / "maps")
    assert load_maps(tmp_path / "maps").provenance == {"groups": {"2": "a", "10": "b"}}


def test_tensors_that_share_memory_are_stored(tmp_path):
    maps = record()
    first = maps.layer_sums[0]
    twin = replace(first, site=replace(first.site, layer="up.1"))
    both = AttributionMaps([first, twin], votes=maps.votes, rows=maps.rows, provenance={})
    both.save(tmp_path / "maps")
    loaded = load_maps(tmp_path / "maps").reference_to_generated("layer")
    assert torch.equal(loaded[:, 0], loaded[:, 1])
    assert torch.equal(loaded, both.reference_to_generated("layer"))


@pytest.mark.skipif(os.name != "posix", reason="umask is a POSIX notion")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_mode_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        record().save(tmp_path / "maps")
    finally:
        os.umask(before)
    assert (tmp_path / "maps").stat().st_mode & 0o777 == mode


def test_every_truncation_is_found(tmp_path):
    path = tmp_path / "maps.safetensors"
    record().save(path)
    data = path.read_bytes()
    for length in {*range(0, len(data), 97), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"maps\.safetensors is truncated or"):
            load_maps(path)


def test_every_flipped_byte_is_found(tmp_path):
    path = tmp_path / "maps.safetensors"
    make_maps(SITES[1:], samples=1, time_groups=1).save(path)
    data = path.read_bytes()
    for place in range(len(data)):
        for flip in (0x01, 0x80):
            path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            with pytest.raises(ValueError, match=r"maps\.safetensors (is|has)"):
                load_maps(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=2), "its description does not match"),
        (lambda d: d["sites"][0].update(layer="down.1"), "its description does not match"),
        (lambda d: d.pop("checksum"), "is damaged, or not a file of i2am"),
    ],
    ids=["other schema", "other layer", "no checksum"],
)
def test_a_changed_description_is_found(tmp_path, change, message):
    path = tmp_path / "maps.safetensors"
    record().save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"maps\.safetensors .*{message}"):
        load_maps(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=4), "has schema 4, and this i2am reads schemas 1 to 3"),
        (lambda d: d.pop("schema"), "it has no schema"),
        (lambda d: d.update(schema="1"), "schema must be an integer, got"),
        (lambda d: d.pop("sites"), "it has no sites"),
        (lambda d: d.update(sites=[1]), "is damaged"),
        (lambda d: d["sites"][0].pop("layer"), "is damaged"),
        (lambda d: d["sites"][0].update(generated_grid="4x3"), "is damaged"),
        (lambda d: d["sites"][0].update(alone="yes"), "is damaged"),
        (lambda d: d.update(rows={"a": 1}), "rows must be a list"),
        (lambda d: d.update(votes=None), "votes must be a list"),
        (lambda d: d.update(provenance=[]), "provenance must be an object"),
        (lambda d: d.update(pairs={}), "is damaged"),
        (lambda d: d.update(pairs=3), "is damaged"),
    ],
)
def test_a_description_that_is_not_of_maps(tmp_path, change, message):
    path = tmp_path / "maps.safetensors"
    record().save(path)
    seal(path, change)
    with pytest.raises(ValueError, match=rf"maps\.safetensors .*{message}"):
        load_maps(path)


def test_a_tensor_reinterpreted_as_another_dtype_is_found(tmp_path):
    path = tmp_path / "maps.safetensors"
    record().save(path)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(ValueError, match="is not as described"):
        load_maps(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is truncated or not a safetensors file"),
        (b"not tensors at all", "is truncated or not a safetensors file"),
        (save({"weight": torch.ones(2)}), "is damaged, or not a file of i2am"),
        (save({"w": torch.ones(2)}, {"i2am": "[1]"}), "is damaged, or not a file of i2am"),
    ],
    ids=["empty", "text", "other tensors", "other metadata"],
)
def test_foreign_files_are_refused(tmp_path, data, message):
    path = tmp_path / "other.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"other\.safetensors {message}"):
        load_maps(path)


@pytest.mark.parametrize("schema", [1, 2])
def test_files_of_earlier_schemas_are_read(tmp_path, schema):
    """Schema 1 had neither pair maps nor shares, 2 no shares; dtypes had torch's names."""
    path = tmp_path / "maps.safetensors"
    maps = record(pairs=schema == 2)
    maps.save(path)
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["i2am"])
    content = {
        name.replace("pairs.", "joint."): sums
        for name, sums in load(path.read_bytes()).items()
        if not name.endswith(("attention_share", "calls"))
    }
    del document["checksum"]
    if "pairs" in document:
        document["joint"] = document.pop("pairs")
    for site in document["sites"]:
        site["causal"] = site.pop("informative")
        del site["tags"]
    document["provenance"]["guidance"] = document["provenance"].pop("branch")
    document |= {
        "schema": schema,
        "tensors": {
            name: {
                "crc32": zlib.crc32(sums.numpy()),
                "dtype": str(sums.dtype),
                "shape": [*sums.shape],
            }
            for name, sums in content.items()
        },
    }
    document["checksum"] = zlib.crc32(canonical(document))
    path.write_bytes(save(content, metadata={"i2am": canonical(document).decode()}))
    loaded = load_maps(path)
    assert torch.equal(loaded.reference_to_generated(), maps.reference_to_generated())
    assert (loaded.pairs is None) == (schema == 1)
    assert loaded.provenance == maps.provenance
    assert [layer.site for layer in loaded.layer_sums] == [layer.site for layer in maps.layer_sums]
    assert loaded.share_of is None
    with pytest.raises(
        ValueError, match=r"share was not recorded on down\.0, as in files of schema"
    ):
        loaded.reference_to_generated(measure="share")
    # and what was read is written in today's schema
    loaded.save(path)
    assert repr(load_maps(path)) == repr(loaded)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_maps(tmp_path / "none")


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()], ids=["nan", "set", "object"])
def test_provenance_must_be_json(tmp_path, value):
    maps = make_maps(SITES, provenance={"value": value})
    with pytest.raises(ValueError, match="provenance must hold JSON values only"):
        maps.save(tmp_path / "maps")
    assert [*tmp_path.iterdir()] == []


def test_the_room_imports_no_safetensors_before_a_file_is_written():
    code = "import sys, i2am.attribution; sys.exit('safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
