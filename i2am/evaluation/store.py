"""The folder of a run: its plan, the shards committed so far, and their images.

A shard is committed once a file has its final name. Files appear there whole, by renaming, so any
number of processes may commit at the same time: two that compute one shard write equal bytes.
"""

import errno
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from i2am.data.images import MAX_BYTES
from i2am.evaluation import plan_file
from i2am.evaluation.errors import StoreConflict, StoreDamaged, StoreError
from i2am.evaluation.shard import Shard, read_header
from i2am.files import (
    FileRejected,
    FolderLock,
    inner_folder,
    open_regular,
    read_bytes,
    write,
)
from i2am.files.atomic import is_temporary
from i2am.files.container import Container
from i2am.wording import printable

__all__ = ["Store", "StoreConflict", "StoreDamaged", "StoreError"]

# a number has one way to be written
_SHARD = re.compile(r"(\d{6}|[1-9]\d{6,})\.safetensors", re.ASCII)


class Store:
    """A run folder; `create` opens it to commit shards, `open` to read them.

    Attributes:
        folder: Where it is.
        plan: Content of ``run.json``, as it was first written.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder = folder
        self.plan = plan
        self._ids = {
            setting: [pair[0] for pair in plan["data"]["pairs"][setting]]
            for setting in plan["settings"]["pairs"]
        }
        self._damaged: dict[str, dict[int, str]] = {setting: {} for setting in self._ids}
        self._lock: FolderLock | None = None

    @classmethod
    def create(cls, folder: str | Path, plan: dict[str, Any]) -> Self:
        """Makes a run folder, or opens one with the same fingerprint to go on with it.

        What interrupted processes left behind is removed. Shards that are truncated, or damaged in
        their description, do not count as committed from now on.

        Args:
            folder: Absent, empty, or of this run.
            plan: Content of ``run.json``.

        Raises:
            StoreConflict: If the folder holds something else, of which nothing is changed; the
                message names what differs.
            StoreDamaged: If its ``run.json`` is damaged.
            ValueError: If the plan lacks what a store needs.
            OSError: If the folder cannot be written.
        """
        folder = Path(folder)
        plan_file.check(plan)
        stored = plan_file.create(folder, plan)
        store = cls(folder, stored)
        store.check_headers()
        store._begin_writing()
        return store

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Opens a run folder; nothing in it is changed before something is committed.

        Raises:
            StoreConflict: If it is not a run folder, or of another version of i2am.
            StoreDamaged: If its ``run.json`` is damaged.
            OSError: If it cannot be read.
        """
        folder = Path(folder)
        plan = plan_file.read(folder)
        if plan is None:
            raise StoreConflict(
                f"{folder} is not a run of i2am evaluate: it has no run.json of one"
            )
        return cls(folder, plan)

    def settings(self) -> list[str]:
        """Names of the settings, in the plan's order."""
        return [*self._ids]

    def ids(self, setting: str) -> list[str]:
        """Ids of a setting's samples, in the plan's order."""
        if setting not in self._ids:
            raise ValueError(f"setting must be one of {self.settings()}, got {setting!r}")
        return self._ids[setting]

    def shard_numbers(self, setting: str) -> range:
        """Numbers of all shards that the plan wants."""
        return range(-(-len(self.ids(setting)) // self._size))

    def positions(self, setting: str, number: int) -> range:
        """Positions of a shard's samples in the setting's list of pairs.

        Raises:
            ValueError: If the plan has no such shard.
        """
        numbers = self.shard_numbers(setting)
        if number not in numbers:
            raise ValueError(f"number must be below {len(numbers)} for {setting}, got {number}")
        start = number * self._size
        return range(start, min(start + self._size, len(self._ids[setting])))

    def committed(self, setting: str) -> set[int]:
        """Numbers of the shards that are there and that `check_headers` did not find damaged."""
        return self._found(setting) - self._damaged[setting].keys()

    def check_headers(self) -> dict[str, dict[int, str]]:
        """Reads the description of every committed shard, not its tensors.

        Returns:
            One sentence for each that is truncated or damaged, by setting and number. `committed`
            leaves these out from now on.

        Raises:
            StoreConflict: If a shard belongs to another run, or to another version of i2am.
            OSError: If one cannot be read.
        """
        for setting in self.settings():
            damaged = self._damaged[setting] = {}
            # text, because there are many, and a Path for each takes longer than to read it
            folder = str(self.folder / "shards" / setting)
            for number in sorted(self._found(setting)):
                path = f"{folder}{os.sep}{number:06d}.safetensors"
                try:
                    with open_regular(path) as file:
                        self._check_owner(setting, number, read_header(file, path))
                except FileNotFoundError:
                    damaged[number] = f"{path} leads to nothing, or was removed"
                except (StoreDamaged, FileRejected) as error:
                    damaged[number] = str(error)
        return {setting: dict(found) for setting, found in self._damaged.items()}

    def commit(self, shard: Shard, images: Mapping[str, bytes]) -> list[str]:
        """Writes a shard's images, then the shard; returns when both are on disk to stay.

        Of a shard that is there already, samples stay that did not fail there and failed now.

        Args:
            shard: One of the plan's.
            images: PNG of each sample that has one, by id.

        Returns:
            Ids of the samples that stayed.

        Raises:
            ValueError: If the shard is not one of the plan's, or the images are not those it lists.
            OSError: If something cannot be written; the shard is then not committed, or as it was.
        """
        positions = self.positions(shard.setting, shard.number)
        if shard.fingerprint != self.plan["fingerprint"]:
            raise ValueError("shard must have the fingerprint of the run")
        ids = self._ids[shard.setting][positions.start : positions.stop]
        if shard.index.tolist() != [*positions] or [*shard.ids] != ids:
            raise ValueError(f"shard {shard.number} must hold the samples {ids} of {shard.setting}")
        if {id: zlib.crc32(data) for id, data in images.items()} != shard.images:
            raise ValueError("images must be those whose checksums the shard lists")
        if self._lock is None:
            self._begin_writing()
        if shard.status.any():
            shard = self._keeping(shard)
        data = shard.to_bytes()
        try:
            for id, image in images.items():
                write(self.image_path(shard.setting, id), image)
            write(self.shard_path(shard.setting, shard.number), data)
        except OSError as error:
            size = (len(data) + sum(map(len, images.values()))) / 1e6
            what = f"shard {shard.number} of {shard.setting} with its images takes {size:.1f} MB"
            raise OSError(error.errno, f"{error.strerror}; {what}", error.filename) from error
        self._damaged[shard.setting].pop(shard.number, None)
        return sorted(shard.images.keys() - images.keys())

    def read(
        self,
        setting: str,
        number: int,
        *,
        tensors: Collection[str] | None = None,
        check: bool = True,
    ) -> Shard:
        """Reads a committed shard.

        Args:
            setting: Name of the setting.
            number: Which shard of it.
            tensors: Names of the maps to read; None reads all.
            check: Whether to compare the tensors read with their checksums.

        Raises:
            ValueError: If the run has no such shard, or the shard no such map.
            StoreConflict: If it belongs to another run, or to another version of i2am.
            StoreDamaged: If it is not committed, truncated or damaged.
            OSError: If it cannot be read.
        """
        path = self.shard_path(setting, number)
        try:
            file = open_regular(path)
        except FileNotFoundError:
            raise StoreDamaged(
                f"shard {number} of {setting} is not in {self.folder}: it is not committed yet, or "
                "was removed"
            ) from None
        except FileRejected as error:
            raise StoreDamaged(str(error)) from error
        with file:
            header = read_header(file, path)
            self._check_owner(setting, number, header)
            return Shard.read(file, header, tensors=tensors, check=check)

    def shards(self, setting: str, *, tensors: Collection[str] | None = ()) -> Iterator[Shard]:
        """Committed shards in order, one at a time, by default without maps; raises as `read`."""
        for number in sorted(self.committed(setting)):
            yield self.read(setting, number, tensors=tensors)

    def shard_path(self, setting: str, number: int) -> Path:
        """File of a shard, committed or not."""
        self.positions(setting, number)
        return self.folder / "shards" / setting / f"{number:06d}.safetensors"

    def image_path(self, setting: str, id: str) -> Path:
        """File of a sample's image, there or not."""
        return self.folder / "images" / setting / f"{id}.png"

    def image(self, shard: Shard, id: str) -> bytes:
        """PNG of a sample, the one that its shard lists.

        Raises:
            StoreDamaged: If it is missing, or another file.
            OSError: If it cannot be read.
        """
        path = self.image_path(shard.setting, id)
        if id not in shard.images:
            raise StoreDamaged(f"shard {shard.number} of {shard.setting} lists no image of {id}")
        try:
            data = read_bytes(path, limit=MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreDamaged(f"{path} is missing") from None
        except FileRejected as error:
            raise StoreDamaged(str(error)) from error
        if zlib.crc32(data) != shard.images[id]:
            raise StoreDamaged(f"{path} is damaged: it does not match its checksum")
        return data

    def verify(self, *, progress: bool = False) -> list[str]:
        """Compares every byte of committed shards and their images with its checksum.

        Args:
            progress: Whether to show a bar on stderr.

        Returns:
            One sentence for each problem; what is not committed yet is none.

        Raises:
            OSError: If a file cannot be read.
        """
        from tqdm import tqdm

        problems = []
        for setting in self.settings():
            wanted = [f"{number:06d}.safetensors" for number in self.shard_numbers(setting)]
            strange = {name for name in self._names(setting) if not is_temporary(name)} - {*wanted}
            problems += [
                f"{self.folder / 'shards' / setting / name} is not a shard of this run"
                for name in sorted(strange)
            ]
            numbers = sorted(self._found(setting))
            for number in tqdm(numbers, printable(setting), unit="shard", disable=not progress):
                try:
                    shard = self.read(setting, number)
                except StoreError as error:
                    problems.append(str(error))
                else:
                    problems += self._damaged_images(shard).values()
        return problems

    @property
    def _size(self) -> int:
        return self.plan["settings"]["shard"]

    def _begin_writing(self) -> None:
        parts = [inner_folder(self.folder, of, s) for of in ("shards", "images") for s in self._ids]
        self._lock = FolderLock(plan_file.path(self.folder), clean=(self.folder, *parts))

    def _keeping(self, shard: Shard) -> Shard:
        """A new shard with what is whole in the one that it replaces, if there is one."""
        try:
            earlier = self.read(shard.setting, shard.number)
        except StoreError:
            return shard
        return shard.keeping(earlier, earlier.images.keys() - self._damaged_images(earlier).keys())

    def _names(self, setting: str) -> list[str]:
        folder = self.folder / "shards" / setting
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise StoreDamaged(f"{folder} must be a folder of shards") from error

    def _found(self, setting: str) -> set[int]:
        numbers = self.shard_numbers(setting)
        found = {int(match[1]) for match in map(_SHARD.fullmatch, self._names(setting)) if match}
        return found.intersection(numbers)

    def _check_owner(self, setting: str, number: int, header: Container) -> None:
        document, size = header.document, self._size
        if document.get("fingerprint") != self.plan["fingerprint"]:
            raise StoreConflict(
                f"{header.name} belongs to another run: its fingerprint is "
                f"{document.get('fingerprint')}, that of this run {self.plan['fingerprint']}"
            )
        ids = self._ids[setting][number * size : (number + 1) * size]
        if [document.get(key) for key in ("setting", "number", "ids")] != [setting, number, ids]:
            raise StoreDamaged(f"{header.name} holds other samples than the plan wants there")

    def _damaged_images(self, shard: Shard) -> dict[str, str]:
        """One sentence for each image that is not the one that the shard lists, by id."""
        problems = {}
        for id in shard.images:
            try:
                self.image(shard, id)
            except StoreDamaged as error:
                problems[id] = str(error)
        return problems
