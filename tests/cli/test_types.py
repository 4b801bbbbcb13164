"""What options accept: every option of every command, with values that nobody foresaw."""

import math

import click
import pytest

from i2am.cli import types
from i2am.cli.app import app
from i2am.cli.errors import ExitCode
from i2am.cli.types import BytesType, NumberType, PathType, SizeType
from i2am.data.images import MAX_PIXELS

OPTIONS = {
    f"{name} {parameter.name}": (name, command, parameter)
    for name, command in app.commands.items()
    for parameter in command.params
}


def of(kind):
    return [case for case, (_, _, parameter) in OPTIONS.items() if isinstance(parameter.type, kind)]


def line(name, command, parameter, value):
    """A command line that is whole, with a value for one parameter."""
    words = [name]
    for other in command.params:
        if other is parameter or not other.required:
            continue
        choices = getattr(other.type, "choices", ["absent"])
        words += [choices[0]] if isinstance(other, click.Argument) else [other.opts[0], choices[0]]
    if isinstance(parameter, click.Argument):
        return [*words, "--", value]
    long = max(parameter.opts, key=len)
    return [*words, f"{long}={value}"]


@pytest.fixture
def refused(run_here, tmp_path, monkeypatch):
    """Runs a command line that is a usage error, and returns the sentence."""
    monkeypatch.chdir(tmp_path)

    def run(case, value):
        name, command, parameter = OPTIONS[case]
        done = run_here(line(name, command, parameter, value))
        assert done.code == ExitCode.USAGE, done.err
        assert done.out == ""
        (sentence,) = done.err.splitlines()
        named = parameter.get_error_hint(click.Context(command))
        assert sentence.startswith(f"error: Invalid value for {named}: ")
        assert sentence.endswith(f"See 'i2am {name} --help'.")
        assert not any(tmp_path.iterdir())
        return sentence

    return run


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "-nan", "Infinity"])
@pytest.mark.parametrize("case", of(click.types.FloatParamType))
def test_floats_are_finite(case, value, refused):
    assert isinstance(OPTIONS[case][2].type, NumberType)
    sentence = refused(case, value)
    assert "is not a finite number" in sentence or "is not in the range" in sentence


@pytest.mark.parametrize("value", ["1e300", "3e38", "1.5", "0", "-1e-3"])
def test_learning_rates_are_steps_that_a_weight_can_take(value, refused):
    """AdamW ends with an error of its own beyond what fp32 holds."""
    assert "is not in the range 0<x<=1" in refused("train learning_rate", value)


def test_every_float_is_found():
    assert {case.split()[0] for case in of(NumberType)} == {"record", "evaluate", "figure", "train"}


@pytest.mark.parametrize("value", ["9" * 13, "9" * 5000, "-1", "1e3", "0x10", "", " ", "\0"])
@pytest.mark.parametrize("case", of(click.types.IntParamType))
def test_counts_are_whole_and_have_an_end(case, value, refused):
    parameter = OPTIONS[case][2]
    if value == "9" * 13 and parameter.type.max >= 10**13:
        return  # a seed
    refused(case, value)


@pytest.mark.parametrize("value", ["", "a\0b"])
@pytest.mark.parametrize("case", of(click.Path))
def test_paths_have_characters_and_no_nul(case, value, refused):
    assert isinstance(OPTIONS[case][2].type, PathType)
    assert "a path must have characters and no NUL" in refused(case, value)


@pytest.mark.parametrize(
    "value",
    [
        *("0x0", "0x8", "8x0", "99999999999x9", "99999x99999", f"{'9' * 5000}x8", "-8x8", "8x-8"),
        *("8", "8x", "x8", "8x8x8", "8X8", "8 x 8", " 8x8", "8.0x8", "\u0668x\u0668", "²x²", ""),
    ],
)
@pytest.mark.parametrize("case", of(SizeType))
def test_sizes_hold_pixels_and_not_too_many(case, value, refused):
    assert "must be" in refused(case, value)


def test_the_largest_size_is_that_of_an_image_that_can_be_read():
    side = int(MAX_PIXELS**0.5)
    assert SizeType().convert(f"{side}x{side}", None, None) == (side, side)
    with pytest.raises(click.BadParameter, match="50 megapixels at most"):
        SizeType().convert(f"{side + 1}x{side + 1}", None, None)


@pytest.mark.parametrize(
    "value",
    [
        *("9" * 400 + "GiB", f"1.{'0' * 5000}GiB", "12", "GiB", "-1GB", "nanGB", "infGB", "1e3GB"),
        *("\u0661GB", "1.GB", "1,5GB", "", "1PB"),
    ],
)
@pytest.mark.parametrize("case", of(BytesType))
def test_bytes_have_a_unit_and_an_end(case, value, refused):
    assert "must be a number with a unit" in refused(case, value)


@pytest.mark.parametrize("value", [f"{'9' * 12}TiB", "0.5KB", "12GiB", "800MB"])
def test_bytes_of_any_unit_are_whole_numbers(value):
    assert isinstance(BytesType().convert(value, None, None), int)


@pytest.mark.parametrize(
    "value",
    ["a=1,2,3", "a=1,2,3,4,5", "a=-1,2,3,4", "a=\u0661,2,3,4", "=1,2,3,4", f"a={'9' * 5000},0,1,1"],
)
def test_regions_are_four_numbers(value, refused):
    assert "must be NAME=top,left,height,width" in refused("record regions", value)


@pytest.mark.parametrize("value", ["0.5", "5", "0", "1e-3"])
def test_numbers_in_their_range_stay(value):
    assert math.isclose(types.NumberType(0).convert(value, None, None), float(value))
