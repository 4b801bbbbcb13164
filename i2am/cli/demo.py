"""``i2am demo``: a recording of the built-in model on photographs that scikit-image ships."""

import json
import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import click

from i2am.cli.errors import ExitCode, InputRejected
from i2am.cli.settings import NamedBox, Settings

# cut to the pocket model's 3:4: (left, top, right, bottom)
PERSON, PERSON_CUT = "astronaut.png", (40, 0, 424, 512)
REFERENCE, REFERENCE_CUT = "coffee.png", (170, 0, 470, 400)
# the orange suit, and the cup: corners (x, y) in the cut pictures
SUIT = [(0, 262), (72, 206), (98, 258), (140, 284), (196, 292), (262, 258), (300, 284)]
SUIT += [(320, 330), (282, 352), (250, 404), (240, 460), (246, 511), (0, 511)]
CUP = [(4, 80), (30, 40), (80, 22), (140, 20), (200, 40), (238, 80), (240, 120), (214, 190)]
CUP += [(206, 250), (168, 284), (100, 280), (68, 300), (34, 300), (28, 262), (46, 238), (18, 170)]
REGIONS = (
    NamedBox("badge", 346, 92, 78, 78),
    NamedBox("collar", 226, 150, 56, 80),
    NamedBox("wall", 30, 270, 60, 60),
)

UNTRAINED = """\
The pocket model has random weights: nobody trained it yet. It paints the suit of the astronaut
after a cup of coffee; with random weights what it paints is noise, and its maps mean nothing. What
you can check is the recorder: overview.png shows every input and both maps, each on the image it
belongs to (R2G on the generated image, G2R on the reference); time_groups.png and heads.png split
the same maps by denoising step and by attention head; region_*.png ask where one red rectangle of
the generated image looks on the reference. Trained weights will give the same files a meaning."""

TRAINED = """\
The pocket model painted the suit of the astronaut after a cup of coffee. overview.png shows every
input and both maps, each on the image it belongs to (R2G on the generated image, G2R on the
reference); time_groups.png and heads.png split the same maps by denoising step and by attention
head; region_*.png ask where one red rectangle of the generated image looks on the reference. The
model was trained on drawn garments, so a photograph of a cup is far from what it has seen."""


@click.command(short_help="Record the built-in model on photographs that a package ships.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for the inputs and the result.",
)
@click.option("--steps", type=click.IntRange(5), default=Settings.steps, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo.")
@click.option("-v", "--verbose", is_flag=True, help="More messages; tracebacks of errors.")
def demo(out: Path, steps: int, overwrite: bool, verbose: bool) -> ExitCode:
    """Record the pocket model on photographs of an astronaut and a cup of coffee."""
    if verbose:
        logging.getLogger("i2am").setLevel(logging.DEBUG)
    from i2am.cli.folder import MANIFEST, fresh_folder
    from i2am.cli.recording import full_record

    with fresh_folder(out, overwrite=overwrite) as folder:
        make_inputs(folder / "inputs")
        result = full_record(demo_settings(folder, steps=steps))
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
        # marks the folder as ours, so that the next demo may replace it
        (folder / MANIFEST).write_text(json.dumps({"files": files}), encoding="utf-8")
    result = replace(result, out=out / result.out.name)
    click.echo(f"{result}\n\n{TRAINED if result.trained else UNTRAINED}")
    return result.code


def make_inputs(folder: Path) -> None:
    """Write person.png, mask.png, reference.png and reference_mask.png into a new folder.

    Raises:
        InputRejected: scikit-image is not installed.
    """
    from PIL import Image, ImageDraw

    photographs = _photographs()
    person = Image.open(photographs / PERSON).convert("RGB").crop(PERSON_CUT)
    reference = Image.open(photographs / REFERENCE).convert("RGB").crop(REFERENCE_CUT)
    mask = Image.new("L", person.size, 0)
    ImageDraw.Draw(mask).polygon(SUIT, fill=255)
    reference_mask = Image.new("L", reference.size, 0)
    ImageDraw.Draw(reference_mask).polygon(CUP, fill=255)
    images = {
        "person.png": person,
        "mask.png": mask,
        "reference.png": reference,
        "reference_mask.png": reference_mask,
    }
    folder.mkdir()
    for name, image in images.items():
        image.save(folder / name)


def demo_settings(folder: Path, *, steps: int) -> Settings:
    """The recording of the demo, as ``i2am record`` would be asked for it."""
    inputs = folder / "inputs"
    return Settings(
        model="pocket",
        person=inputs / "person.png",
        mask=inputs / "mask.png",
        reference=inputs / "reference.png",
        reference_mask=inputs / "reference_mask.png",
        out=folder / "pocket",
        steps=steps,
        regions=REGIONS,
    )


def _photographs() -> Path:
    # its data folder is read as files: importing skimage.data could try to download
    found = find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise InputRejected(
            'the demo uses photographs of scikit-image: install it with pip install "i2am[demo]"'
        )
    return Path(found.submodule_search_locations[0]) / "data"
