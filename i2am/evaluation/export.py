"""A run in formats of others: maps as zarr, for xarray, and scores as parquet."""

import io
import warnings
from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2am.evaluation.shard import FAILED, OK, SAMPLE, Shard
from i2am.evaluation.store import Store
from i2am.files import OutputRefused, check_place, fresh_folder, write
from i2am.wording import printable

AXES = ("sample", "time", "head", "height", "width")
"""Of a map in zarr."""

MISSING = 2
"""In zarr, the status of a sample that is not committed."""

_PAIR = ("id", "person", "garment")
_ROWS = 65_536


def to_zarr(store: Store, folder: Path, *, progress: bool = False) -> None:
    """Writes maps and scores of what is committed to a zarr folder of format 3.

    A setting is a group with ``person``, ``garment``, ``status`` and each score by ``[sample]``.
    Below it, ``r2g`` and ``g2r`` are groups with the maps, float32 in the unit they were recorded
    in, that is multiplied by their scale, with the axes `AXES`; two groups, because the directions
    differ in height and width. In all of them ``sample`` holds the ids. Maps and scores are NaN
    where undefined, failed or missing.

    Args:
        store: The run.
        folder: Absent or empty; it appears complete or not at all.
        progress: Whether to show a bar on stderr.

    Raises:
        ImportError: If zarr is not installed.
        OutputRefused: If `folder` is in use, or cannot be made.
        ValueError: If nothing is committed.
        StoreError: If a shard cannot be used.
        OSError: If something cannot be read or written.
    """
    zarr = _require("zarr")
    with fresh_folder(folder, overwrite=False) as partial:
        about = {name: value for name, value in store.plan.items() if name != "data"}
        root = zarr.create_group(partial, attributes={"run": about})
        empty = True
        for setting in store.settings():
            shards = _shards(store, setting, None, progress)
            first = next(shards, None)
            if first is not None:
                empty = False
                group = root.create_group(setting, attributes={"coordinates": "person garment"})
                _fill(group, store, setting, first, chain([first], shards))
        if empty:
            raise ValueError(f"{store.folder} has no committed shard, so nothing can be exported")
        with warnings.catch_warnings():
            # zarr's own, that readers other than zarr's and xarray's need not know this
            warnings.filterwarnings("ignore", "Consolidated metadata is currently not part")
            zarr.consolidate_metadata(partial)


def to_parquet(store: Store, file: Path, *, progress: bool = False) -> None:
    """Writes the scores of all samples to a parquet file, also of those failed or missing.

    A row has ``setting``, ``index``, ``id``, ``person``, ``garment``, ``status`` (ok, failed,
    missing), ``reason_code`` and ``reason`` why the sample failed, and for each score its value and
    ``<score>_reason``, the code why it is null.

    Args:
        store: The run.
        file: Must not exist; it appears complete or not at all.
        progress: Whether to show a bar on stderr.

    Raises:
        ImportError: If pyarrow is not installed.
        OutputRefused: If `file` exists, or cannot be made.
        ValueError: If nothing is committed.
        StoreError: If a shard cannot be used.
        OSError: If something cannot be read or written.
    """
    pyarrow, parquet = _require("pyarrow"), _require("pyarrow.parquet")
    check_place(file, kind="file")
    if file.exists():
        raise OutputRefused(f"output {file} exists; name another")
    names = _score_names(store)
    text, number = pyarrow.string(), pyarrow.float64()
    types = {"setting": text, "index": pyarrow.int64(), **dict.fromkeys(_PAIR, text)}
    types |= dict.fromkeys(("status", "reason_code", "reason"), text)
    for name in names:
        types |= {name: number, f"{name}_reason": text}
    schema = pyarrow.schema([*types.items()], {"fingerprint": store.plan["fingerprint"]})
    sink = io.BytesIO()
    with parquet.ParquetWriter(sink, schema) as writer:
        rows: list[dict[str, Any]] = []
        for setting in store.settings():
            for row in _rows(store, setting, progress):
                rows.append(row)
                if len(rows) == _ROWS:
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                    rows.clear()
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    write(file, sink.getvalue())


