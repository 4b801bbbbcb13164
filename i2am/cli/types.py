"""What options accept, the same in all commands; whatever is else is a usage error."""

import math
import os
import re
from pathlib import Path
from typing import Any

import click

from i2am.cli.settings import NamedBox
from i2am.data.images import MAX_PIXELS

_REGION = re.compile(r"([A-Za-z0-9_-]{1,99})=(\d{1,9}),(\d{1,9}),(\d{1,9}),(\d{1,9})", re.ASCII)
_SIZE = re.compile(r"(\d{1,9})x(\d{1,9})", re.ASCII)
_BYTES = re.compile(r"(\d{1,12}(?:\.\d{1,12})?) ?([KMGT])(i)?B", re.ASCII | re.IGNORECASE)
_RESERVED = ("uniform", "mask")
MOST = 10**9
"""Of a count; what libraries take for one ends at 2**31."""
AT_ONCE = 1024
"""Of threads or processes; far more than these stop the machine."""


class PathType(click.Path):
    """A file or folder, which need not be there."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        text = os.fspath(value)
        if not text or "\0" in text:
            self.fail(f"a path must have characters and no NUL, got {text!r}.", param, ctx)
        return super().convert(value, param, ctx)


FILE = PathType(path_type=Path)
NAME = PathType(path_type=str)
"""A built-in name, or a folder."""


class NumberType(click.FloatRange):
    """A finite number in a range; NaN is in every range of click."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


def count(least: int = 1, most: int = MOST) -> click.IntRange:
    """Whole numbers from `least` on."""
    return click.IntRange(least, most)


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
        found = _SIZE.fullmatch(value)
        if found is None:
            self.fail(f"{value!r} must be HEIGHTxWIDTH in pixels, 512x384 for example.", param, ctx)
        height, width = int(found[1]), int(found[2])
        if not 0 < height * width <= MAX_PIXELS:
            most = f"{MAX_PIXELS // 10**6} megapixels"
            self.fail(f"{value!r} must be a pixel at least and {most} at most.", param, ctx)
        return height, width


class BytesType(click.ParamType):
    """``12GiB`` on the command line: a number of bytes with a unit."""

    name = "BYTES"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        found = _BYTES.fullmatch(value)
        if found is None:
            self.fail(
                f"{value!r} must be a number with a unit, 12GiB or 800MB for example.", param, ctx
            )
        number, prefix, binary = found.groups()
        power = " KMGT".index(prefix.upper())
        return int(float(number) * (1024 if binary else 1000) ** power)
