"""What ``i2am record`` was asked to do, and the checks that need no model."""

import math
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from i2am.cli.errors import InputRejected

if TYPE_CHECKING:
    from PIL.Image import Image

_REGION = re.compile(r"([A-Za-z0-9_-]+)=(\d+),(\d+),(\d+),(\d+)")
_RESERVED = ("uniform", "mask")


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


class BoxType(click.ParamType):
    """``NAME=top,left,height,width`` on the command line."""

    name = "NAME=top,left,height,width"

    def convert(
        self, value: str | NamedBox, param: click.Parameter | None, ctx: click.Context | None
    ) -> NamedBox:
        if isinstance(value, NamedBox):
            return value
        found = _REGION.fullmatch(value)
        if found is None:
            self.fail(
                f"{value!r} must be NAME=top,left,height,width in whole pixels, the name of "
                "letters, digits, _ and -.",
                param,
                ctx,
            )
        if found[1] in _RESERVED:
            self.fail(f"the name {found[1]!r} is taken by maps of its own.", param, ctx)
        top, left, height, width = map(int, found.groups()[1:])
        return NamedBox(found[1], top, left, height, width)


class SizeType(click.ParamType):
    """``HEIGHTxWIDTH`` on the command line."""

    name = "HEIGHTxWIDTH"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        height, cross, width = value.partition("x")
        if not (cross and height.isdecimal() and width.isdecimal()):
            self.fail(f"{value!r} must be HEIGHTxWIDTH in pixels, 512x384 for example.", param, ctx)
        return int(height), int(width)


@dataclass(frozen=True)
class Settings:
    """One recording; the defaults are those of the command line.

    Raises:
        ValueError: Fewer steps than time groups, two regions of one name, the unconditional half
            without guidance, or a guidance that is not finite.
    """

    model: str
    person: Path
    mask: Path
    reference: Path
    pose: Path | None = None
    reference_mask: Path | None = None
    out: Path = Path("i2am-out")
    steps: int = 50
    guidance: float = 5.0
    seed: int = 0
    time_groups: int = 5
    regions: tuple[NamedBox, ...] = ()
    preset: Literal["paper", "official"] = "paper"
    guidance_branch: Literal["conditional", "unconditional", "both"] = "conditional"
    size: tuple[int, int] | None = None
    paste_back: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        if self.steps < self.time_groups:
            raise ValueError(
                f"steps must be at least the {self.time_groups} time groups, got {self.steps}"
            )
        names = [box.name for box in self.regions]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"region names must differ, got {name} twice")
        if self.guidance <= 1 and self.guidance_branch != "conditional":
            raise ValueError(
                f"guidance-branch {self.guidance_branch} needs a guidance above 1, "
                f"got {self.guidance:g}"
            )


@dataclass(frozen=True)
class Inputs:
    """The files of a recording, read and checked."""

    person: "Image"
    mask: "Image"
    reference: "Image"
    pose: "Image | None" = None
    reference_mask: "Image | None" = None
    sha256: dict[str, str] = field(default_factory=dict)
    """Of the bytes of each file, by the name of its field."""


def read_inputs(settings: Settings) -> Inputs:
    """Read every input file.

    Raises:
        InputRejected: A file is no usable image or mask, a mask or the pose has another size than
            its image, or a region leaves the person image.
    """
    from i2am.data.images import ImageRejected, read_bytes, read_image, read_mask

    digests: dict[str, str] = {}

    def load(name: str, path: Path) -> bytes:
        content = read_bytes(path, name=name.replace("_", "-"))
        digests[name] = sha256(content).hexdigest()
        return content

    def read(name: str, path: Path) -> "Image":
        return read_image(path, name=name, content=load(name, path))

    def mask_of(image: "Image", name: str, path: Path) -> "Image":
        option, content = name.replace("_", "-"), load(name, path)
        return read_mask(path, name=option, size=image.size, content=content)

    try:
        person = read("person", settings.person)
        mask = mask_of(person, "mask", settings.mask)
        reference = read("reference", settings.reference)
        pose = settings.pose and read("pose", settings.pose)
        reference_mask = settings.reference_mask and mask_of(
            reference, "reference_mask", settings.reference_mask
        )
    except ImageRejected as error:
        raise InputRejected(str(error)) from error
    if pose and pose.size != person.size:
        raise InputRejected(
            f"pose {settings.pose} must be {person.width} x {person.height} pixels like the "
            f"person, got {pose.width} x {pose.height}"
        )
    for box in settings.regions:
        inside = box.top + box.height <= person.height and box.left + box.width <= person.width
        if not inside or not box.height or not box.width:
            raise InputRejected(
                f"region {box} must lie inside the person image, {person.width} pixels wide and "
                f"{person.height} high, and not be empty"
            )
    return Inputs(person, mask, reference, pose or None, reference_mask or None, digests)
