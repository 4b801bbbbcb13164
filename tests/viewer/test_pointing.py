"""Pointing, dragging, sliding and typing in a browser, against numbers of the maps themselves."""

import itertools

import numpy as np
import pytest
import torch

# of the recording in conftest.py
GENERATED, REFERENCE, TIMES, HEADS = (8, 6), (6, 5), 3, 2
SLICES = [("all", {}), *[(f"t{t}", {"time": t}) for t in range(TIMES)]]
SLICES += [(f"h{h}", {"head": h}) for h in range(HEADS)]


def expect(panel, values, levels):
    """What a panel says of a map, and the map: ends exactly, sums within the steps of the codes."""
    values = np.asarray(values, dtype=np.float64)
    peak = np.unravel_index(values.argmax(), values.shape)
    assert tuple(panel["peak"]) == peak
    assert panel["low"] == pytest.approx(values.min(), rel=1e-6, abs=1e-9)
    assert panel["high"] == pytest.approx(values.max(), rel=1e-6)
    step = (values.max() - values.min()) / levels
    assert panel["total"] == pytest.approx(values.sum(), abs=values.size * step)


def pairs_of(recording, side, **choice):
    read = (
        recording.pairs.generated_to_reference
        if side == "generated"
        else recording.pairs.reference_to_generated
    )
    return read(**choice)[0]


def choose(view, slice):
    if slice[0] == "h":
        view.page.click(f"#heads button[value={slice}]")
    elif slice[0] == "l":
        view.page.select_option("#layer", slice)
    else:
        view.slide("time", 0 if slice == "all" else int(slice[1:]) + 1)
    assert view.status["slice"] == slice


CELLS = [("generated", cell) for cell in [(0, 0), (7, 5), (3, 2), (4, 0), (6, 3), (1, 5), (5, 4)]]
CELLS += [("reference", cell) for cell in [(0, 0), (5, 4), (2, 3), (3, 0), (4, 2), (1, 1), (0, 4)]]


@pytest.mark.parametrize(("side", "cell"), CELLS, ids=str)
def test_pointing_at_a_patch_shows_its_map_on_the_other_picture(view, recording, side, cell):
    panel = view.point(side, cell)
    assert panel["map"] == ("pairs_g2r" if side == "generated" else "pairs_r2g")
    assert panel["area"] == [*cell, *cell]
    expect(panel, pairs_of(recording, side)[cell], 63)
    own = view.panel(side)
    assert (own["map"], own["area"]) == (None, [*cell, *cell])
    view.page.mouse.move(4, 4)
    assert view.status["query"] is None


@pytest.mark.parametrize(
    ("side", "slice"), [*itertools.product(["generated", "reference"], SLICES[1:])], ids=str
)
def test_time_groups_and_heads_of_a_patch(view, recording, side, slice):
    name, choice = slice
    choose(view, name)
    expect(view.point(side, (2, 1)), pairs_of(recording, side, **choice)[2, 1], 31)


OVERALL = {"time": "t", "head": "h", "layer": "l"}


@pytest.mark.parametrize("axis", OVERALL)
def test_overall_maps_per_time_group_head_and_layer(view, recording, axis):
    r2g = recording.reference_to_generated(per=axis)[0]
    g2r = recording.generated_to_reference(per=axis)[0]
    for number in range(len(r2g)):
        choose(view, f"{OVERALL[axis]}{number}")
        expect(view.panel("generated"), r2g[number], 255)
        expect(view.panel("reference"), g2r[number], 255)
    assert number == 1 + (axis == "time")


@pytest.mark.parametrize("inside", [False, True], ids=["all", "inside the masks"])
def test_overall_maps_with_uniform_and_with_mask_weights(view, recording, inside):
    view.page.set_checked("#weights", inside)
    name = "mask" if inside else "uniform"
    expect(view.panel("generated"), recording.reference_to_generated(votes=name)[0], 255)
    expect(view.panel("reference"), recording.generated_to_reference(weights=name)[0], 255)
    suffix = "_mask" if inside else ""
    assert view.panel("generated")["map"] == f"r2g{suffix}"


def test_a_declared_region_needs_no_pair_maps(view, recording):
    view.page.click("#regions button[value=sleeve]")
    expect(view.panel("reference"), recording.specific_reference("sleeve")[0], 255)
    assert view.status["query"] == {"region": "sleeve"}
    choose(view, "t1")
    expected = recording.specific_reference("sleeve", per="time")[0, 1]
    expect(view.panel("reference"), expected, 255)
    box = view.page.locator(".stage[data-side=generated] .box.line")
    frame = [float(box.get_attribute(name)) for name in ("x", "y", "width", "height")]
    assert frame == pytest.approx([160, 320, 160, 160])
    truth = view.page.locator(".stage[data-side=reference] .truth.line")
    assert float(truth.get_attribute("cx")) == pytest.approx(0.75 * 533)
    view.page.click("#regions button[value='']")
    assert view.status["query"] is None


