"""Figures: titles, axes, extents and the very pixels they hold; and what they refuse."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.text import Text

from i2am.attribution import picture
from i2am.plots import (
    heads,
    layers,
    models,
    overlay,
    reference_maps,
    specific_reference,
    time_and_head,
    time_groups,
)
from i2am.plots.overlay import SIDE, enlarged, resized

# the generated grid and the reference grid
R2G, G2R = (8, 6), (4, 5)
REFERENCE = (40, 50)


def drawn(image, raw, *, style="default", **options):
    """The pixels of a panel, from the functions that `i2am record` draws with."""
    below = enlarged(image)
    return overlay(below, picture(raw, below.shape[:2], **options).numpy(), style=style)


def titles(rows):
    return [[title.replace("\n", " ") for title, _ in row] for row in rows]


@pytest.mark.parametrize("style", ["default", "paper"])
def test_time_groups_hold_the_overlays_of_their_maps(image, maps, panels, style):
    raw = maps(3, *R2G)
    figure = time_groups(image(), raw, steps=7, style=style)
    rows = panels(figure)
    assert titles(rows) == [["generated", "steps 1 to 3", "steps 4 to 5", "steps 6 to 7"]]
    (first, *others) = rows[0]
    assert np.array_equal(first[1], enlarged(image()))
    for (_, pixels), one in zip(others, raw, strict=True):
        assert np.array_equal(pixels, drawn(image(), one, style=style))
    # axes count the pixels of the image that was given
    assert all(place.images[0].get_extent() == [0, 36, 48, 0] for place in figure.axes[:4])


def test_shared_scale_makes_maps_of_a_row_comparable(image, maps, panels):
    raw = maps(2, *R2G) * torch.tensor([1.0, 0.5])[:, None, None]
    apart, together = (
        panels(time_groups(image(), raw, shared=shared))[0][1:] for shared in (False, True)
    )
    below = enlarged(image())
    for index in range(2):
        assert np.array_equal(apart[index][1], drawn(image(), raw[index]))
        unit = picture(raw, below.shape[:2], shared=True)[index].numpy()
        assert np.array_equal(together[index][1], overlay(below, unit))
    assert not np.array_equal(apart[1][1], together[1][1])


def test_threshold_is_what_is_left_out_and_is_marked_on_the_scale(image, maps, panels):
    raw = maps(1, *R2G)
    figure = heads(image(), raw, threshold=0.7)
    assert np.array_equal(panels(figure)[0][1][1], drawn(image(), raw[0], threshold=0.7))
    bar = figure.axes[-1]
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0", "0.7", "1"]
    assert any(list(line.get_ydata()) == [0.7, 0.7] for line in bar.lines)
    assert bar.get_ylabel() == "each map on its own scale,\nup to 0.7 left out"
    everything = heads(image(), raw, threshold=None)
    bar = everything.axes[-1]
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0", "1"]
    assert bar.get_ylabel() == "each map on its own scale"
    assert np.array_equal(panels(everything)[0][1][1], drawn(image(), raw[0], threshold=None))


def test_many_heads_go_on_in_the_next_row_under_their_own_names(image, maps, panels):
    raw = maps(10, *R2G)
    rows = panels(heads(image(), raw))
    assert titles(rows) == [
        ["generated", *(f"head {head}" for head in range(8))],
        ["", "head 8", "head 9", *[""] * 6],
    ]
    assert rows[1][0][1] is None
    assert np.array_equal(rows[1][2][1], drawn(image(), raw[9]))
    assert all(pixels is None for _, pixels in rows[1][3:])


def test_samples_are_rows_with_labels_and_titles_once(image, maps, panels):
    images, raw = [image(), image((30, 30), seed=1)], [maps(2, *R2G), maps(2, 5, 5)]
    figure = heads(images, raw, labels=("one", "two"))
    rows = panels(figure)
    assert titles(rows) == [["generated", "head 0", "head 1"], ["", "", ""]]
    assert [figure.axes[number].get_ylabel() for number in (0, 3)] == ["one", "two"]
    assert np.array_equal(rows[1][2][1], drawn(images[1], raw[1][1]))


def test_layers_are_called_by_what_tells_them_apart(image, maps, panels):
    names = ["down.0.attn2", "up.1.attn2"]
    assert titles(panels(layers(image(), maps(2, *R2G), names)))[0][1:] == ["down.0", "up.1"]
    both = layers(
        [image(), image(REFERENCE)],
        [maps(2, *R2G), maps(1, *G2R)],
        [names, ["up.1.attn2"]],
        name=("generated", "reference"),
    )
    assert titles(panels(both))[1][:2] == ["reference", "up.1.attn2"]


def test_time_and_head_has_a_row_per_run(image, maps, panels):
    images, references = [image(), image(seed=1)], [image(REFERENCE), image(REFERENCE, seed=1)]
    figure = time_and_head(
        images,
        maps(2, *R2G),
        reference=references,
        reference_maps=maps(2, *G2R),
        labels=("with guidance", "without guidance"),
        heading="pocket",
    )
    rows = panels(figure)
    assert titles(rows)[0] == ["generated", "R2G", "reference", "G2R"]
    for row, generated, reference, r2g, g2r in zip(
        rows, images, references, maps(2, *R2G), maps(2, *G2R), strict=True
    ):
        wanted = [enlarged(generated), drawn(generated, r2g)]
        wanted += [enlarged(reference), drawn(reference, g2r)]
        for (_, pixels), expected in zip(row, wanted, strict=True):
            assert np.array_equal(pixels, expected)
    assert figure.get_suptitle() == "pocket"
    assert [figure.axes[n].get_ylabel() for n in (0, 4)] == ["with guidance", "without guidance"]


def test_reference_maps_have_a_row_over_time_and_one_over_heads(image, maps, panels):
    below, over_time, over_heads = image(REFERENCE), maps(3, *G2R), maps(2, *G2R, seed=1)
    figure = reference_maps(below, over_time, over_heads, steps=3)
    rows = panels(figure)
    assert titles(rows) == [
        ["reference", "step 1", "step 2", "step 3"],
        ["", "head 0", "head 1", ""],
    ]
    assert [figure.axes[number].get_ylabel() for number in (0, 4)] == ["time", "heads"]
    assert np.array_equal(rows[0][3][1], drawn(below, over_time[2]))
    assert np.array_equal(rows[1][2][1], drawn(below, over_heads[1]))
    assert rows[1][3][1] is None


def test_specific_reference_marks_the_patch_and_points_at_the_peak(image, maps, panels):
    raw = maps(3, *G2R)
    raw[0, 1, 3] = 2
    boxes = [(12, 6, 8, 4), None, (0, 0, 48, 36)]
    figure = specific_reference(
        image(),
        image(REFERENCE),
        raw,
        boxes,
        names=("logo", "free", "all"),
        truths=(None, (0.25, 0.5), None),
    )
    rows = panels(figure)
    where, ring = "where it looked", "where it looked; ring: true place"
    assert titles(rows) == [["logo", where, "free", ring], ["all", "", "", ""]]
    for place, one in ((rows[0][1], raw[0]), (rows[0][3], raw[1]), (rows[1][1], raw[2])):
        assert np.array_equal(place[1], drawn(image(REFERENCE), one))
    (start, end, free, looked, *_rest) = figure.axes
    frames = [patch for patch in start.patches if isinstance(patch, Rectangle)]
    # red on white, x before y
    assert [frame.get_bbox().bounds for frame in frames] == [(6, 12, 4, 8)] * 2
    assert frames[-1].get_edgecolor() == (1, 0, 0, 1)
    assert not free.patches
    arrows = [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]
    assert len(arrows) == 2
    # cell (1, 3) of 4 x 5 on 40 x 50 pixels
    assert arrows[0].xy1 == (10, 16)
    assert arrows[0].xy2 == (35, 15)
    assert (arrows[0].coords1, arrows[0].coords2) == (start.transData, end.transData)
    assert [tuple(map(float, line.get_xydata()[0])) for line in looked.lines] == [(25, 10)] * 2


def test_models_stand_side_by_side_and_one_may_lack_a_direction(image, maps, panels):
    images, r2g, g2r = [image(), image(seed=1)], maps(2, *R2G), maps(*G2R)
    figure = models(
        ["pocket", "painter"], images, r2g, reference=image(REFERENCE), reference_maps=[g2r, None]
    )
    rows = panels(figure)
    assert titles(rows)[0] == ["pocket", "painter"]
    assert [figure.axes[2 * row].get_ylabel() for row in range(4)] == [
        "generated",
        "R2G",
        "reference",
        "G2R",
    ]
    for column in range(2):
        assert np.array_equal(rows[0][column][1], enlarged(images[column]))
        assert np.array_equal(rows[1][column][1], drawn(images[column], r2g[column]))
        assert np.array_equal(rows[2][column][1], enlarged(image(REFERENCE)))
    assert np.array_equal(rows[3][0][1], drawn(image(REFERENCE), g2r))
    assert rows[3][1][1] is None
    assert figure.axes[7].texts[0].get_text() == "no G2R"


def test_a_constant_map_is_called_so(image, panels):
    rows = panels(heads(image(), torch.ones(1, *R2G)))
    assert titles(rows)[0][1] == "head 0 (the same everywhere)"


def test_arrays_tensors_and_pictures_are_the_same(image, maps, panels):
    from PIL import Image

    raw = maps(2, *R2G)
    for below, values, same in (
        (torch.from_numpy(image()), raw.numpy(), raw),
        (Image.fromarray(image()), raw.tolist(), raw.double()),
        (image()[None], raw[None], raw),
        ([image()], [raw.clone().requires_grad_()], raw),
        (image(), raw.bfloat16(), raw.bfloat16().float()),
    ):
        wanted, found = panels(heads(image(), same)), panels(heads(below, values))
        assert titles(found) == titles(wanted)
        for (_, pixels), (_, expected) in zip(found[0], wanted[0], strict=True):
            assert np.array_equal(pixels, expected)


def test_nothing_global_changes_and_nothing_is_kept(image, maps):
    import matplotlib

    before = dict(matplotlib.rcParams)
    heads(image(), maps(2, *R2G)).savefig("/dev/null", format="png")
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, numpy as np, i2am.plots as p;"
        "p.heads(np.zeros((4, 4, 3), np.uint8), np.eye(3)[None]);"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


LAYERS = [f"down_blocks.{n}.attentions.{n % 2}.transformer_blocks.0.attn2" for n in range(9)]


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(
            lambda image, maps: layers(image(), maps(9, 4, 3), LAYERS, heading="R2G. " * 30),
            id="long-names",
        ),
        pytest.param(
            lambda image, maps: heads(image((20, 60)), maps(8, 4, 9), labels=["wide"]), id="wide"
        ),
        pytest.param(
            lambda image, maps: time_and_head(image((60, 20)), maps(9, 3), heading="One, tall"),
            id="narrow",
        ),
        pytest.param(
            lambda image, maps: specific_reference(
                image(), image(), maps(3, *R2G), [None] * 3, truths=[(0, 1)] * 3, names=["a"] * 3
            ),
            id="patches",
        ),
    ],
)
def test_no_text_is_cut_off_and_no_titles_touch(image, maps, draw):
    figure = draw(image, maps)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    for text in texts:
        left, bottom, right, top = text.get_window_extent().extents
        assert left >= 0, text
        assert bottom >= 0, text
        assert right <= figure.bbox.width, text
        assert top <= figure.bbox.height, text
    titles = [place.title for place in figure.axes[:-1] if place.get_title()]
    boxes = [title.get_window_extent() for title in titles]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number]), titles[number]


def test_a_notebook_shows_a_figure(image, maps):
    from PIL import Image

    figure = heads(image(), maps(2, *R2G))
    with Image.open(io.BytesIO(figure._repr_png_())) as shown:
        assert shown.size == tuple(int(150 * side) for side in figure.get_size_inches())


def test_resized_keeps_the_shape_and_enlarged_never_shrinks(image):
    assert resized(image((30, 20)), 60).shape == (60, 40, 3)
    assert resized(image((300, 1)), 3).shape == (3, 1, 3)
    assert enlarged(image((10, 20))).shape == (SIDE // 2, SIDE, 3)
    large = image((SIDE + 1, 3))
    assert np.array_equal(enlarged(large), large)
    with pytest.raises(ValueError, match="side must be at least 1, got 0"):
        resized(image(), 0)


PIXELS = np.zeros((8, 6, 3), np.uint8)
MAPS = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))
BROKEN = MAPS.clone()
BROKEN[1, 0, 0] = torch.nan
ONE = (MAPS[:1], [(0, 0, 2, 2)])
BOTH = {"reference": PIXELS, "reference_maps": [None]}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        pytest.param(
            lambda: heads(PIXELS / 255, MAPS),
            r"image must be a uint8 picture .* got float64",
            id="float-image",
        ),
        pytest.param(
            lambda: heads([PIXELS, PIXELS[..., 0]], MAPS),
            r"image\[1\] must be a uint8",
            id="grey-image",
        ),
        pytest.param(lambda: heads([], []), r"image must hold at least one picture", id="no-image"),
        pytest.param(
            lambda: heads(PIXELS, MAPS[0]),
            r"maps must be \[heads, height, width\], got shape \(4, 3\)",
            id="no-head-axis",
        ),
        pytest.param(lambda: heads(PIXELS, MAPS[:0]), r"maps must be \[heads, ", id="no-heads"),
        pytest.param(
            lambda: time_groups(PIXELS, BROKEN),
            r"maps must be finite, got NaN or infinite values in 1 of 2 maps",
            id="nan",
        ),
        pytest.param(
            lambda: heads([PIXELS], [BROKEN]), r"maps\[0\] must be finite", id="nan-in-one"
        ),
        pytest.param(
            lambda: heads(PIXELS, [[0, 1], [2]]), r"maps must be one array, got parts", id="ragged"
        ),
        pytest.param(
            lambda: heads(PIXELS, MAPS.numpy().astype(str)),
            r"maps must hold real numbers",
            id="text",
        ),
        pytest.param(
            lambda: heads([PIXELS] * 3, [MAPS] * 2),
            r"maps must be as many as pictures in image, got 2 for 3",
            id="fewer-maps",
        ),
        pytest.param(
            lambda: heads([PIXELS], None),
            r"maps must hold maps per picture, got NoneType",
            id="no-maps",
        ),
        pytest.param(
            lambda: heads(PIXELS, MAPS, labels=("a", "b")),
            r"labels must be as many as rows",
            id="labels",
        ),
        pytest.param(
            lambda: heads(PIXELS, MAPS, name=("a", "b")), r"name must be as many as rows", id="name"
        ),
        pytest.param(
            lambda: heads(PIXELS, MAPS, style="jet"),
            r"style must be 'default' or 'paper'",
            id="style",
        ),
        pytest.param(
            lambda: heads(PIXELS, MAPS, threshold=1),
            r"threshold must be None or in \[0, 1\)",
            id="threshold",
        ),
        pytest.param(
            lambda: heads(PIXELS, MAPS, preset="mine"), r"preset must be 'paper'", id="preset"
        ),
        pytest.param(
            lambda: time_groups(PIXELS, MAPS, steps=1),
            r"steps must be at least the 2 time groups, got 1",
            id="few-steps",
        ),
        pytest.param(
            lambda: time_groups(PIXELS, MAPS, steps=[2, 2]),
            r"steps must be as many as rows",
            id="steps-per-row",
        ),
        pytest.param(
            lambda: layers(PIXELS, MAPS, ["a"]),
            r"names must be as many as layers, got 1 for 2",
            id="layer-names",
        ),
        pytest.param(
            lambda: layers(PIXELS, MAPS, [["a", "b"]] * 2),
            r"names must be as many as rows",
            id="names-per-row",
        ),
        pytest.param(
            lambda: time_and_head(PIXELS, MAPS), r"maps must be \[height, width\]", id="maps-axes"
        ),
        pytest.param(
            lambda: time_and_head(PIXELS, MAPS[0], reference=PIXELS),
            r"reference and reference_maps must be given together",
            id="half-a-direction",
        ),
        pytest.param(
            lambda: time_and_head(PIXELS, MAPS[0], reference=[PIXELS] * 2, reference_maps=MAPS),
            r"reference must be as many as generated, got 2 for 1",
            id="references",
        ),
        pytest.param(
            lambda: time_and_head(PIXELS, MAPS[0], reference=PIXELS, reference_maps=BROKEN[1]),
            r"reference_maps must be finite",
            id="nan-on-reference",
        ),
        pytest.param(
            lambda: reference_maps(PIXELS, MAPS[0], MAPS),
            r"time_maps must be \[time groups",
            id="time-axis",
        ),
        pytest.param(
            lambda: reference_maps(PIXELS, MAPS, BROKEN),
            r"head_maps must be finite",
            id="nan-heads",
        ),
        pytest.param(
            lambda: reference_maps(PIXELS[0], MAPS, MAPS),
            r"reference\[0\] must be a uint8",
            id="reference-picture",
        ),
        pytest.param(
            lambda: specific_reference(PIXELS, PIXELS, MAPS, [None]),
            r"boxes must be as many as maps, got 1 for 2",
            id="boxes",
        ),
        pytest.param(
            lambda: specific_reference(PIXELS, PIXELS, MAPS[:1], [(0, 0, 9, 2)]),
            r"boxes\[0\] must be \(top, left, height, width\) inside the 8 x 6 generated",
            id="box-outside",
        ),
        pytest.param(
            lambda: specific_reference(PIXELS, PIXELS, MAPS[:1], [(0, 0, 0, 2)]),
            r"boxes\[0\] must be",
            id="box-empty",
        ),
        pytest.param(
            lambda: specific_reference(PIXELS, PIXELS, *ONE, names=("a", "b")),
            r"names must be as many as maps",
            id="region-names",
        ),
        pytest.param(
            lambda: specific_reference(PIXELS, PIXELS, *ONE, truths=[(0.5, 2)]),
            r"truths\[0\] must be fractions in \[0, 1\]",
            id="truth-outside",
        ),
        pytest.param(
            lambda: specific_reference(PIXELS, PIXELS, BROKEN[1:], ONE[1]),
            r"maps must be finite",
            id="nan-region",
        ),
        pytest.param(
            lambda: models(["a", "b"], [PIXELS], MAPS[:1], **BOTH),
            r"names must be as many as generated, got 2 for 1",
            id="model-names",
        ),
        pytest.param(
            lambda: models(["a"], [PIXELS], MAPS[:1], reference=PIXELS, reference_maps=[]),
            r"reference_maps must be as many as generated",
            id="model-maps",
        ),
        pytest.param(
            lambda: models(["a"], [PIXELS], MAPS[:1], reference=PIXELS, reference_maps=[BROKEN[1]]),
            r"reference_maps\[0\] must be finite",
            id="nan-model",
        ),
        pytest.param(
            lambda: models(["a"], [PIXELS], MAPS[0], **BOTH),
            r"maps must be as many",
            id="model-axes",
        ),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_without_matplotlib_one_sentence_names_the_extra(image, maps, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "i2am.plots.shown", raising=False)
    with pytest.raises(
        ImportError, match=r'figures need matplotlib .* pip install "i2am\[plots\]"'
    ):
        heads(image(), maps(2, *R2G))


BYTES = """
import hashlib, io, numpy as np, torch, i2am.plots as p
image = np.random.default_rng(0).integers(0, 256, (48, 36, 3), dtype=np.uint8)
maps = torch.rand(2, 8, 6, generator=torch.Generator().manual_seed(0))
for figure in (
    p.heads(image, maps, heading="the same"),
    p.specific_reference(image, image, maps[:1], [(4, 4, 8, 8)], style="paper"),
):
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    print(hashlib.sha256(file.getvalue()).hexdigest())
"""


def test_png_bytes_are_the_same_in_two_processes(fork):
    first, second = (fork(BYTES).communicate()[0].split() for _ in range(2))
    assert first == second
    assert len(set(first)) == 2
