"""Plans and shards of made-up content, for tests and benchmarks."""

import zlib
from typing import Any

import torch

from i2am.evaluation.plan_file import fingerprint_of
from i2am.evaluation.shard import FAILED, SAMPLE, Reason, Shard
from i2am.metrics.names import IMACS_NAMES


def make_plan(
    *,
    pairs: int = 6,
    shard: int = 2,
    settings: tuple[str, ...] = ("paired", "unpaired"),
    **more: Any,
) -> dict[str, Any]:
    """A plan as in ``run.json``, as far as a store needs it.

    Args:
        pairs: Pairs in each setting.
        shard: Samples in a shard.
        settings: Names of the settings.
        more: Further settings; the fingerprint depends on them.
    """
    people = [f"{number:05d}_00" for number in range(pairs)]
    lists = {
        "paired": [
            [person, person, person, line, f"{person}.jpg"] for line, person in enumerate(people, 1)
        ],
        "unpaired": [
            [f"{person}_{people[-line]}", person, people[-line], line, f"{person}.jpg"]
            for line, person in enumerate(people, 1)
        ],
    }
    plan: dict[str, Any] = {
        "schema": 1,
        "i2am": "0.1.0",
        "model": {"name": "pocket", "weights_sha256": "0" * 64},
        "data": {
            "folder": "paper-dolls",
            "split": "test",
            "pairs": {name: lists.get(name, lists["paired"]) for name in settings},
        },
        "settings": {
            "pairs": [*settings],
            "shard": shard,
            "size": [128, 96],
            "steps": 4,
            "guidance": 2.0,
            "seed": 0,
            "preset": "paper",
            "maps": "float16",
            **more,
        },
    }
    return {**plan, "fingerprint": fingerprint_of(plan)}


def make_shard(
    plan: dict[str, Any],
    setting: str = "paired",
    number: int = 0,
    *,
    failed: int | None = None,
    undefined: int | None = None,
    maps: bool = True,
) -> tuple[Shard, dict[str, bytes]]:
    """A shard of a plan, which depends on the arguments alone, and bytes to stand for its images.

    Args:
        plan: From `make_plan`.
        setting: Name of the setting.
        number: Which shard of it.
        failed: Place in the shard of a sample that failed.
        undefined: Place of a sample whose last score is undefined.
        maps: Whether maps are kept: 2 time groups, 3 heads, 4 x 3 and 2 x 2 elements.
    """
    size, pairs = plan["settings"]["shard"], plan["data"]["pairs"][setting]
    index = torch.arange(number * size, min(number * size + size, len(pairs)))
    ids = tuple(pairs[position][0] for position in index.tolist())
    generator = torch.Generator().manual_seed(zlib.crc32(f"{setting} {number}".encode()))
    status = torch.zeros(len(ids), dtype=torch.uint8)
    scores = torch.rand(len(ids), len(IMACS_NAMES), dtype=torch.float64, generator=generator)
    kept, reasons = {}, {}
    for name, grid in (("r2g_uniform", (4, 3)), ("g2r_uniform", (2, 2))) if maps else ():
        kept[name] = torch.rand(len(ids), 2, 3, *grid, generator=generator).half()
        kept[f"{name}_scale"] = torch.rand(len(ids), 2, 3, generator=generator)
    if failed is not None:
        status[failed], scores[failed] = FAILED, torch.nan
        reasons[ids[failed]] = {SAMPLE: Reason("nonfinite_map", "NaN in layer up.0")}
        for tensor in kept.values():
            tensor[failed] = 0
    if undefined is not None:
        scores[undefined, -1] = torch.nan
        reason = Reason("degenerate_map", "its map is the same everywhere")
        reasons[ids[undefined]] = {IMACS_NAMES[-1]: reason}
    present = [id for id in ids if SAMPLE not in reasons.get(id, {})]
    images = {id: f"PNG of {setting} {id}".encode() for id in present}
    shard = Shard(
        setting=setting,
        number=number,
        fingerprint=plan["fingerprint"],
        ids=ids,
        score_names=IMACS_NAMES,
        index=index,
        status=status,
        scores=scores,
        maps=kept,
        reasons=reasons,
        batches=(tuple(index.tolist()),),
        images={id: zlib.crc32(data) for id, data in images.items()},
    )
    return shard, images
