"""One process's part of a run: it holds the model and the data, and computes shards whole."""

import json
import logging
import os
import platform
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import i2am
from i2am.data.images import ImageRejected
from i2am.data.vitonhd import VitonHD
from i2am.evaluation.generating import Item, generate
from i2am.evaluation.kept import SCORES, failed, kept_maps, score
from i2am.evaluation.plan import Settings, seed_of
from i2am.evaluation.shard import FAILED, OK, SAMPLE, Reason, Shard
from i2am.evaluation.store import Store
from i2am.files import append, inner_folder

if TYPE_CHECKING:
    from i2am.models.base import ReferencePipeline


log = logging.getLogger("i2am")


class Done(NamedTuple):
    """A committed shard."""

    samples: int
    failed: int


class _Read(NamedTuple):
    """Items of a batch by position, and why others cannot be read."""

    items: dict[int, Item]
    refused: dict[int, Reason]


class _Batch(NamedTuple):
    images: Tensor
    """uint8 ``[samples, height, width, 3]``"""
    scores: Tensor
    reasons: list[dict[str, Reason]]
    maps: dict[str, Tensor]


class Worker:
    """Computes and commits shards of a run, in any order.

    A shard is always computed whole, in the plan's batches, every sample with a seed of its own,
    and a sample that failed leaves its place in the batch to a copy of another. So its bytes depend
    on the plan alone, not on who computes it when.

    Args:
        store: The run.
        pipe: The model, with its sampler, on its device.
        data: The data set under each of the run's pairs.
        settings: The plan's.
    """

    def __init__(
        self,
        store: Store,
        pipe: "ReferencePipeline",
        data: Mapping[str, VitonHD],
        settings: Settings,
    ) -> None:
        self.store, self.pipe, self.data, self.settings = store, pipe, data, settings
        # a name of its own: containers have the same process numbers
        name = f"{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._log = inner_folder(store.folder, "logs") / name
        # scores are computed on the CPU also where the model is not
        torch.set_num_threads(settings.threads)
        pipe.set_progress_bar_config(disable=True)

    def run(self, setting: str, number: int, *, tick: Callable[[int], Any] | None = None) -> Done:
        """Computes a shard and commits it.

        Args:
            setting: Which pairs.
            number: Which shard of them.
            tick: Called with the number of samples that were just made.

        Raises:
            OutOfMemory: A batch does not fit into memory.
            OSError: The shard cannot be written; it is not committed then.
        """
        started = time.monotonic()
        data, settings = self.data[setting], self.settings
        positions = self.store.positions(setting, number)
        ids = tuple(data.pairs[position].id for position in positions)
        partition = [
            positions[start : start + settings.batch]
            for start in range(0, len(positions), settings.batch)
        ]
        parts = []
        for batch, read in zip(partition, _read_ahead(data, partition), strict=True):
            parts.append(self._batch(data, batch, read))
            if tick is not None:
                tick(len(batch))
        scores = torch.cat([part.scores for part in parts])
        reasons = [reason for part in parts for reason in part.reasons]
        status = [FAILED if SAMPLE in reason else OK for reason in reasons]
        images = {
            id: _png(image)
            for id, image, state in zip(
                ids, torch.cat([part.images for part in parts]), status, strict=True
            )
            if state == OK
        }
        shard = Shard(
            setting=setting,
            number=number,
            fingerprint=self.store.plan["fingerprint"],
            ids=ids,
            score_names=SCORES,
            index=torch.tensor([*positions]),
            status=torch.tensor(status, dtype=torch.uint8),
            scores=scores,
            maps=_joined(parts, status),
            reasons=dict(zip(ids, reasons, strict=True)),
            batches=tuple(tuple(batch) for batch in partition),
            images={id: zlib.crc32(png) for id, png in images.items()},
        )
        if kept := self.store.commit(shard, images):
            log.warning("%s failed now and stay as they were", ", ".join(kept))
        done = Done(len(ids), status.count(FAILED))
        self._note(
            {
                "setting": setting,
                "shard": number,
                **done._asdict(),
                "seconds": round(time.monotonic() - started, 3),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
        )
        return done

    def _batch(self, data: VitonHD, batch: range, read: _Read) -> _Batch:
        height, width = self.settings.size
        if not read.items:
            values, reasons = failed([read.refused[position] for position in batch])
            black = torch.zeros(len(batch), height, width, 3, dtype=torch.uint8)
            return _Batch(black, values, reasons, {})
        # always as many samples, whatever was refused and wherever the shard ends
        spare = min(read.items)
        places = [position if position in read.items else spare for position in batch]
        places += [spare] * (self.settings.batch - len(places))
        stacked = {
            name: torch.stack([read.items[position][name] for position in places])
            for name in read.items[spare]
        }
        seeds = [seed_of(self.settings.seed, data.pairs[position].id) for position in places]
        images, maps = generate(self.pipe, stacked, seeds, self.settings)
        # copies of other samples that only filled the batch
        maps = maps.select(samples=slice(len(batch))).to("cpu")
        images = images[: len(batch)].float().cpu()
        wrong = self._steps_missed(maps)
        if wrong is None:
            values, reasons = score(
                maps,
                stacked["mask"][: len(batch)],
                stacked["garment_mask"][: len(batch)],
                self.settings.preset,
            )
        else:
            values, reasons = failed([wrong] * len(batch))
        for place, position in enumerate(batch):
            if position in read.refused:
                reasons[place] = {SAMPLE: read.refused[position]}
            elif not bool(images[place].isfinite().all()):
                reasons[place] = {SAMPLE: Reason("nonfinite_image", "NaN or Inf in the image")}
            if SAMPLE in reasons[place]:
                values[place] = torch.nan
        kept = {}
        if self.settings.maps != "none":
            kept = kept_maps(maps, getattr(torch, self.settings.maps))
        pixels = (images.nan_to_num() * 255).round().clamp(0, 255).byte().movedim(1, -1)
        return _Batch(pixels, values, reasons, kept)

    def _steps_missed(self, maps: i2am.AttributionMaps) -> Reason | None:
        recorded = maps.provenance["steps"]
        if recorded == self.settings.steps:
            return None
        return Reason(
            "steps_mismatch",
            f"{recorded} denoising steps were recorded, the plan has {self.settings.steps}",
        )

    def _note(self, entry: dict[str, Any]) -> None:
        if torch.cuda.is_available() and self.settings.device == "cuda":
            entry["peak_bytes"] = torch.cuda.max_memory_allocated()
        append(self._log, json.dumps(entry) + "\n")


def _read_ahead(data: VitonHD, partition: Sequence[range]) -> Iterator[_Read]:
    """The items of each batch in turn, while those of the next are being read."""

    def read(position: int) -> Item | Reason:
        try:
            return data[position]
        except ImageRejected as error:
            return Reason(error.code, str(error))

    with ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(read, position) for position in partition[0]]
        for batch, following in zip_longest(partition, partition[1:], fillvalue=range(0)):
            asked, ahead = ahead, [pool.submit(read, position) for position in following]
            found = _Read({}, {})
            for position, future in zip(batch, asked, strict=True):
                result = future.result()
                if isinstance(result, Reason):
                    found.refused[position] = result
                else:
                    found.items[position] = result
            yield found


def _joined(parts: Sequence[_Batch], status: Sequence[int]) -> dict[str, Tensor]:
    """The maps of all batches, zeros for samples that failed."""
    shapes = next((part.maps for part in parts if part.maps), {})
    joined = {}
    for name, like in shapes.items():
        rows = [
            part.maps.get(name, like.new_zeros(len(part.scores), *like.shape[1:])) for part in parts
        ]
        joined[name] = torch.cat(rows)
        joined[name][torch.tensor(status) == FAILED] = 0
    return joined


def _png(pixels: Tensor) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()
