"""Pages of recordings of every kind: several references, words, frames, layers that differ."""

import pytest
import torch

from i2am.viewer import page, render, sample


def given(maps, make_image, **options):
    """Pictures of a recording."""
    names = [name for name in maps.sources if name.startswith("reference")]
    pictures = {name: make_image(1, (40, 50)) for name in names}
    return {"generated": make_image(0, (36, 48)), "reference": pictures or None, **options}


def document(maps, make_image, **options):
    return sample(maps, **given(maps, make_image, **options)).document()


@pytest.fixture
def visited(visit, record, make_image):
    """Opens the page of a kind of recording."""

    def opened(*kinds, link="", **options):
        made = []
        for kind in kinds:
            maps = record(kind, **options)
            made.append(sample(maps, id=kind, **given(maps, make_image)))
        return visit(render(made), link=link).wait()

    return opened


def maps_of(view):
    return [panel["map"] for panel in view.status["panels"]]


@pytest.mark.filterwarnings("ignore:preset 'official' is approximate")
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_every_kind_has_a_page(every_kind, make_image, preset):
    if preset == "official" and any(layer.site.merged for layer in every_kind.layer_sums):
        with pytest.raises(ValueError, match="needs the layers apart"):
            page(every_kind, preset=preset, **given(every_kind, make_image))
        return
    assert page(every_kind, preset=preset, **given(every_kind, make_image))
    held = document(every_kind, make_image, reference_mask=None)
    named = [source["name"] for source in held["sources"]]
    assert len(named) == len(every_kind.sources)
    for number, source in enumerate(every_kind.sources):
        maps = [entry for entry in held["maps"] if entry["source"] == number]
        word = not source.startswith("reference")
        assert (held["sources"][number]["reference"] is None) == word
        assert maps[0]["name"] == "share"
        assert ("g2r" in [entry["name"] for entry in maps]) != word
        assert ("region 0" in [entry["name"] for entry in maps]) != word
        count = {"t": held["times"], "h": held["heads"], "l": held["layers"]}
        for name in (name for entry in maps for name in entry["slices"] if name != "all"):
            assert int(name[1:]) < len(count[name[0]])


@pytest.mark.parametrize(
    ("kind", "names", "shares"),
    [
        ("resized", [""], ["the object"]),
        (
            "two references",
            ["reference 1", "reference 2"],
            ["the object of reference 1", "the object of reference 2"],
        ),
        ("words", ['"cat"', '"hat"'], ['"cat"', '"hat"']),
        (
            "reference and words",
            ["the reference", '"cat"', '"hat"'],
            ["the object", '"cat"', '"hat"'],
        ),
    ],
)
def test_sources_have_names_where_there_are_several(record, make_image, kind, names, shares):
    sources = document(record(kind), make_image)["sources"]
    assert [source["name"] for source in sources] == names
    assert [source["share"] for source in sources] == shares


def test_layers_and_heads_are_kept_as_far_as_they_are_apart(record, make_image):
    def slices(kind):
        return {
            entry["name"]: entry["slices"] for entry in document(record(kind), make_image)["maps"]
        }

    assert slices("resized")["r2g"] == ["all", "t0", "t1", "h0", "h1"]
    assert slices("head counts")["r2g"] == ["all", "t0", "t1", "l0", "l1"]
    apart = slices("gridless")
    assert apart["r2g"][-2:] == ["l0", "l1"]
    assert apart["g2r"][-2:] == ["h1", "l1"]


def test_a_video_says_that_its_maps_are_means(record, make_image):
    assert (
        "Maps are the mean over 3 frames of a video."
        in document(record("frames"), make_image)["notes"]
    )


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("two references", {"reference": None}, "recorded: reference 1, reference 2; got none"),
        ("words", {"reference": {"reference": 0}}, "recorded: none; got reference"),
        ("resized", {"reference": {"garment": 0}}, "recorded: reference; got garment"),
    ],
)
def test_there_must_be_a_picture_of_every_reference(record, make_image, kind, options, match):
    maps = record(kind)
    with pytest.raises(ValueError, match=match):
        page(maps, **given(maps, make_image, **options))


def test_one_picture_is_not_of_two_references(record, make_image):
    maps = record("two references")
    with pytest.raises(ValueError, match="got one without a name"):
        page(maps, **given(maps, make_image, reference=make_image(0)))
    mask = torch.ones(50, 40)
    with pytest.raises(ValueError, match="reference_mask must belong to one reference, got one fo"):
        page(maps, **given(maps, make_image, reference_mask=mask))


