import numpy as np
import pytest

from i2am.plots import contact_sheet, heat, overlay

BLUE = (0, 90, 200)


def picture(height=20, width=30, colour=(100, 100, 100)):
    return np.full((height, width, 3), colour, dtype=np.uint8)


def luminance(colours):
    linear = (np.asarray(colours) / 255) ** 2.2
    return linear @ [0.2126, 0.7152, 0.0722]


def test_heat_runs_from_black_to_pale_yellow_and_brightens_all_the_way():
    colours = heat(np.linspace(0, 1, 256)[None])[0]
    assert colours[0].tolist() == [0, 0, 4]
    assert colours[-1].tolist() == [252, 255, 164]
    assert (np.diff(luminance(colours)) > -1e-4).all()
    assert (np.diff(luminance(colours[::8])) > 0).all()


def test_heat_colours_each_cell_by_its_own_value():
    values = np.array([[0.0, 0.25], [0.5, 1.0]])
    whole = heat(values)
    assert whole.dtype == np.uint8
    assert whole.shape == (2, 2, 3)
    for index in np.ndindex(2, 2):
        assert (whole[index] == heat(values[index].reshape(1, 1))[0, 0]).all()


def test_overlay_keeps_the_image_where_the_map_is_zero_and_shows_heat_where_it_is_high():
    values = np.zeros((20, 30))
    values[:, 15:] = 0.8
    grey = picture()
    result = overlay(grey, values, alpha=1.0)
    assert (result[:, :15] == grey[:, :15]).all()
    assert (result[:, 15:] == heat(values)[:, 15:]).all()


def test_overlay_with_alpha_zero_is_the_same_picture_for_every_map():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (8, 9, 3)).astype(np.uint8)
    first = overlay(image, generator.random((8, 9)), alpha=0)
    second = overlay(image, np.zeros((8, 9)), alpha=0.85)
    assert (first == second).all()
    assert not (first == image).all()  # colours recede, so that those of the map stand out


def test_overlay_of_a_tall_image_is_that_of_its_parts():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (150, 9, 3)).astype(np.uint8)
    values = generator.random((150, 9))
    whole = overlay(image, values)
    for row in range(150):
        assert (whole[row] == overlay(image[row : row + 1], values[row : row + 1])[0]).all()


def test_overlay_leaves_its_arguments_alone():
    image, values = picture(), np.full((20, 30), 0.7)
    overlay(image, values)
    assert (image == 100).all()
    assert (values == 0.7).all()


def cells(sheet, colour):
    """Bounding boxes ``(top, left, height, width)`` of the plain rectangles of a colour."""
    hit = (sheet == colour).all(-1)
    rows, columns = np.where(hit)
    return rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1


def test_contact_sheet_places_every_tile_whole_and_in_reading_order():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    tiles = [picture(40, 100, colour) for colour in colours]
    sheet = contact_sheet(tiles, ["red", "green", "blue"], columns=2, color_bar=False)
    red, green, blue = (cells(sheet, colour) for colour in colours)
    for box in (red, green, blue):
        assert box[2:] == (40, 100)
    assert red[0] == green[0]
    assert red[1] + 100 < green[1]
    assert blue[0] > red[0] + 40
    assert blue[1] == red[1]


def test_contact_sheet_writes_titles_above_tiles_and_inside_the_sheet():
    long = "reference to generated, mask votes, steps 41 to 50 of 50"
    plain = contact_sheet([picture(40, 100, BLUE)], [""], columns=1, color_bar=False)
    titled = contact_sheet([picture(40, 100, BLUE)], [long], columns=1, color_bar=False)
    assert titled.shape[1] == plain.shape[1]
    assert titled.shape[0] > plain.shape[0]  # broken into lines, not cut
    ink = np.where(titled.max(-1) < 90)
    assert ink[0].size > 100
    top = cells(titled, BLUE)[0]
    assert ink[0].max() < top
    assert ink[1].max() < titled.shape[1] - 8


def test_contact_sheet_cuts_only_a_word_wider_than_its_column():
    sheet = contact_sheet([picture(40, 100, BLUE)], ["x" * 300], columns=1, color_bar=False)
    dark = np.where(sheet.max(-1) < 90)
    assert dark[1].max() < 12 + 100 + 1


def test_contact_sheet_shows_the_scale_of_heat():
    sheet = contact_sheet([picture(40, 300)], ["tile"], columns=1)
    bar = heat(np.linspace(0, 1, 256)[None])[0]
    assert any((row[12 : 12 + 256] == bar).all() for row in sheet)


def test_contact_sheet_heading_adds_lines_above_everything():
    tiles = [picture(40, 100, BLUE)]
    without = contact_sheet(tiles, ["a"], columns=1)
    headed = contact_sheet(tiles, ["a"], columns=1, heading="what this is")
    extra = headed.shape[0] - without.shape[0]
    assert extra > 0
    assert cells(headed, BLUE)[0] == cells(without, BLUE)[0] + extra


@pytest.mark.parametrize(
    ("call", "match"),
    [
        pytest.param(lambda: heat(np.zeros(4)), r"values must be a map", id="one-axis"),
        pytest.param(lambda: heat(np.zeros((0, 4))), r"values must be a map", id="empty"),
        pytest.param(lambda: heat([[0, np.nan]]), r"values must be finite, got 1 ", id="nan"),
        pytest.param(lambda: heat([[0, 1.5]]), r"values must be in \[0, 1\], got 0 to 1.5", id="2"),
        pytest.param(lambda: heat([[-1, 0]]), r"values must be in \[0, 1\]", id="negative"),
        pytest.param(
            lambda: overlay(np.zeros((4, 4, 3)), np.zeros((4, 4))),
            r"image must be a uint8 picture .* got float64",
            id="float-image",
        ),
        pytest.param(
            lambda: overlay(picture(4, 4)[..., 0], np.zeros((4, 4))),
            r"image must be a uint8 picture",
            id="grey-image",
        ),
        pytest.param(
            lambda: overlay(picture(4, 4), np.zeros((4, 5))),
            r"height and width \(4, 4\), got \(4, 5\)",
            id="sizes-differ",
        ),
        pytest.param(
            lambda: overlay(picture(4, 4), np.zeros((4, 4)), alpha=2),
            r"alpha must be in \[0, 1\], got 2",
            id="alpha",
        ),
        pytest.param(lambda: contact_sheet([], [], columns=1), r"at least one", id="no-tiles"),
        pytest.param(
            lambda: contact_sheet([picture()], [], columns=1),
            r"titles must be as many",
            id="titles",
        ),
        pytest.param(
            lambda: contact_sheet([picture()], ["a"], columns=0), r"columns must be", id="columns"
        ),
        pytest.param(
            lambda: contact_sheet([np.zeros((4, 4))], ["a"], columns=1), r"tiles\[0\]", id="tile"
        ),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()
