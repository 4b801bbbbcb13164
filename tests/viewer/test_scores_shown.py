"""Scores beside maps: of the map that is shown, or labelled with what they are of; in PNGs too."""

from dataclasses import replace

import pytest

from i2am.viewer import render

MINUS = "\N{MINUS SIGN}"
# of the sample in conftest.py
G, G_MASKED, R = f"IMACSg {MINUS}0.123", "IMACSg +0.250", "IMACSr undefined"
SLICES = ["t0", "t2", "h0", "h1", "l0", "l1"]

# what is written to a canvas, as a saved view is
SPY = """window.written = [];
  const write = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
    window.written.push(text);
    return write.call(this, text, ...rest);
  };"""


def scores(view):
    return view.page.locator(".score").all_text_contents()


def follow(view, link):
    view.page.evaluate("link => { location.hash = link; }", link)
    view.wait()


def test_a_score_of_the_map_shown_stands_alone(view):
    assert scores(view) == [G, f"{R} (whole run, painted part)"]
    view.page.set_checked("#weights", True)
    assert scores(view) == [G_MASKED, R]
    reference = view.page.locator("figure:has([data-side=reference]) .score")
    assert reference.get_attribute("title") == "its map is the same everywhere"
    # a touch screen shows no titles
    assert view.page.text_content("#facts").endswith("undefined: its map is the same everywhere")


def test_the_share_comes_first_with_a_score_of_its_own(visit, html):
    view = visit(html).wait()
    assert view.panel("generated")["map"] == "share"
    assert scores(view)[0] == "IMACSg +0.500"
    assert "share of attention" in view.page.text_content("#pictures")
    view.page.set_checked("#spread", True)
    assert view.panel("generated")["map"] == "r2g"
    assert scores(view)[0] == G
    view.page.set_checked("#spread", False)
    view.page.set_checked("#weights", True)
    assert [panel["map"] for panel in view.status["panels"]] == ["share", "g2r_mask"]
    view.close()


@pytest.mark.parametrize("slice", SLICES)
def test_a_score_beside_a_slice_is_of_the_whole_run(view, slice):
    follow(view, f"#one/-/{slice}")
    assert view.panel("generated")["map"] == "r2g"
    assert scores(view) == [f"{G} (whole run)", f"{R} (whole run, painted part)"]
    view.page.set_checked("#weights", True)
    assert view.panel("reference")["map"] == "g2r_mask"
    assert scores(view) == [f"{G_MASKED} (whole run)", f"{R} (whole run)"]


@pytest.mark.parametrize("patch", ["g3,2", "r1,3", "g1,1-4,3", "@sleeve"])
@pytest.mark.parametrize("slice", ["all", "t1", "h0", "l1"])
def test_a_score_beside_a_patch_or_region_is_of_the_whole_run(view, patch, slice):
    follow(view, f"#one/{patch}/{slice}")
    assert view.status["pinned"]
    whole = [f"{G} (whole run, all patches)", f"{R} (whole run, painted part)"]
    assert scores(view) == whole
    view.page.set_checked("#weights", True)
    assert scores(view) == [f"{G_MASKED} (whole run, masked object)", whole[1]]
    view.page.keyboard.press("Escape")
    assert "whole run, masked" not in scores(view)[0]


def test_a_compared_sample_has_scores_of_its_own(view):
    follow(view, "#one/-/h0/two")
    assert scores(view) == [f"{G} (whole run)", f"{R} (whole run, painted part)"] * 2


def test_scores_without_maps_say_what_they_are_of(visit, make_sample):
    given = {"imacs_g": {"value": 0.5, "reason": None}, "fid": {"value": 12.0, "reason": None}}
    view = visit(render([replace(make_sample(), stacks=[], regions=[], scores=given)])).wait()
    assert scores(view) == ["IMACSg +0.500 (whole run, all patches)", ""]
    assert view.page.locator("#facts dt").all_text_contents() == ["Model", "fid"]
    view.close()


def test_a_score_of_other_weights_is_told_from_the_map(visit, make_sample):
    given = {"imacs_g": {"value": 0.5, "reason": None}}
    view = visit(render([make_sample(scores=given)])).wait()
    view.page.set_checked("#spread", True)
    view.page.set_checked("#weights", True)
    assert view.panel("generated")["map"] == "r2g_mask"
    assert scores(view)[0] == "IMACSg +0.500 (whole run, all patches)"
    view.close()


def test_the_published_code_scores_all_patches(visit, make_sample):
    given = {"imacs_r": {"value": 0.5, "reason": None}}
    view = visit(render([make_sample(scores=given, preset="official")])).wait()
    assert scores(view) == ["", "IMACSr +0.500"]
    view.page.set_checked("#weights", True)
    assert scores(view) == ["", "IMACSr +0.500 (whole run, all patches)"]
    view.close()


def test_a_saved_view_has_the_same_scores(visit, make_sample):
    view = visit(render([make_sample(), make_sample(1, "two")]), script=SPY).wait()
    for link in ("#one/-/all", "#one/-/h1", "#one/g3,2/t0", "#one/@sleeve/all", "#one/-/l0/two"):
        follow(view, link)
        view.page.evaluate("window.written.length = 0")
        with view.page.expect_download():
            view.page.click("#save")
        written = view.page.evaluate("window.written")
        shown = [text.replace("IMACS", "IMACS_") for text in scores(view)]
        assert [text for text in written if text.startswith("IMACS")] == shown
        assert ("whole run" in shown[0]) == (link != "#one/-/all")
    view.close()


def test_a_saved_view_has_room_for_what_a_score_is_of(visit, make_sample, make_image):
    tall, made = make_image(0, (30, 90)), make_sample()
    made = replace(made, generated=tall, sources=[replace(made.sources[0], reference=tall)])
    view = visit(render([made]), script=SPY, link="#one/g1,1/h0").wait()
    with view.page.expect_download():
        view.page.click("#save")
    written = view.page.evaluate("window.written")
    assert "IMACS_g +0.500 (whole run, share)" in written
    view.close()