def test_a_reader_chooses_the_source(visited):
    view = visited("two references")
    assert view.page.locator("#source option").all_text_contents() == ["reference 1", "reference 2"]
    assert [panel["source"] for panel in view.status["panels"]] == ["reference 1"] * 2
    titles = view.page.locator("figcaption b")
    assert titles.all_text_contents() == ["Generated", "Reference 1"]
    view.page.select_option("#source", "reference 2")
    view.page.wait_for_function(
        "() => document.querySelector('#pictures').textContent.includes('Reference 2')"
    )
    view.wait()
    assert [panel["source"] for panel in view.status["panels"]] == ["reference 2"] * 2
    assert view.page.locator(".subtitle").all_text_contents() == [
        "R2G \u00b7 share of attention to the object of reference 2",
        "G2R \u00b7 where the generated picture looked on reference 2",
    ]
    view.page.set_checked("#spread", True)
    assert view.page.locator(".subtitle").first.text_content() == (
        "R2G \u00b7 where reference 2 went"
    )
    view.page.wait_for_function("() => location.hash.endsWith('/all//reference%202')")
    view.page.click("#regions button[value=logo]")
    assert view.panel("reference")["map"] == "region 0"
    view.page.go_back()
    view.page.wait_for_function(
        "() => document.querySelector('#pictures').textContent.includes('Reference 1')"
    )
    view.wait()
    assert view.status["source"] is None
    view.close()


def test_a_link_brings_a_source_back(visited):
    view = visited("two references", link="#two%20references/@logo/t1//reference%202")
    assert view.status["source"] == "reference 2"
    assert view.page.input_value("#source") == "reference 2"
    assert (view.status["slice"], view.panel("reference")["map"]) == ("t1", "region 0")
    view.page.evaluate("() => { location.hash = '#two%20references/-/all//gone'; }")
    view.page.wait_for_function(
        "() => document.querySelector('#pictures').textContent.includes('Reference 1')"
    )
    view.wait()
    assert view.status["source"] is None
    view.close()


def test_words_alone_are_shown_on_the_generated_picture(visited):
    view = visited("words")
    assert maps_of(view) == ["share"]
    assert view.page.locator("figure").count() == 1
    assert view.page.text_content("#reading") == 'Where on the generated picture did "cat" go?'
    for control in ("#weights", "#spread", "#regions button"):
        assert not view.page.locator(control).first.is_visible()
    view.page.select_option("#source", '"hat"')
    view.page.wait_for_function(
        "() => document.querySelector('#reading').textContent.includes('hat')"
    )
    view.wait()
    assert view.page.text_content(".subtitle") == 'R2G \u00b7 share of attention to "hat"'
    view.page.locator("#heads button").nth(1).click()
    assert maps_of(view) == ["share"]
    with view.page.expect_download():
        view.page.click("#save")
    for width in (390, 1280):
        view.page.set_viewport_size({"width": width, "height": 800})
        assert view.page.evaluate("document.documentElement.scrollWidth") == width
    view.close()


def test_a_word_beside_a_reference_takes_its_place(visited):
    view = visited("reference and words", pairs=True)
    assert maps_of(view) == ["share", "g2r"]
    assert view.point("generated", (3, 2), (8, 6))["map"] == "pairs_g2r"
    view.away()
    view.page.set_checked("#spread", True)
    view.page.click("#regions button[value=logo]")
    view.page.select_option("#source", '"cat"')
    view.page.wait_for_function(
        "() => document.querySelector('#reading').textContent.includes('cat')"
    )
    view.wait()
    # what is asked of the reference has no answer of a word, and its share is all there is
    assert (view.status["query"], maps_of(view)) == (None, ["share"])
    assert view.page.locator(".stage.live").count() == 0
    view.page.select_option("#source", "")
    view.page.wait_for_selector(".stage.live[data-side=reference]")
    view.wait()
    assert maps_of(view) == ["r2g", "g2r"]
    view.close()


def test_samples_of_different_kinds_are_compared(visited):
    view = visited("two references", "words", link="#two%20references/-/all/words")
    assert maps_of(view) == ["share", "g2r", "share"]
    assert view.page.locator(".one h2").all_text_contents() == ["two references", "words"]
    view.page.select_option("#source", "reference 2")
    view.page.wait_for_function(
        "() => document.querySelector('#pictures').textContent.includes('Reference 2')"
    )
    view.wait()
    # what has no such source shows its first
    sources = [panel["source"] for panel in view.status["panels"]]
    assert sources == ["reference 2", "reference 2", '"cat"']
    view.close()


def test_scores_stand_beside_the_reference_alone(visit, record, make_image):
    maps = record("reference and words")
    scores = {"imacs_g_share": {"value": 0.5, "reason": None}}
    view = visit(render([sample(maps, scores=scores, **given(maps, make_image))])).wait()
    assert view.page.locator(".score").all_text_contents() == ["IMACSg +0.500", ""]
    view.page.select_option("#source", '"cat"')
    view.page.wait_for_function(
        "() => document.querySelector('#reading').textContent.includes('cat')"
    )
    view.wait()
    assert view.page.locator(".score").all_text_contents() == [""]
    view.close()


@pytest.mark.parametrize("kind", ["frames", "head counts", "gridless", "resized", "everything"])
def test_every_slice_of_every_kind_is_drawn_quietly(visited, kind):
    view = visited(kind)
    controls = [view.page.locator("#heads button"), view.page.locator("#ranges button")]
    for button in (button for group in controls for button in group.all()):
        if button.is_visible():
            button.click()
    for value in view.page.locator("#layer option").evaluate_all("all => all.map((o) => o.value)"):
        if view.page.locator("#layer").is_visible():
            view.page.select_option("#layer", value)
    assert view.panel("generated")["map"] == "share"
    view.close()
