"""Does attribution point to the right place? Scored on drawn try-on scenes, where truth is known.

    python benchmarks/attribution_accuracy.py
    python benchmarks/attribution_accuracy.py --weights out/pocket.safetensors --scenes 32

For every cell of the shirt in held-out scenes, the peak and the centroid of its specific-reference
map are compared with the place of the garment that the cell really shows. The trained pocket model
stands beside its untrained twin and beside guesses that never look at attention. Writes one JSON
file and prints Markdown.
"""

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from accuracy.evaluating import without_a_model
from accuracy.scoring import score
from accuracy.tables import tables

from i2am.files import sha256_of_file, write
from i2am.models import POCKET, pocket_pipeline, pocket_weights
from i2am.models.custom import CustomPipeline

SPLIT = "test"
RESULT = Path(__file__).parent / "results" / "pocket_accuracy.json"
COUNT, SEVERAL = click.IntRange(1), click.IntRange(2)
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings={"show_default": True})
@click.option("--weights", type=FILE, help="Instead of the package's.", show_default=False)
@click.option("--scenes", type=SEVERAL, default=256, help="That are scored.")
@click.option("--selection-scenes", type=COUNT, default=64, help="That choose the best layer.")
@click.option("--swap-scenes", type=SEVERAL, default=64, help="Made with another's garment too.")
@click.option("--paint-scenes", type=SEVERAL, default=48, help="Of the paint test.")
@click.option("--steps", type=click.IntRange(5), default=50, help="Denoising steps.")
@click.option("--paint-steps", type=click.IntRange(5), default=15, help="Those of the paint test.")
@click.option("--guidance-scale", type=click.FloatRange(0), default=2.0)
@click.option("--batch", type=COUNT, default=16, help="Scenes at a time.")
@click.option("--skip-untrained", is_flag=True, help="Only the trained model.")
@click.option("--seed", default=0, help="Of the untrained twin's weights.")
@click.option("--threads", type=COUNT, help="Of torch.", show_default=False)
@click.option("-o", "--out", type=FILE, default=RESULT, help="The JSON file.", show_default=False)
def main(weights: Path | None, out: Path, threads: int | None, **settings: Any) -> None:
    """Score the attribution of the pocket model on drawn scenes, where truth is known."""
    weights = weights or pocket_weights()
    if weights is None:
        raise click.UsageError("--weights must name a file: the package has no trained weights")
    # refused now, not after half an hour
    for path in (weights, out.parent):
        if not path.exists():
            raise click.UsageError(f"{path} does not exist")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        trained = pocket_pipeline(weights=weights)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    result = run(trained, weights, **settings)
    write(out, (json.dumps(result, indent=1) + "\n").encode())
    click.echo(tables(result))


def run(
    trained: CustomPipeline, weights: Path, *, seed: int, skip_untrained: bool, **settings: Any
) -> dict[str, Any]:
    """Everything that is measured, as JSON values; `settings` are those of `score`."""
    models = {"trained": trained}
    if not skip_untrained:
        models["untrained"] = POCKET.build(seed)
    settings["split"] = SPLIT
    scored = [*range(settings["scenes"])]
    return {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("i2am", "torch", "diffusers")},
        "commit": _commit(),
        "weights": {
            "name": weights.name,
            "sha256": sha256_of_file(weights),
        },
        "settings": {**settings, "seed": seed},
        **without_a_model(scored, split=SPLIT, batch=settings["batch"]),
        "models": {name: score(pipe, name, **settings) for name, pipe in models.items()},
    }


def _commit() -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return commit.stdout.strip()


if __name__ == "__main__":
    main()
