"""What a notebook shows: maps as pictures, and the page in a frame."""

import base64
import html
import re
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from i2am.attribution import picture
from i2am.plots import heat
from i2am.testing import make_maps, make_site
from i2am.viewer import View, page


def pictures(text):
    found = re.findall(r"data:image/png;base64,([^\"]+)", text)
    return [np.asarray(Image.open(BytesIO(base64.b64decode(data)))) for data in found]


def test_maps_show_both_directions():
    maps = make_maps([make_site("up.attn2", (4, 3), (6, 5))], samples=2)
    text = maps._repr_html_()
    assert html.escape(repr(maps)) in text
    assert "<script" not in text
    shown = pictures(text)
    assert len(shown) == 4
    for sample in range(2):
        r2g = maps.reference_to_generated()[sample]
        g2r = maps.generated_to_reference()[sample]
        assert (shown[2 * sample] == heat(picture(r2g, (4, 3)).numpy())).all()
        assert (shown[2 * sample + 1] == heat(picture(g2r, (6, 5)).numpy())).all()


def test_only_what_was_recorded_is_shown():
    maps = make_maps([make_site("up.attn2", (4, 3), None)], samples=6)
    text = maps._repr_html_()
    assert len(pictures(text)) == 4
    assert "G2R" not in text
    assert "and 2 more samples<" in text
    assert "and 1 more sample<" in maps.select(samples=slice(5))._repr_html_()


def test_a_view_is_the_page_in_a_frame():
    maps = make_maps([make_site("up.attn2", (4, 3), (6, 5))], samples=1)
    images = {
        "generated": Image.new("RGB", (6, 8), "red"),
        "reference": Image.new("RGB", (10, 12), "blue"),
    }
    view = View(maps, height=300, **images)
    assert view.page == page(maps, **images)
    shown = view._repr_html_()
    assert shown.startswith("<iframe sandbox=")
    assert "height: 300px" in shown
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', shown)[1]) == view.page


def test_a_view_refuses_what_the_page_refuses():
    maps = make_maps([make_site("up.attn2", (4, 3), (6, 5))], samples=1)
    maps.layer_sums[0].reference_to_generated[:] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        View(maps, generated=Image.new("RGB", (6, 8)), reference=Image.new("RGB", (6, 8)))


@pytest.mark.parametrize(
    ("kind", "titles"),
    [
        (
            "two references",
            [
                "R2G: share of attention to the object of reference 1",
                "G2R: all generated patches on reference 1",
                "R2G: share of attention to the object of reference 2",
                "G2R: all generated patches on reference 2",
            ],
        ),
        (
            "words",
            ['R2G: share of attention to "cat"', 'R2G: share of attention to "hat"'],
        ),
        (
            "reference and words",
            [
                "R2G: share of attention to the object",
                "G2R: all generated patches",
                'R2G: share of attention to "cat"',
                'R2G: share of attention to "hat"',
            ],
        ),
        (
            "frames",
            [
                "R2G: share of attention to the object, mean over 3 frames",
                "G2R: all generated patches, mean over 3 frames",
            ],
        ),
        *[
            (kind, ["R2G: share of attention to the object", "G2R: all generated patches"])
            for kind in ("head counts", "gridless", "resized")
        ],
    ],
)
def test_every_source_is_shown(record, kind, titles):
    text = record(kind)._repr_html_()
    found = re.findall("<figcaption[^>]*>(.*?)</figcaption>", text)
    assert [html.unescape(title) for title in found] == titles
    assert len(pictures(text)) == len(titles)
