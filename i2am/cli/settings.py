"""What ``i2am record`` was asked to do, and the checks that need no model."""

import logging
import math
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from i2am.cli.errors import InputRejected

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("i2am")

AUTO = Path("auto")
"""A reference mask that is made of the reference; a file of that name has to come with a folder."""

MADE = "reference_mask.png"
"""Its file in the output folder."""

FILES = (
    "person",
    "mask",
    "reference",
    "pose",
    "agnostic",
    "warped",
    "warped_mask",
    "reference_mask",
)
"""Fields that name an input file in `Settings` and hold the image in `Inputs`."""


@dataclass(frozen=True)
class NamedBox:
    """A named rectangle of the person image, in pixels."""

    name: str
    top: int
    left: int
    height: int
    width: int
    truth: tuple[float, float] | None = None
    """Where it should look, where that is known: fractions of the reference's height and width."""

    def __str__(self) -> str:
        return f"{self.name}={self.top},{self.left},{self.height},{self.width}"


@dataclass(frozen=True)
class Settings:
    """One recording; the defaults are those of the command line.

    Steps and guidance that are None are the named sampler's, or else the model's own; a
    `paste_back` that is None is the model's own.

    Raises:
        ValueError: Two regions of one name, the unconditional half without guidance, one file of a
            warp network without the other, or a guidance that is not finite.
    """

    model: str
    person: Path
    mask: Path
    reference: Path
    pose: Path | None = None
    agnostic: Path | None = None
    warped: Path | None = None
    warped_mask: Path | None = None
    reference_mask: Path | None = None
    out: Path = Path("i2am-out")
    sampler: Literal["paper", "official"] | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    time_groups: int = 5
    regions: tuple[NamedBox, ...] = ()
    preset: Literal["paper", "official"] = "paper"
    guidance_branch: Literal["conditional", "unconditional", "both"] = "conditional"
    size: tuple[int, int] | None = None
    paste_back: bool | None = None
    report: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        names = [box.name for box in self.regions]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"region names must differ, got {name} twice")
        low = self.guidance is not None and self.guidance <= 1
        if low and self.guidance_branch != "conditional":
            raise ValueError(
                f"guidance-branch {self.guidance_branch} needs a guidance above 1, "
                f"got {self.guidance:g}"
            )
        if (self.warped is None) != (self.warped_mask is None):
            given, missing = ("warped", "warped-mask")[:: 1 if self.warped else -1]
            raise ValueError(f"{given} needs {missing}, the other file of the warp network")


@dataclass(frozen=True)
class Inputs:
    """The files of a recording, read and checked."""

    person: "Image"
    mask: "Image"
    reference: "Image"
    pose: "Image | None" = None
    agnostic: "Image | None" = None
    warped: "Image | None" = None
    warped_mask: "Image | None" = None
    reference_mask: "Image | None" = None
    sha256: dict[str, str] = field(default_factory=dict)
    """Of the bytes of each file, by the name of its field."""


def png(image: "Image") -> bytes:
    """The PNG file of an image."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def read_inputs(settings: Settings) -> Inputs:
    """Read every input file; warns of a mask that looks like a picture.

    Raises:
        InputRejected: A file is no usable image or mask; a mask, the pose or the agnostic image
            has another size than its image; or a region leaves the person image.
    """
    from i2am.data.images import (
        ImageRejected,
        looks_like_mask,
        read_bytes,
        read_image,
        read_mask,
    )
    from i2am.data.objects import read_object_mask

    digests: dict[str, str] = {}

    def load(name: str, path: Path) -> bytes:
        content = read_bytes(path, name=name.replace("_", "-"))
        digests[name] = sha256(content).hexdigest()
        return content

    def read(name: str, path: Path) -> "Image":
        return read_image(path, name=name, content=load(name, path))

    def mask_of(image: "Image", name: str, path: Path) -> "Image":
        option, content = name.replace("_", "-"), load(name, path)
        mask = read_mask(path, name=option, size=image.size, content=content)
        if not looks_like_mask(path, content=content):
            log.warning(
                "%s %s looks like a picture rather than a mask: its pixels of half brightness and "
                "more count as white",
                option,
                path,
            )
        return mask

    try:
        person = read("person", settings.person)
        mask = mask_of(person, "mask", settings.mask)
        content = load("reference", settings.reference)
        reference = read_image(settings.reference, name="reference", content=content)
        pose = settings.pose and read("pose", settings.pose)
        agnostic = settings.agnostic and read("agnostic", settings.agnostic)
        warped = settings.warped and read("warped", settings.warped)
        warped_mask = (
            warped and settings.warped_mask and mask_of(warped, "warped_mask", settings.warped_mask)
        )
        reference_mask = None
        if settings.reference_mask == AUTO:
            reference_mask, source = read_object_mask(
                settings.reference, name="reference", content=content
            )
            digests["reference_mask"] = sha256(png(reference_mask)).hexdigest()
            log.warning("the reference mask was made from %s; look at %s", source, MADE)
        elif settings.reference_mask is not None:
            reference_mask = mask_of(reference, "reference_mask", settings.reference_mask)
    except ImageRejected as error:
        raise InputRejected(str(error)) from error
    for name, image in (("pose", pose), ("agnostic", agnostic)):
        if image and image.size != person.size:
            raise InputRejected(
                f"{name} {getattr(settings, name)} must be {person.width} x {person.height} "
                f"pixels like the person, got {image.width} x {image.height}"
            )
    for box in settings.regions:
        inside = box.top + box.height <= person.height and box.left + box.width <= person.width
        if not inside or not box.height or not box.width:
            raise InputRejected(
                f"region {box} must lie inside the person image, {person.width} pixels wide and "
                f"{person.height} high, and not be empty"
            )
    return Inputs(
        person=person,
        mask=mask,
        reference=reference,
        pose=pose or None,
        agnostic=agnostic or None,
        warped=warped or None,
        warped_mask=warped_mask or None,
        reference_mask=reference_mask,
        sha256=digests,
    )
