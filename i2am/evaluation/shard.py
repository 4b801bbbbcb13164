"""One shard of an evaluation: consecutive samples in one safetensors file, checksummed throughout.

The layout is plain safetensors with a single metadata entry, ``i2am``, of canonical JSON. Neither
time nor machine is in it, so equal content gives equal bytes.
"""

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

from i2am.evaluation.errors import StoreConflict, StoreDamaged
from i2am.files import FileRejected
from i2am.files.container import Container, pack, read_container

SCHEMA = 1
"""Version of shards and of ``run.json`` that is written, and the newest that can be read."""

OK, FAILED = 0, 1
"""Values of `Shard.status`."""

SAMPLE = "sample"
"""Stands where a score's name would be in the reason why a whole sample failed."""

_ALWAYS = ("index", "status", "scores")


class Reason(NamedTuple):
    """Why a sample failed or a score is undefined."""

    code: str
    """For counting, such as ``nonfinite_map``."""
    message: str
    """One sentence."""


@dataclass(frozen=True, eq=False)
class Shard:
    """S consecutive samples of one setting, in the plan's order.

    Attributes:
        setting: ``paired`` or ``unpaired``.
        number: Which shard of the setting, from 0.
        fingerprint: Of the run it belongs to.
        ids: Of its samples.
        score_names: K names.
        index: Positions in the setting's list of pairs, int64 ``[S]``.
        status: `OK` or `FAILED`, uint8 ``[S]``.
        scores: float64 ``[S, K]``, NaN where undefined or failed.
        maps: float16 or float32 ``[S, time groups, heads, height, width]``, each divided by its
            largest value, zeros where failed; and under ``<name>_scale`` that value, float32
            ``[S, time groups, heads]``. Empty if maps are not kept, or were not read.
        reasons: By id and score name, why a score is NaN; by id and `SAMPLE`, why a sample failed.
        batches: The partition in which the samples were computed.
        images: CRC-32 of the bytes of each sample's PNG, by id.

    Raises:
        ValueError: If these do not fit together.
    """

    setting: str
    number: int
    fingerprint: str
    ids: tuple[str, ...]
    score_names: tuple[str, ...]
    index: Tensor
    status: Tensor
    scores: Tensor
    maps: Mapping[str, Tensor]
    reasons: Mapping[str, Mapping[str, Reason]]
    batches: tuple[tuple[int, ...], ...]
    images: Mapping[str, int]

    def __post_init__(self) -> None:
        samples = len(self.ids)
        if not samples or len(set(self.ids)) < samples:
            raise ValueError(f"ids must be at least one and distinct, got {list(self.ids)}")
        _require("index", self.index, torch.int64, [samples])
        _require("status", self.status, torch.uint8, [samples])
        _require("scores", self.scores, torch.float64, [samples, len(self.score_names)])
        for name, tensor in self.maps.items():
            if name in _ALWAYS:
                raise ValueError(f"maps must not be named like another tensor, got {name}")
            if name.endswith("_scale"):
                owner = self.maps.get(name.removesuffix("_scale"))
                shape = [samples, *tensor.shape[1:]] if owner is None else [*owner.shape[:3]]
                _require(f"map {name}", tensor, torch.float32, shape)
            elif tensor.ndim != 5 or len(tensor) != samples or not _is_map(tensor):
                raise ValueError(
                    f"map {name} must be float16 or float32 [{samples}, time groups, heads, "
                    f"height, width], got {tensor.dtype} {list(tensor.shape)}"
                )
        for name, texts in (
            ("ids", self.ids),
            ("score_names", self.score_names),
            (
                "reasons",
                [text for of in self.reasons.values() for one in of.values() for text in one],
            ),
        ):
            if odd := [text for text in texts if not isinstance(text, str)]:
                raise ValueError(f"{name} must be strings, got {odd[0]!r}")
        for name, known in (("reasons", self.reasons), ("images", self.images)):
            if unknown := sorted(known.keys() - set(self.ids)):
                raise ValueError(f"{name} must be of samples of the shard, got {unknown[0]}")
        self._require_reasons()

    def keeping(self, earlier: "Shard", whole: Collection[str]) -> "Shard":
        """This shard with samples of an earlier one in place of those that failed now.

        Args:
            earlier: A shard of the same samples.
            whole: Ids of its samples that can be kept.
        """
        rows = [
            row
            for row, id in enumerate(self.ids)
            if id in whole and self.status[row] == FAILED and earlier.status[row] == OK
        ]
        if not rows:
            return self

        def merged(now: Tensor, before: Tensor) -> Tensor:
            now = now.clone()
            now[rows] = before[rows]
            return now

        kept = [self.ids[row] for row in rows]
        return replace(
            self,
            status=merged(self.status, earlier.status),
            scores=merged(self.scores, earlier.scores),
            maps={
                name: merged(self.maps.get(name, torch.zeros_like(before)), before)
                for name, before in earlier.maps.items()
            },
            reasons=dict(self.reasons) | {id: earlier.reasons.get(id, {}) for id in kept},
            images=dict(self.images)
            | {id: earlier.images[id] for id in kept if id in earlier.images},
        )

    def to_bytes(self) -> bytes:
        """The whole file; equal content gives equal bytes.

        Raises:
            ValueError: If a name is not one that JSON can hold.
        """
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "setting": self.setting,
            "number": self.number,
            "ids": self.ids,
            "score_names": self.score_names,
            "reasons": {
                id: {name: reason._asdict() for name, reason in of.items()}
                for id, of in self.reasons.items()
                if of
            },
            "batches": self.batches,
            "images": dict(self.images),
        }
        tensors = {"index": self.index, "status": self.status, "scores": self.scores, **self.maps}
        return b"".join(pack(tensors, document))

    @classmethod
    def from_bytes(
        cls, data: bytes, *, tensors: Collection[str] | None = None, check: bool = True
    ) -> Self:
        """Reads what `to_bytes` wrote.

        Args:
            data: The whole file.
            tensors: Names of the maps to read; None reads all.
            check: Whether to compare the tensors read with their checksums. The description is
                always compared with its own.

        Raises:
            StoreDamaged: If the bytes are truncated, altered, or not a shard.
            StoreConflict: If they were written by another version of i2am.
            ValueError: If a name of `tensors` is not in the shard.
        """
        file = io.BytesIO(data)
        return cls.read(file, read_header(file), tensors=tensors, check=check)

    @classmethod
    def read(
        cls,
        file: BinaryIO,
        header: Container,
        *,
        tensors: Collection[str] | None = None,
        check: bool = True,
    ) -> Self:
        """As `from_bytes`, of a file whose header was read, reading no more than is asked for.

        Raises:
            OSError: If the file cannot be read; the rest as `from_bytes`.
        """
        document = header.document
        stored = document["tensors"].keys() - {*_ALWAYS}
        wanted = stored if tensors is None else set(tensors)
        if unknown := sorted(wanted - stored):
            raise ValueError(f"tensors must be of {sorted(stored)}, got {unknown[0]}")
        load = partial(header.load, file, check=check)
        try:
            return cls(
                setting=document["setting"],
                number=document["number"],
                fingerprint=document["fingerprint"],
                ids=tuple(document["ids"]),
                score_names=tuple(document["score_names"]),
                index=load("index"),
                status=load("status"),
                scores=load("scores"),
                maps={name: load(name) for name in sorted(wanted)},
                reasons={
                    id: {name: Reason(**reason) for name, reason in of.items()}
                    for id, of in document["reasons"].items()
                },
                batches=tuple(map(tuple, document["batches"])),
                images=document["images"],
            )
        except FileRejected as error:
            raise StoreDamaged(str(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreDamaged(f"{header.name} is damaged: {error}") from error

    def _require_reasons(self) -> None:
        undefined = self.scores.isnan().tolist()
        for id, status, row in zip(self.ids, self.status.tolist(), undefined, strict=True):
            reasons = self.reasons.get(id, {})
            if status not in (OK, FAILED) or (status == FAILED) != (SAMPLE in reasons):
                raise ValueError(
                    f"status must be {FAILED} with a reason {SAMPLE!r}, or {OK} without one, "
                    f"got {status} and {dict(reasons)} for {id}"
                )
            for name, is_undefined in zip(self.score_names, row, strict=True):
                if is_undefined and not reasons.keys() & {SAMPLE, name}:
                    raise ValueError(f"score {name} of {id} is NaN, which needs a reason")


def read_header(file: BinaryIO, name: str | Path = "the shard") -> Container:
    """Reads the description of a shard, and checks it against itself and the file's length.

    Args:
        file: The whole file.
        name: What to call it in messages.

    Raises:
        StoreDamaged: If the file is truncated, has an altered description, or is not a shard.
        StoreConflict: If it was written by another version of i2am.
        OSError: If it cannot be read.
    """
    try:
        header = read_container(file, name)
    except FileRejected as error:
        raise StoreDamaged(str(error)) from error
    schema = header.document.get("schema")
    if schema != SCHEMA:
        raise StoreConflict(
            f"{name} has schema {schema} and this i2am reads schema {SCHEMA}; "
            "read it with the version of i2am that wrote it"
        )
    return header


def _is_map(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.float32)


def _require(name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if tensor.dtype != dtype or [*tensor.shape] != shape:
        raise ValueError(f"{name} must be {dtype} {shape}, got {tensor.dtype} {list(tensor.shape)}")