def _fill(group: Any, store: Store, setting: str, first: Shard, shards: Iterator[Shard]) -> None:
    samples, size = len(store.ids(setting)), len(store.positions(setting, 0))
    pairs = store.plan["data"]["pairs"][setting]
    for column, name in enumerate(("sample", "person", "garment")):
        _label(group, name, [str(pair[column]) for pair in pairs])
    status = group.create_array(
        "status",
        shape=(samples,),
        dtype="uint8",
        dimension_names=["sample"],
        attributes={"flag_values": [OK, FAILED, MISSING], "flag_meanings": "ok failed missing"},
    )
    nan = {"fill_value": float("nan")}
    scores = {
        name: group.create_array(
            name, shape=(samples,), dtype="float64", dimension_names=["sample"], **nan
        )
        for name in first.score_names
    }
    maps = {}
    for name in (name for name in first.maps if not name.endswith("_scale")):
        direction, votes = name.split("_", 1)
        shape = [*first.maps[name].shape[1:]]
        below = group.require_group(direction)
        if "sample" not in below:
            _label(below, "sample", store.ids(setting))
        maps[name] = below.create_array(
            votes,
            shape=(samples, *shape),
            dtype="float32",
            chunks=(1, *shape),
            shards=(size, *shape),
            dimension_names=AXES,
            **nan,
        )
    known = torch.full((samples,), MISSING, dtype=torch.uint8)
    values = torch.full((samples, len(scores)), torch.nan, dtype=torch.float64)
    for shard in shards:
        part = slice(int(shard.index[0]), int(shard.index[-1]) + 1)
        known[part], values[part] = shard.status, shard.scores
        for name, array in maps.items():
            array[part] = _recorded(shard, name).numpy()
    status[:] = known.numpy()
    for column, array in enumerate(scores.values()):
        array[:] = values[:, column].numpy()


def _label(group: Any, name: str, values: list[str]) -> None:
    array = group.create_array(
        name, shape=(len(values),), dtype="string", dimension_names=["sample"]
    )
    array[:] = values


def _recorded(shard: Shard, name: str) -> Tensor:
    maps = shard.maps[name].float() * shard.maps[f"{name}_scale"][..., None, None]
    maps[shard.status == FAILED] = torch.nan
    return maps


def _rows(store: Store, setting: str, progress: bool) -> Iterator[dict[str, Any]]:
    pairs = store.plan["data"]["pairs"][setting]
    shards = _shards(store, setting, (), progress)
    shard = next(shards, None)
    for number in store.shard_numbers(setting):
        here = shard if shard is not None and shard.number == number else None
        for place, index in enumerate(store.positions(setting, number)):
            row = {"setting": setting, "index": index, "status": "missing"}
            row |= zip(_PAIR, map(str, pairs[index]), strict=False)
            yield row if here is None else row | _scores(here, place)
        if here is not None:
            shard = next(shards, None)


def _scores(shard: Shard, place: int) -> dict[str, Any]:
    reasons = shard.reasons.get(shard.ids[place], {})
    if SAMPLE in reasons:
        code, message = reasons[SAMPLE]
        return {"status": "failed", "reason_code": code, "reason": message}
    row: dict[str, Any] = {"status": "ok"}
    for name, value in zip(shard.score_names, shard.scores[place].tolist(), strict=True):
        # a value that is NaN has a reason
        row |= {f"{name}_reason": reasons[name].code} if name in reasons else {name: value}
    return row


def _score_names(store: Store) -> list[str]:
    for setting in store.settings():
        for shard in store.shards(setting):
            return [*shard.score_names]
    raise ValueError(f"{store.folder} has no committed shard, so nothing can be exported")


def _shards(
    store: Store, setting: str, tensors: tuple[()] | None, progress: bool
) -> Iterator[Shard]:
    from tqdm import tqdm

    total = len(store.committed(setting))
    shards = store.shards(setting, tensors=tensors)
    return iter(tqdm(shards, printable(setting), total=total, unit="shard", disable=not progress))


def _require(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f"{name} is missing; install it with pip install i2am[export]") from error
