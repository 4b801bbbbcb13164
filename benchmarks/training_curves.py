"""Loss and metric curves of an `i2am train` run as one small picture.

    python benchmarks/training_curves.py runs/pocket docs/pocket_training.png

Needs matplotlib, the extra ``plots``.
"""

from pathlib import Path
from typing import Any

import click

from i2am.files import parse_json, read_bytes

LINES = 10
"""Log lines that are averaged to one point of a loss curve."""

# title, stage, {what is logged: what to call it}
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("autoencoder: loss", "autoencoder", {"loss": "training"}),
    (
        "autoencoder: PSNR in dB, 32 held-out scenes",
        "autoencoder",
        {"psnr_image": "person", "psnr_agnostic": "agnostic", "psnr_pose": "pose"},
    ),
    ("denoiser: loss", "denoiser", {"loss": "training"}),
    (
        "squared error of the latents in the mask, from t = 900",
        "denoiser",
        {"x0_error": "its own garment", "x0_error_wrong": "another garment"},
    ),
    (
        "L1 on the shirt, 8 held-out scenes, 10 steps",
        "denoiser",
        {"l1_shirt": "generated", "l1_mean_colour": "mean garment colour"},
    ),
    ("PCK@10 of the same scenes, all layers", "denoiser", {"pck10": "peak"}),
)


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
def main(run: Path, picture: Path) -> None:
    """Draw the curves of the training in RUN into PICTURE."""
    from matplotlib.figure import Figure

    logs = {stage: read_log(run / stage / "log.jsonl") for stage in ("autoencoder", "denoiser")}
    figure = Figure(figsize=(10, 5), dpi=90, layout="constrained")
    for axes, (title, stage, names) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name, label in names.items():
            steps, values = curve(logs[stage], name)
            axes.plot(steps, values, label=label, linewidth=1.2, marker="." * (len(steps) < 50))
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("step", fontsize=7)
        axes.grid(alpha=0.3)
        if "loss" in names:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    figure.savefig(picture)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of one stage, in order."""
    return [parse_json(line, str(path)) for line in read_bytes(path).splitlines()]


def curve(log: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number; a loss is averaged over `LINES` lines, it is noisy."""
    lines = [line for line in log if name in line]
    if name != "loss":
        return [line["step"] for line in lines], [line[name] for line in lines]
    groups = [lines[start : start + LINES] for start in range(0, len(lines), LINES)]
    return (
        [group[-1]["step"] for group in groups],
        [sum(line[name] for line in group) / len(group) for group in groups],
    )


if __name__ == "__main__":
    main()