AREAS = [
    ("generated", (1, 1), (4, 3)),
    ("reference", (5, 4), (2, 0)),
    ("generated", (7, 0), (7, 5)),
]


@pytest.mark.parametrize(("side", "first", "last"), AREAS, ids=str)
def test_dragging_asks_for_the_mean_of_an_area(view, recording, side, first, last):
    panel = view.drag(side, first, last)
    top, bottom = sorted((first[0], last[0]))
    left, right = sorted((first[1], last[1]))
    assert panel["area"] == [top, left, bottom, right]
    maps = pairs_of(recording, side)[top : bottom + 1, left : right + 1].double()
    expected = maps.mean((0, 1)).numpy()
    # every map has a range of its own, so sums of codes are right to half a step of each
    step = float((maps.amax((2, 3)) - maps.amin((2, 3))).mean()) / 63
    assert panel["high"] == pytest.approx(expected.max(), abs=step)
    assert panel["low"] == pytest.approx(expected.min(), abs=step)
    assert expected[tuple(panel["peak"])] >= expected.max() - 2 * step
    assert view.status["pinned"]


def test_a_press_holds_a_patch_and_another_lets_it_go(view):
    view.point("generated", (3, 2))
    view.page.mouse.down()
    view.page.mouse.up()
    assert view.status["pinned"]
    view.point("reference", (1, 1))
    assert view.status["query"]["cells"] == [3, 2, 3, 2]
    view.point("generated", (3, 2))
    view.page.mouse.down()
    view.page.mouse.up()
    assert not view.status["pinned"]
    view.point("reference", (1, 1))
    assert view.status["query"]["side"] == "reference"


def test_layers_refuse_patches_in_words(view):
    choose(view, "l1")
    assert view.point("generated", (3, 2))["map"] is None
    assert "layers were not kept apart" in view.page.text_content("#reading")


def test_the_sentence_says_where_and_how_much(view, recording):
    view.point("generated", (3, 2))
    values = pairs_of(recording, "generated")[3, 2]
    row, column = divmod(int(values.argmax()), REFERENCE[1])
    share = 100 * float(values.max() / values.sum())
    said = view.page.text_content("#reading")
    assert said.startswith(
        f"Row 3, column 2 of the generated picture looks most at row {row}, column {column} of the "
        "reference: "
    )
    assert float(said.split(": ")[1].split()[0]) == pytest.approx(share, abs=0.6)


def test_a_shared_range_spans_the_slices_of_an_axis(view, recording):
    view.page.click("#ranges button[value=shared]")
    choose(view, "t1")
    panel = view.point("generated", (2, 2))
    maps = torch.stack([pairs_of(recording, "generated", time=t)[2, 2] for t in range(TIMES)])
    assert panel["low"] == pytest.approx(float(maps.min()), rel=1e-6)
    assert panel["high"] == pytest.approx(float(maps.max()), rel=1e-6)
    view.page.mouse.move(4, 4)
    choose(view, "h0")
    heads = recording.reference_to_generated(per="head")[0]
    assert view.panel("generated")["high"] == pytest.approx(float(heads.max()), rel=1e-6)
    view.page.click("#ranges button[value=own]")
    assert view.panel("generated")["high"] == pytest.approx(float(heads[0].max()), rel=1e-6)


def test_sliders_move_threshold_and_opacity_and_the_numbers_of_the_scale(view, recording):
    values = recording.reference_to_generated()[0]
    low, high = float(values.min()), float(values.max())
    for threshold in (0.4, 0.6, 0):
        view.slide("threshold", threshold)
        assert view.status["threshold"] == threshold
        figure = view.page.locator("figure:has([data-side=generated])")
        assert float(figure.locator(".low").text_content()) == pytest.approx(low, rel=6e-3)
        assert float(figure.locator(".high").text_content()) == pytest.approx(high, rel=6e-3)
        if threshold:
            at = float(figure.locator(".at").text_content())
            assert at == pytest.approx(low + threshold * (high - low), rel=6e-3)
    view.slide("opacity", 0.5)
    assert view.status["opacity"] == 0.5


