"""What ``i2am record`` was asked to do, and the checks that need no model."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from i2am.cli.errors import InputRejected

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_REGION = re.compile(r"([A-Za-z0-9_-]+)=(\d+),(\d+),(\d+),(\d+)")
_RESERVED = ("uniform", "mask")


@dataclass(frozen=True)
class Box:
    """A named rectangle of the person image, in pixels."""

    name: str
    top: int
    left: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.name}={self.top},{self.left},{self.height},{self.width}"


class BoxType(click.ParamType):
    """``NAME=top,left,height,width`` on the command line."""

    name = "NAME=top,left,height,width"

    def convert(
        self, value: str | Box, param: click.Parameter | None, ctx: click.Context | None
    ) -> Box:
        if isinstance(value, Box):
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
        return Box(found[1], *map(int, found.groups()[1:]))


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
    """One recording."""

    model: str
    person: Path
    mask: Path
    reference: Path
    pose: Path | None
    reference_mask: Path | None
    out: Path
    steps: int
    guidance: float
    seed: int
    time_groups: int
    regions: tuple[Box, ...]
    preset: Literal["paper", "official"]
    guidance_branch: Literal["conditional", "unconditional", "both"]
    size: tuple[int, int] | None
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["float32", "float16", "bfloat16"]
    overwrite: bool

    def check(self) -> None:
        """Refuse numbers that contradict each other.

        Raises:
            InputRejected: Fewer steps than time groups, two regions of one name, the
                unconditional half without guidance, or a guidance that is not finite.
        """
        if not math.isfinite(self.guidance):
            raise InputRejected(f"guidance must be a finite number, got {self.guidance}")
        if self.steps < self.time_groups:
            raise InputRejected(
                f"steps must be at least the {self.time_groups} time groups, got {self.steps}"
            )
        names = [box.name for box in self.regions]
        for name in names:
            if names.count(name) > 1:
                raise InputRejected(f"region names must differ, got {name} twice")
        if self.guidance <= 1 and self.guidance_branch != "conditional":
            raise InputRejected(
                f"guidance-branch {self.guidance_branch} needs a guidance above 1, "
                f"got {self.guidance:g}"
            )


@dataclass(frozen=True)
class Inputs:
    """The files of a recording, read and checked."""

    person: "Image"
    mask: "Image"
    reference: "Image"
    pose: "Image | None"
    reference_mask: "Image | None"


def read_inputs(settings: Settings) -> Inputs:
    """Read every input file.

    Raises:
        InputRejected: A file is no usable image or mask, a mask or the pose has another size than
            its image, or a region leaves the person image.
    """
    from i2am.data.images import ImageRejected, read_image, read_mask

    try:
        person = read_image(settings.person, name="person")
        mask = read_mask(settings.mask, name="mask", size=person.size)
        reference = read_image(settings.reference, name="reference")
        pose = settings.pose and read_image(settings.pose, name="pose")
        reference_mask = settings.reference_mask and read_mask(
            settings.reference_mask, name="reference-mask", size=reference.size
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
    return Inputs(person, mask, reference, pose or None, reference_mask or None)


def mask_weights(mask: "Image") -> "Tensor":
    """A mask of `read_mask` as fp32 ``[height, width]`` of 0 and 1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)


def box_weights(box: Box, person: "Image") -> "Tensor":
    """A box as fp32 ``[height, width]`` over the person: 1 inside, 0 outside."""
    import torch

    weights = torch.zeros(person.height, person.width)
    weights[box.top : box.top + box.height, box.left : box.left + box.width] = 1
    return weights
