"""What `i2am evaluate` adds to generating images: recording, scoring, storing; and other paces.

    python benchmarks/evaluation.py [--pairs 32] [--batch 8] [--threads 2]

prints ratios, measured in turns in one process, so that both sides meet the same machine.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from i2am.data import write_viton_hd
from i2am.evaluation.engines import Share, open_jobs
from i2am.evaluation.opening import Opened, Sources, open_run
from i2am.evaluation.plan import seed_of
from i2am.evaluation.store import Store
from i2am.evaluation.worker import Worker


def bare(opened: Opened, positions: range) -> float:
    """Seconds to read a batch and make its images, with nothing recorded, scored or stored."""
    started = time.perf_counter()
    settings, data = opened.settings, opened.data["unpaired"]
    items = [data[position] for position in positions]
    images = {
        "agnostic": torch.stack([item["agnostic"] for item in items]),
        "pose": torch.stack([item["pose"] for item in items]),
        "reference": torch.stack([item["garment"] for item in items]),
    }
    opened.pipe(
        **opened.pipe.image_arguments(images),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=[
            torch.Generator().manual_seed(seed_of(settings.seed, data.pairs[position].id))
            for position in positions
        ],
        output_type="pt",
    )
    return time.perf_counter() - started


@click.command(help=__doc__)
@click.option("--pairs", type=click.IntRange(2), default=32, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--steps", type=click.IntRange(5), default=50, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(pairs: int, batch: int, steps: int, threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        write_viton_hd(data, train=0, test=pairs)
        options = {"batch": batch, "shard": batch, "steps": steps, "threads": threads}
        opened = open_run(
            Sources("pocket", data), {**options, "guidance": 2.0, "pairs": ("unpaired",)}
        )
        store = Store.create(out, opened.plan)
        worker = Worker(store, opened.pipe, opened.data, opened.settings)
        bare(opened, range(batch))
        ratios, plain = [], []
        for job in open_jobs(store, share=Share(0, 1, 0)):
            positions = store.positions(*job)
            if len(positions) < batch:
                break
            before = bare(opened, positions)
            started = time.perf_counter()
            worker.run(*job)
            whole = time.perf_counter() - started
            after = bare(opened, positions)
            plain.append((before + after) / 2)
            ratios.append(whole / plain[-1])
        result = {
            "batch": batch,
            "threads": threads,
            "steps": steps,
            "seconds_per_sample_bare": round(statistics.median(plain) / batch, 3),
            "ratio_median": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