def test_keys_move_widen_hold_and_clear(view, recording):
    stage = view.page.locator(".stage[data-side=generated]")
    stage.focus()
    press = view.page.keyboard.press
    press("ArrowRight")
    assert view.status["query"]["cells"] == [4, 3, 4, 3]
    press("ArrowRight")
    press("ArrowUp")
    assert view.status["query"]["cells"] == [3, 4, 3, 4]
    expect(view.panel("reference"), pairs_of(recording, "generated")[3, 4], 63)
    press("Shift+ArrowDown")
    press("Shift+ArrowLeft")
    assert view.status["query"]["cells"] == [3, 3, 4, 4]
    press("Shift+ArrowUp")
    press("Shift+ArrowUp")
    assert view.status["query"]["cells"] == [2, 3, 3, 4]
    press("ArrowRight")
    assert view.status["query"]["cells"] == [2, 4, 2, 4]
    for _ in range(9):
        press("ArrowRight")
    assert view.status["query"]["cells"] == [2, 5, 2, 5]
    assert view.status["pinned"]
    press("Enter")
    assert not view.status["pinned"]
    press("Escape")
    assert view.status["query"] is None
    press(".")
    assert view.status["slice"] == "t0"
    press(",")
    press(",")
    assert view.status["slice"] == f"t{TIMES - 1}"
    assert view.status["outlines"]
    press("m")
    assert not view.status["outlines"]
    press("m")


def test_everything_is_reached_by_tab_and_named(view):
    view.page.locator("#sample").focus()
    reached = ["sample"]
    for _ in range(30):
        view.page.keyboard.press("Tab")
        reached.append(
            view.page.evaluate(
                "(e => e.dataset.side || e.id || e.value || e.tagName)(document.activeElement)"
            )
        )
        outline = view.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or reached[-1] == "BODY"
    wanted = ["sample", "compare", "link", "save", "generated", "reference", "sleeve", "weights"]
    wanted += ["time", "h1", "layer", "threshold", "opacity", "shared", "outlines"]
    places = [reached.index(name) for name in wanted]
    assert places == sorted(places)
    unnamed = view.page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, [tabindex]')]
          .filter((e) => e.checkVisibility())
          .filter((e) => !e.getAttribute('aria-label') && !e.textContent.trim())
          .filter((e) => !e.labels?.length)
          .map((e) => e.outerHTML)"""
    )
    assert unnamed == []


def test_links_lead_to_a_view_and_follow_it(view):
    def follow(link):
        view.page.evaluate(f"location.hash = '{link}'")
        view.wait()
        return view.status

    status = follow("#two/g2,3/t1")
    assert (status["a"], status["query"]["cells"], status["slice"]) == ("two", [2, 3, 2, 3], "t1")
    status = follow("#one/r1,1-3,2/h1/two")
    assert (status["a"], status["b"], status["query"]["side"]) == ("one", "two", "reference")
    assert status["query"]["cells"] == [1, 1, 3, 2]
    assert follow("#one/@sleeve/all")["query"] == {"region": "sleeve"}
    for nonsense in ("#nobody", "#one/g99,0/t9/nobody", "#one/@nothing/l77", "#%", "#one/g1,1-0,0"):
        status = follow(nonsense)
        assert (status["a"], status["query"], status["slice"]) == ("one", None, "all")
    view.drag("generated", (1, 2), (3, 4))
    view.slide("time", 2)
    view.page.wait_for_function("() => location.hash.includes('t1')")
    assert view.page.evaluate("location.hash") == "#one/g1,2-3,4/t1"


def test_two_samples_answer_the_same_question(view, make_recording):
    other = make_recording(1)
    view.page.select_option("#compare", "two")
    view.wait()
    view.point("generated", (3, 2))
    expect(view.panel("reference", 0), pairs_of(make_recording(), "generated")[3, 2], 63)
    expect(view.panel("reference", 1), pairs_of(other, "generated")[3, 2], 63)
    view.page.click("#ranges button[value=shared]")
    view.page.mouse.move(4, 4)
    both = [recording.reference_to_generated() for recording in (make_recording(), other)]
    high = max(float(maps.max()) for maps in both)
    for number in (0, 1):
        assert view.panel("generated", number)["high"] == pytest.approx(high, rel=1e-6)
    view.page.select_option("#compare", "")
    view.wait()
    assert len(view.status["panels"]) == 2
    view.page.select_option("#sample", "two")
    view.wait()
    expect(view.panel("generated"), other.reference_to_generated()[0], 255)
    view.page.go_back()
    view.wait()
    assert view.status["a"] == "one"


def test_grids_are_those_of_the_recording(recording):
    assert recording.pairs.generated_grid == GENERATED
    assert recording.pairs.reference_grid == REFERENCE
