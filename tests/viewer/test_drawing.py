"""What lies on the canvas, against numpy: the page draws as i2am.plots.overlay does."""

import base64
import io
import json
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from i2am.attribution import picture
from i2am.plots import overlay
from i2am.viewer import render


def documents(html):
    """The samples in a page, their maps decoded by hand."""
    found = []
    for text in re.findall(r'<script type="application/json" class="sample">(.*?)</script>', html):
        sample = json.loads(text)
        data = {
            part: zlib.decompress(base64.b64decode(payload["base64"]), wbits=31)
            for part, payload in sample["payloads"].items()
        }
        sample["stacks"] = {
            entry["name"]: decoded(entry, data[entry["part"]]) for entry in sample["maps"]
        }
        found.append(sample)
    return found


def decoded(entry, data):
    """By slice, fp64 ``[queries, height, width]``."""
    slices, (height, width) = entry["slices"], entry["grid"]
    queries = entry["asked"][0] * entry["asked"][1]
    ranges = np.frombuffer(data, "<f4", 2 * len(slices) * queries, entry["offset"])
    low, span = ranges.reshape(2, len(slices), queries)
    start = entry["offset"] + ranges.nbytes
    codes = np.frombuffer(data, np.uint8, len(slices) * queries * height * width, start)
    codes = codes.reshape(queries, height, width, len(slices)).astype(np.float64)
    return {
        name: low[s, :, None, None] + span[s, :, None, None] * codes[..., s] / entry["levels"][s]
        for s, name in enumerate(slices)
    }


def photograph(sample, side):
    """The picture as the browser reads it."""
    shown = sample if side == "generated" else sample["sources"][0]
    data = base64.b64decode(shown[side]["src"].split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def expected(sample, side, values, *, threshold=0.4, opacity=0.85, **options):
    pixels = photograph(sample, side)
    unit = picture(torch.tensor(values), pixels.shape[:2], threshold=threshold, **options)
    return overlay(pixels, unit.numpy(), alpha=opacity)


def assert_same(drawn, wanted):
    """Within one level, but for the border of the threshold, where rounding decides."""
    assert drawn.shape == wanted.shape
    off = np.abs(drawn.astype(int) - wanted).max(-1) > 1
    assert off.mean() < 1e-5, f"{off.sum()} pixels differ"


@pytest.fixture(scope="module")
def sample(html):
    return documents(html)[0]


@pytest.mark.parametrize(
    ("threshold", "opacity"), [(0.4, 0.85), (0, 0.85), (0.7, 0.3), (0.4, 0), (0.4, 1)]
)
def test_overall_maps_are_drawn_as_overlay_does(view, sample, threshold, opacity):
    view.slide("threshold", threshold)
    view.slide("opacity", opacity)
    for side, name in (("generated", "r2g"), ("reference", "g2r")):
        values = sample["stacks"][name]["all"][0]
        wanted = expected(sample, side, values, threshold=threshold, opacity=opacity)
        assert_same(view.pixels(side), wanted)


@pytest.mark.parametrize(
    ("side", "other", "name", "cell", "query"),
    [
        ("generated", "reference", "pairs_g2r", (3, 2), 20),
        ("reference", "generated", "pairs_r2g", (5, 1), 26),
    ],
)
def test_the_map_of_a_patch_is_drawn_as_overlay_does(view, sample, side, other, name, cell, query):
    view.slide("time", 2)
    view.point(side, cell)
    values = sample["stacks"][name]["t1"][query]
    assert_same(view.pixels(other), expected(sample, other, values))
    # where it is asked there is the picture alone
    assert_same(view.pixels(side), photograph(sample, side))


def test_a_shared_range_is_drawn(view, sample):
    view.page.click("#ranges button[value=shared]")
    view.page.click("#heads button[value=h1]")
    maps = sample["stacks"]["r2g"]
    both = np.stack([maps["h0"][0], maps["h1"][0]])
    pixels = photograph(sample, "generated")
    unit = picture(torch.tensor(both), pixels.shape[:2], shared=True)[1]
    assert_same(view.pixels("generated"), overlay(pixels, unit.numpy(), alpha=0.85))


def test_codes_keep_ends_and_peaks(sample, recording):
    exact = recording.pairs.generated_to_reference()[0].flatten(0, 1).double().numpy()
    stored = sample["stacks"]["pairs_g2r"]["all"]
    span = np.ptp(exact, axis=(1, 2), keepdims=True)
    error = np.abs(stored - exact) / span
    assert (error <= 1 / 63 + 1e-6).all()
    # half a step but for what lies just below a peak
    assert np.quantile(error, 0.95) <= 0.5 / 63 + 1e-6
    assert (
        stored.reshape(len(stored), -1).argmax(1) == exact.reshape(len(exact), -1).argmax(1)
    ).all()
    assert ((stored == stored.max((1, 2), keepdims=True)).sum((1, 2)) == 1).all()


def test_a_preset_that_normalizes_twice_and_inverts_is_drawn(visit, make_sample):
    made = make_sample()
    inverted = [replace(source, invert=True) for source in made.sources]
    made = replace(made, normalizations=2, sources=inverted)
    html = render([made])
    view = visit(html).wait()
    (sample,) = documents(html)
    view.page.set_checked("#spread", True)
    values = sample["stacks"]["r2g"]["all"][0]
    wanted = expected(sample, "generated", values, preset="official", invert=True)
    assert_same(view.pixels("generated"), wanted)
    wanted = expected(sample, "reference", sample["stacks"]["g2r"]["all"][0], preset="official")
    assert_same(view.pixels("reference"), wanted)
    # the map of a patch is not that of a single token
    view.point("reference", (2, 2))
    values = sample["stacks"]["pairs_r2g"]["all"][12]
    assert_same(view.pixels("generated"), expected(sample, "generated", values, preset="official"))
    view.close()


def test_a_constant_map_is_drawn_as_nothing(visit, make_sample, make_recording):
    maps = make_recording()
    for layer in maps.layer_sums:
        layer.reference_to_generated.fill_(0.25)
    html = render([make_sample(maps=maps)])
    view = visit(html).wait()
    view.page.set_checked("#spread", True)
    (sample,) = documents(html)
    assert "(the same everywhere)" in view.page.locator(".subtitle").first.text_content()
    assert view.panel("generated")["flat"]
    zeros = overlay(photograph(sample, "generated"), np.zeros((640, 480)))
    assert_same(view.pixels("generated"), zeros)
    view.close()


def test_the_view_is_saved_as_a_picture(view, tmp_path):
    view.point("generated", (3, 2))
    view.page.mouse.down()
    view.page.mouse.up()
    with view.page.expect_download() as download:
        view.page.click("#save")
    assert download.value.suggested_filename == "one.png"
    download.value.save_as(tmp_path / "one.png")
    saved = Image.open(tmp_path / "one.png").convert("RGB")
    # two pictures, 360 and 400 wide of 480 high, twice as large
    assert saved.size == (2 * (24 + 360 + 24 + 400 + 24), 2 * (76 + 64 + 480 + 44 + 34))
    # the reference with the map on it lies where it says, as the canvas shows it
    left, top = 2 * (24 + 360 + 24), 2 * (76 + 64)
    shown = np.asarray(saved.crop((left, top, left + 800, top + 960)).resize((100, 120)), dtype=int)
    drawn = Image.fromarray(view.pixels("reference")).resize((100, 120))
    difference = np.abs(shown - np.asarray(drawn)).max(-1)
    # outline and peak are drawn on top
    assert (difference <= 12).mean() > 0.85
    assert (difference > 60).any()
