"""Everybody can use the page: names, contrast and room at the widths of phone, tablet and desk."""

from dataclasses import replace
from itertools import pairwise

import pytest

from i2am.viewer import render, write_report

WIDTHS = (390, 1024, 1440)
NAMED = {"button", "checkbox", "combobox", "searchbox", "slider", "link", "application", "image"}
SELECTS = {
    "patches": ["Sample", "Compare with", "Layer"],
    "compared": ["Sample", "Compare with", "Layer"],
    "overall maps": ["Layer"],
    "no maps": [],
    "list": ["Sort by"],
}
# whether words of one row lie on each other
CROWDED = """() => [...document.querySelectorAll('.scale:not(.off) .ticks, figcaption')]
  .filter((row) => {
    const boxes = [...row.children].map((e) => e.getBoundingClientRect()).filter((b) => b.width);
    return boxes.some((one, i) => boxes.slice(i + 1).some((other) =>
      one.left < other.right && other.left < one.right &&
      one.top < other.bottom - 1 && other.top < one.bottom - 1));
  }).map((row) => row.textContent)"""


@pytest.fixture(scope="module")
def pages(make_sample, make_recording, tmp_path_factory):
    """A file and a link into it, by what it shows."""
    folder = tmp_path_factory.mktemp("pages")
    pairs = make_sample(notes=["the weights are random, not trained"])
    pair = [pairs, make_sample(1, "two")]
    bare = replace(pairs, stacks=[], regions=[], times=[], heads=[], layers=[])
    given = {"pairs": pair, "overall": [make_sample(maps=make_recording(pairs=False))]}
    for name, samples in {**given, "bare": [bare]}.items():
        (folder / f"{name}.html").write_text(render(samples), encoding="utf-8")
    write_report(folder / "many", pair)
    return {
        "patches": (folder / "pairs.html", "#one/g3,2/all"),
        "compared": (folder / "pairs.html", "#one/r1,1/h0/two"),
        "overall maps": (folder / "overall.html", ""),
        "no maps": (folder / "bare.html", ""),
        "list": (folder / "many" / "index.html", ""),
    }


@pytest.fixture
def opened(pages, visit):
    """Opens one of the pages; ends the visit afterwards."""
    views = []

    def open_page(name):
        file, link = pages[name]
        views.append(visit(file, link=link).wait())
        return views[-1]

    yield open_page
    for view in views:
        view.close()


def widths(view):
    """Gives the window each width in turn."""
    for width in WIDTHS:
        view.page.set_viewport_size({"width": width, "height": 844})
        # what the page does then is done before the next frame
        view.page.evaluate(
            "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
        yield width


def nodes(view):
    """Role and name of what Chromium tells a screen reader."""
    client = view.page.context.new_cdp_session(view.page)
    return [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in client.send("Accessibility.getFullAXTree")["nodes"]
        if not node["ignored"]
    ]


@pytest.mark.parametrize("name", SELECTS)
def test_every_control_has_a_name(opened, name):
    view = opened(name)
    for width in widths(view):
        found = nodes(view)
        assert [role for role, text in found if role in NAMED and not text] == [], width
        # a narrow window hides words, not names
        assert [text for role, text in found if role == "combobox"] == SELECTS[name], width
        assert (("searchbox", "Filter") in found) == (name == "list"), width


@pytest.mark.parametrize("name", SELECTS)
def test_only_pictures_that_answer_take_keys(opened, name):
    view = opened(name)
    live = name in ("patches", "compared")
    assert ("application" in [role for role, _ in nodes(view)]) == live
    assert (view.page.locator(".stage[tabindex]").count() > 0) == live


@pytest.mark.parametrize("name", SELECTS)
def test_it_fits_and_can_be_read(opened, name, faint):
    view = opened(name)
    for width in widths(view):
        assert view.page.evaluate("document.documentElement.scrollWidth") == width
        assert view.page.evaluate(CROWDED) == [], width
        for scheme in ("light", "dark"):
            view.page.emulate_media(color_scheme=scheme)
            assert faint(view) == [], (width, scheme)


def test_the_slider_of_time_says_steps(opened):
    view = opened("overall maps")
    for value, words in ((2, "steps 3 to 4"), (0, "all steps")):
        view.slide("time", value)
        assert view.page.get_attribute("#time", "aria-valuetext") == words


def test_numbers_of_a_scale_do_not_lie_on_each_other(opened):
    view = opened("overall maps")
    for width in widths(view):
        shown = set()
        for threshold in (0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1):
            view.slide("threshold", threshold)
            for row in view.page.locator(".ticks").all():
                boxes = row.locator("span").evaluate_all(
                    "spans => spans.filter((s) => !s.hidden).map((s) => s.getBoundingClientRect())"
                )
                boxes.sort(key=lambda box: box["x"])
                shown.add(len(boxes))
                for left, right in pairwise(boxes):
                    assert left["right"] < right["left"], (width, threshold)
        # the mark's own number is there where it has room
        assert shown <= {2, 3}
        assert 3 in shown


@pytest.mark.parametrize("name", ["patches", "compared"])
def test_pictures_stay_where_they_are_while_one_points(opened, name):
    view = opened(name)

    def tops():
        return view.page.locator(".stage").evaluate_all(
            "stages => stages.map((s) => s.getBoundingClientRect().top + scrollY)"
        )

    for width in widths(view):
        view.away()
        still = tops()
        for side, cell in (("generated", (3, 2)), ("reference", (2, 4)), ("generated", (7, 5))):
            view.point(side, cell)
            assert view.status["query"]["side"] == side
            assert tops() == still, width
