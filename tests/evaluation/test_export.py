"""What other tools read of a run: zarr by xarray, parquet by pyarrow."""

import errno
import json
import math
import os
import sys
import warnings

import numpy as np
import pytest
import torch
import xarray
import zarr
from pyarrow import parquet

from i2am.evaluation.export import AXES, to_parquet, to_zarr
from i2am.evaluation.store import Store, StoreDamaged
from i2am.evaluation.testing import make_plan, make_shard
from i2am.files import OutputRefused
from i2am.metrics.names import IMACS_NAMES

PLAN = make_plan(pairs=5)
# paired 1 is missing
SHARDS = {
    ("paired", 0): make_shard(PLAN, "paired", 0, failed=1),
    ("paired", 2): make_shard(PLAN, "paired", 2),
    ("unpaired", 0): make_shard(PLAN, "unpaired", 0),
    ("unpaired", 1): make_shard(PLAN, "unpaired", 1, undefined=1),
    ("unpaired", 2): make_shard(PLAN, "unpaired", 2),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store.create(tmp_path_factory.mktemp("run"), PLAN)
    for shard, images in SHARDS.values():
        store.commit(shard, images)
    return store


@pytest.fixture(scope="module")
def tree(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_zarr(store, folder)
        return xarray.open_datatree(folder, engine="zarr")


# zarr


def test_axes_have_names_and_samples_have_ids(tree, store):
    settings = ["/paired", "/unpaired"]
    below = [f"{setting}/{direction}" for setting in settings for direction in ("g2r", "r2g")]
    assert sorted(tree.groups) == sorted(["/", *settings, *below])
    for setting in ("paired", "unpaired"):
        maps = tree[f"{setting}/r2g"]["uniform"]
        assert maps.dims == AXES == ("sample", "time", "head", "height", "width")
        assert maps.shape == (5, 2, 3, 4, 3)
        assert tree[f"{setting}/g2r"]["uniform"].shape == (5, 2, 3, 2, 2)
        assert [*maps.coords["sample"].values] == store.ids(setting)
        (last,) = tree[setting]["status"].sel(sample=store.ids(setting)[-1:]).values
        assert last == 0
    persons, garments = (tree["unpaired"].coords[name].values for name in ("person", "garment"))
    assert [persons[1], garments[1]] == ["00001_00", "00003_00"]


def test_maps_are_in_their_unit_and_nan_where_there_are_none(tree):
    for direction in ("r2g", "g2r"):
        values = torch.tensor(tree[f"paired/{direction}"]["uniform"].values)
        assert values.dtype == torch.float32
        for number in (0, 2):
            shard, _ = SHARDS["paired", number]
            maps = shard.maps[f"{direction}_uniform"].double()
            scale = shard.maps[f"{direction}_uniform_scale"].double()
            recorded = (maps * scale[:, :, :, None, None]).float()
            place = 2 * number
            assert torch.equal(values[place], recorded[0])
        assert values[[1, 2, 3]].isnan().all()
        assert not values[[0, 4]].isnan().any()


def test_scores_and_status(tree):
    paired, unpaired = tree["paired"], tree["unpaired"]
    assert paired["status"].values.tolist() == [0, 1, 2, 2, 0]
    assert unpaired["status"].values.tolist() == [0] * 5
    assert paired["status"].attrs["flag_meanings"].split() == ["ok", "failed", "missing"]
    expected = torch.cat([SHARDS["unpaired", number][0].scores for number in range(3)])
    for column, name in enumerate(IMACS_NAMES):
        assert unpaired[name].dims == ("sample",)
        np.testing.assert_array_equal(unpaired[name].values, expected[:, column].numpy())
        assert np.isnan(paired[name].values).tolist() == [False, True, True, True, False]
    assert np.isnan(unpaired[IMACS_NAMES[-1]].values).tolist() == [False] * 3 + [True, False]


def test_it_says_which_run(tree):
    assert tree.attrs["run"] == {name: PLAN[name] for name in PLAN if name != "data"}


def test_a_chunk_is_a_sample_and_a_file_is_a_shard(store, tmp_path):
    to_zarr(store, tmp_path / "run.zarr")
    array = zarr.open_group(tmp_path / "run.zarr", mode="r")["paired/r2g/uniform"]
    assert (array.chunks, array.shards) == ((1, 2, 3, 4, 3), (2, 2, 3, 4, 3))
    description = json.loads((tmp_path / "run.zarr/paired/r2g/uniform/zarr.json").read_text())
    assert description["zarr_format"] == 3
    assert description["dimension_names"] == [*AXES]
    assert description["fill_value"] == "NaN"
    files = (tmp_path / "run.zarr/paired/r2g/uniform/c").glob("*/0/0/0/0")
    assert sorted(path.relative_to(path.parents[4]).parts[0] for path in files) == ["0", "2"]
    dataset = xarray.open_zarr(tmp_path / "run.zarr", group="paired/r2g")
    assert math.isnan(dataset["uniform"].sel(sample="00002_00").mean())


def test_a_run_without_maps_has_scores(tmp_path):
    plan = make_plan(settings=("paired",))
    store = Store.create(tmp_path / "run", plan)
    store.commit(*make_shard(plan, maps=False))
    to_zarr(store, tmp_path / "run.zarr")
    tree = xarray.open_datatree(tmp_path / "run.zarr", engine="zarr")
    assert tree.groups == ("/", "/paired")
    assert np.isnan(tree["paired"]["imacs_g"].values).tolist() == [False] * 2 + [True] * 4


def test_a_setting_that_has_not_begun_is_not_there(tmp_path):
    store = Store.create(tmp_path / "run", PLAN)
    store.commit(*make_shard(PLAN))
    to_zarr(store, tmp_path / "run.zarr")
    assert [*zarr.open_group(tmp_path / "run.zarr", mode="r").group_keys()] == ["paired"]


# parquet


def rows(store, tmp_path):
    to_parquet(store, tmp_path / "scores.parquet")
    return parquet.read_table(tmp_path / "scores.parquet")


def test_one_row_for_each_sample(store, tmp_path):
    table = rows(store, tmp_path)
    assert table.schema.metadata[b"fingerprint"].decode() == PLAN["fingerprint"]
    assert table.column_names == [
        *("setting", "index", "id", "person", "garment", "status", "reason_code", "reason"),
        *(name for score in IMACS_NAMES for name in (score, f"{score}_reason")),
    ]
    content = table.to_pylist()
    assert [row["setting"] for row in content] == ["paired"] * 5 + ["unpaired"] * 5
    assert [row["index"] for row in content] == [0, 1, 2, 3, 4] * 2
    assert [row["id"] for row in content] == store.ids("paired") + store.ids("unpaired")
    states = ["ok", "failed", "missing", "missing", "ok", *["ok"] * 5]
    assert [row["status"] for row in content] == states
    for row in content:
        shard = SHARDS.get((row["setting"], row["index"] // 2), (None,))[0]
        for column, name in enumerate(IMACS_NAMES):
            value = math.nan if shard is None else shard.scores[row["index"] % 2, column].item()
            assert row[name] == (None if math.isnan(value) else value)


def test_what_is_null_has_a_reason(store, tmp_path):
    content = rows(store, tmp_path).to_pylist()
    assert (content[1]["reason_code"], content[1]["reason"]) == (
        "nonfinite_map",
        "NaN in layer up.0",
    )
    assert content[2]["reason"] is content[0]["reason"] is None
    found = {(row["id"], row["imacs_r_reason"]) for row in content if row["imacs_r_reason"]}
    assert found == {(store.ids("unpaired")[3], "degenerate_map")}


def test_many_rows_are_written_in_groups(store, tmp_path, monkeypatch):
    monkeypatch.setattr("i2am.evaluation.export._ROWS", 3)
    table = rows(store, tmp_path)
    assert table["id"].to_pylist() == store.ids("paired") + store.ids("unpaired")
    assert parquet.ParquetFile(tmp_path / "scores.parquet").num_row_groups == 4


# Whole or not at all

EXPORTS = pytest.mark.parametrize("export", [to_zarr, to_parquet])


@EXPORTS
def test_what_is_there_is_kept(export, store, tmp_path):
    out = tmp_path / "out"
    if export is to_zarr:
        out.mkdir()
        kept = out / "mine"
    else:
        kept = out
    kept.write_bytes(b"mine")
    with pytest.raises(
        OutputRefused, match=r"output .*out (folder )?(exists|is not empty)|out is not"
    ):
        export(store, out)
    assert kept.read_bytes() == b"mine"


@EXPORTS
def test_nothing_is_left_after_a_damaged_shard(export, store, tmp_path, monkeypatch):
    read = Store.read

    def fail(self, setting, number, **options):
        if (setting, number) == ("unpaired", 1):
            raise StoreDamaged("damaged")
        return read(self, setting, number, **options)

    monkeypatch.setattr(Store, "read", fail)
    with pytest.raises(StoreDamaged):
        export(store, tmp_path / "new" / "out" if export is to_zarr else tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


@EXPORTS
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_nothing_is_left_after_an_error_of_the_disk(export, store, tmp_path, monkeypatch, call):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if export is to_zarr and call == "replace":
        call = "rename"
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left on device"):
        export(store, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


@EXPORTS
def test_nothing_committed(export, tmp_path):
    store = Store.create(tmp_path / "run", PLAN)
    with pytest.raises(ValueError, match="run has no committed shard, so nothing can be exported"):
        export(store, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("export", "package"), [(to_zarr, "zarr"), (to_parquet, "pyarrow")], ids=["zarr", "pyarrow"]
)
def test_a_missing_package_is_named(export, package, store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"^{package} is missing; install it with pip install i2am\[export\]$"
    with pytest.raises(ImportError, match=message):
        export(store, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []
