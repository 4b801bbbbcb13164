"""``i2am demo``: the built-in model dresses drawn people that it has never seen."""

import logging
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from i2am.cli import flags
from i2am.cli.errors import ExitCode
from i2am.cli.output import echo
from i2am.cli.settings import NamedBox, Settings
from i2am.cli.types import FILE, count

if TYPE_CHECKING:
    from torch import Tensor

    from i2am.cli.result import Result
    from i2am.data.paper_doll import Scenes

log = logging.getLogger("i2am")

# (person, garment): held-out scenes; each person is drawn in a garment of its own, so that nothing
# of the wanted one can be seen in the inputs
PAIRS = ((0, 101), (2, 107), (11, 118))
GUIDANCE = 2.0
# one token of the finest recorded layer, in pixels
PATCH = 8
PATCHES = {
    "logo": "logo",
    "logo_beside": "logo",
    "left_sleeve": "left sleeve",
    "right_sleeve": "right sleeve",
}

WHAT_TO_SEE = """\
Open report.html in a browser: point at a patch of the shirt and see where on the garment it looked,
point at the garment and see where it went. In overview.png each row is a drawn person who wears a
garment, another garment, and the person in that garment: as the model painted it, and as it should
be. R2G lies on the generated image: the parts that the garment drove. Its share says how much of
the attention of each patch goes to the garment; then, as the paper has it, where every token of the
reference would go, the empty ground around the garment included, and where the garment's alone. G2R
lies on the garment: the parts that were used. In scene_*/region_*.png a red patch of the result
asks where on the garment it looked; the ring is the true place, known because the scenes are drawn:
the bright spot should lie in it. time_groups.png and heads.png split the same maps by denoising
step and by attention head.
IMACS scores attention inside the masks minus three times attention outside (at most 1): IMACS_r of
the garment should be positive, while IMACS_g with uniform votes is low even for a good model,
because the garment's empty ground votes too; that of the share should be high."""

UNTRAINED = """\
The pocket model has random weights here: what it paints is noise, and its maps mean nothing."""


@click.command(short_help="Record the built-in model on drawn people and garments.")
@click.option(
    "-o",
    "--out",
    type=FILE,
    default=Path("demo"),
    show_default=True,
    help="Folder for the inputs and the results.",
)
@click.option("--steps", type=count(), default=Settings.steps, show_default=True)
@flags.overwrite
@flags.verbose
def demo(out: Path, steps: int, overwrite: bool, verbose: bool) -> ExitCode:
    """Record the pocket model on drawn people and garments with known correspondence."""
    if verbose:
        log.setLevel(logging.DEBUG)
    log.info("drawing people and garments, and loading the pocket model")
    from i2am.cli.recording import full_record
    from i2am.cli.reporting import recorded_samples
    from i2am.cli.result import REPORT
    from i2am.files import MANIFEST, canonical, fresh_folder
    from i2am.viewer import write_report

    with fresh_folder(out, overwrite=overwrite) as folder:
        results = []
        for number, pair in enumerate(PAIRS, 1):
            name = f"scene_{number}"
            regions = make_inputs(folder / "inputs" / name, *pair)
            results.append(full_record(demo_settings(folder, name, regions, steps=steps)))
        draw_overview(folder, results)
        pages = [recorded_samples(result.out, result.out.name) for result in results]
        write_report(folder / REPORT, chain.from_iterable(pages), title="i2am demo")
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
        # marks the folder as ours, so that the next demo may replace it
        (folder / MANIFEST).write_bytes(canonical({"files": files}))
    for result in results:
        echo(*replace(result, out=out / result.out.name).lines, "")
    echo(str(out / "overview.png"), str(out / REPORT), "", *WHAT_TO_SEE.splitlines())
    if not all(result.trained for result in results):
        echo("", *UNTRAINED.splitlines())
    return max(result.code for result in results)


def make_inputs(folder: Path, person: int, garment: int) -> tuple[NamedBox, ...]:
    """Write the inputs of one scene as PNG files into a new folder, and what should come out.

    Args:
        folder: Gets person, mask, pose, reference, reference_mask and truth.
        person: Index of the held-out scene whose person is dressed.
        garment: Index of the one whose garment is put on.

    Returns:
        The patches to ask about.
    """
    from i2am.data.paper_doll import render

    before = render([person], split="test")
    after = render([person], split="test", garments=[garment])
    images = {
        "person": before.image[0],
        "mask": before.mask[0],
        "pose": before.pose[0],
        "reference": after.garment[0],
        "reference_mask": after.garment_mask[0],
        "truth": after.image[0],
    }
    folder.mkdir(parents=True)
    for name, pixels in images.items():
        _save(pixels, folder / f"{name}.png")
    return pick_patches(after)


def pick_patches(scene: "Scenes") -> tuple[NamedBox, ...]:
    """Two patches of the logo and one of each sleeve, with their true places on the reference.

    Args:
        scene: A batch of one.
    """
    import torch.nn.functional as F

    from i2am.data.paper_doll import PARTS

    chosen: dict[str, tuple[int, int]] = {}
    for name, part in PATCHES.items():
        visible = (scene.parts == PARTS.index(part)).float()
        share = F.avg_pool2d(visible[:, None], PATCH)[0, 0]
        for row, column in chosen.values():
            share[row, column] = 0
        row, column = divmod(int(share.argmax()), share.shape[1])
        if share[row, column] > 0:
            chosen[name] = (row, column)
    boxes = []
    for name, (row, column) in chosen.items():
        top, left = row * PATCH, column * PATCH
        flow = scene.flow[0, :, top : top + PATCH, left : left + PATCH].flatten(1)
        down, across = flow.nanmean(dim=1).tolist()
        boxes.append(NamedBox(name, top, left, PATCH, PATCH, truth=(down, across)))
    return tuple(boxes)


def demo_settings(
    folder: Path, name: str, regions: tuple[NamedBox, ...], *, steps: int
) -> Settings:
    """The recording of one scene, as ``i2am record`` would be asked for it."""
    inputs = folder / "inputs" / name
    return Settings(
        model="pocket",
        person=inputs / "person.png",
        mask=inputs / "mask.png",
        pose=inputs / "pose.png",
        reference=inputs / "reference.png",
        reference_mask=inputs / "reference_mask.png",
        out=folder / name,
        steps=steps,
        guidance=GUIDANCE,
        paste_back=True,
        regions=regions,
    )


def draw_overview(folder: Path, results: "list[Result]") -> None:
    """Write overview.png: a row per scene, from the files that are there."""
    import numpy as np
    from PIL import Image

    from i2am.plots import contact_sheet

    tiles, titles = [], []
    for result in results:
        inputs = folder / "inputs" / result.out.name
        for title, path in {
            "person": inputs / "person.png",
            "reference": inputs / "reference.png",
            "generated": result.out / "image.png",
            "truth": inputs / "truth.png",
            "R2G: share of attention to the garment": result.out / "overlay_share.png",
            "R2G: every reference token votes": result.out / "overlay_r2g.png",
            "R2G: only the garment votes": result.out / "overlay_r2g_mask_votes.png",
            "G2R: patches in the mask": result.out / "overlay_g2r_mask.png",
        }.items():
            picture = Image.open(path).convert("RGB")
            enlarged = picture.resize(
                (2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC
            )
            tiles.append(np.asarray(enlarged))
            titles.append(title)
    heading = (
        "Pocket model, held-out scenes. Maps have their own scales; values up to 0.4 are left out."
    )
    sheet = contact_sheet(tiles, titles, columns=len(tiles) // len(results), heading=heading)
    Image.fromarray(sheet).save(folder / "overview.png")


def _save(pixels: "Tensor", path: Path) -> None:
    from PIL import Image

    levels = (pixels * 255).round().byte()
    array = levels.permute(1, 2, 0) if levels.ndim == 3 else levels
    Image.fromarray(array.contiguous().numpy()).save(path)
