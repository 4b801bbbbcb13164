"""Runs measures over the pictures of committed shards, one shard at a time."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from i2am.evaluation.errors import StoreDamaged
from i2am.evaluation.scores import cache
from i2am.evaluation.scores.measure import Measure, Pictures
from i2am.evaluation.scores.pictures import find_picture, resize, to_pixels
from i2am.evaluation.scores.protocols import Protocol
from i2am.evaluation.shard import OK, Reason, Shard
from i2am.evaluation.store import Store
from i2am.files import FileRejected, inner_folder, read_bytes

Numbers = Mapping[str, Tensor]
"""By name, ``[samples of the shard, ...]``, NaN where a sample has none."""


class ShardMeasures:
    """What measures say about the pictures of one shard.

    Attributes:
        numbers: By measure, what it gave.
        reasons: By measure and id, why a sample that did not fail has no numbers.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, Numbers] = {}
        self.reasons: dict[str, dict[str, Reason]] = {}


class PictureMeasures:
    """Measures over the pictures of a run.

    Args:
        store: The run.
        protocol: How real pictures are resized.
        real: Folder of the real pictures, named as in the data set.
        measures: What to compute.
    """

    def __init__(
        self, store: Store, protocol: Protocol, real: Path, measures: Sequence[Measure]
    ) -> None:
        self._store, self._protocol, self._real = store, protocol, real
        self._measures = measures

    def over(self, setting: str, numbers: Iterable[int]) -> Iterator[tuple[Shard, ShardMeasures]]:
        """Measure shards one after the other.

        What was computed before from the same files is read from ``features/``.

        Raises:
            StoreError: If a shard is damaged.
            OSError: If a file cannot be read or written.
        """
        for number in numbers:
            shard = self._store.read(setting, number, tensors=())
            yield shard, self._measure(shard)

    def _measure(self, shard: Shard) -> ShardMeasures:
        result = ShardMeasures()
        names = self._names(shard)
        files = {name: find_picture(self._real, name) for name in names}
        key = {
            "fingerprint": shard.fingerprint,
            "images": dict(shard.images),
            "real": {name: _checksum(path) for name, path in files.items()},
        }
        missing = []
        for measure in self._measures:
            path = self._cache_path(measure, shard)
            found = cache.load(path, {**key, "measure": measure.key})
            if found is None:
                missing.append(measure)
            else:
                result.numbers[measure.name] = found
                result.reasons[measure.name] = _without_image(shard)
        if missing:
            self._compute(shard, names, files, missing, result)
        for measure in missing:
            # a file that is missing or damaged now may be there the next time
            if result.reasons[measure.name] == _without_image(shard):
                path = self._cache_path(measure, shard)
                inner_folder(self._store.folder, *path.relative_to(self._store.folder).parts[:-1])
                cache.save(path, {**key, "measure": measure.key}, result.numbers[measure.name])
        return result

    def _compute(
        self,
        shard: Shard,
        names: Sequence[str],
        files: Mapping[str, Path],
        measures: Sequence[Measure],
        result: ShardMeasures,
    ) -> None:
        rows: dict[str, dict[int, dict[str, Tensor]]] = {m.name: {} for m in measures}
        for measure in measures:
            result.reasons[measure.name] = _without_image(shard)
        for row, (identity, name) in enumerate(zip(shard.ids, names, strict=True)):
            if shard.status[row] != OK or identity not in shard.images:
                continue
            try:
                pictures = self._pictures(shard, identity, files[name])
            except ValueError as error:
                for measure in measures:
                    result.reasons[measure.name][identity] = Reason("picture", str(error))
                continue
            for measure in measures:
                try:
                    rows[measure.name][row] = measure(pictures)
                except ValueError as error:
                    result.reasons[measure.name][identity] = Reason("measure", str(error))
        for measure in measures:
            result.numbers[measure.name] = _stacked(rows[measure.name], len(shard.ids))

    def _pictures(self, shard: Shard, identity: str, real: Path) -> Pictures:
        """Both pictures of a sample.

        Raises:
            ImageRejected: If one cannot be used.
            ValueError: If the generated one is not what the shard lists.
        """
        from i2am.data.images import read_image

        path = self._store.image_path(shard.setting, identity)
        try:
            content = self._store.image(shard, identity)
        except StoreDamaged as error:
            raise ValueError(f"generated picture {error}") from error
        generated = to_pixels(read_image(path, name="generated picture", content=content))
        original = to_pixels(read_image(real, name="real picture"))
        height, width = generated.shape[-2:]
        return Pictures(
            generated, original, resize(original, (height, width), self._protocol.resize)
        )

    def _names(self, shard: Shard) -> list[str]:
        """The file name of each person's picture in the data set."""
        pairs = self._store.plan["data"]["pairs"][shard.setting]
        return [pairs[position][4] for position in shard.index.tolist()]

    def _cache_path(self, measure: Measure, shard: Shard) -> Path:
        folder = self._store.folder / "features" / measure.name / shard.setting
        return folder / f"{shard.number:06d}.safetensors"


def _checksum(path: Path) -> int | None:
    try:
        return zlib.crc32(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, FileRejected):
        return None


def _without_image(shard: Shard) -> dict[str, Reason]:
    reason = Reason("no_image", "the run kept no image of it")
    return {
        identity: reason
        for identity, status in zip(shard.ids, shard.status.tolist(), strict=True)
        if status == OK and identity not in shard.images
    }


def _stacked(rows: Mapping[int, Mapping[str, Tensor]], samples: int) -> dict[str, Tensor]:
    stacked: dict[str, Tensor] = {}
    for row, numbers in rows.items():
        for name, value in numbers.items():
            if name not in stacked:
                stacked[name] = torch.full((samples, *value.shape), torch.nan, dtype=value.dtype)
            stacked[name][row] = value
    return stacked
