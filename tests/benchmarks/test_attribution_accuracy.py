"""The benchmark of attribution accuracy: its parts by hand, and a whole run on a few scenes."""

import hashlib
import json
import math

import attribution_accuracy
import pytest
import torch
from accuracy import evaluating, paint, places, reading, tables
from click.testing import CliRunner

from i2am.attribution import Accumulator, AttributionMaps
from i2am.data.paper_doll import render
from i2am.models import POCKET, save_pocket_weights
from i2am.testing import make_maps, make_site

pytestmark = pytest.mark.slow  # they test no product

GRID = (16, 12)


@pytest.fixture(scope="module")
def scenes():
    return render(range(3), split="test")


def cells_by_hand(scenes, share):
    """(scene, cell, (y, x) in cells) of every query cell, pixel by pixel."""
    found = []
    for scene in range(len(scenes.image)):
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                pixels = [
                    scenes.flow[scene, :, y, x].double()
                    for y in range(8 * row, 8 * row + 8)
                    for x in range(8 * column, 8 * column + 8)
                    if scenes.garment_region[scene, y, x] > 0
                ]
                if len(pixels) > share * 64:
                    mean = torch.stack(pixels).mean(0) * torch.tensor(GRID)
                    found.append((scene, 12 * row + column, mean))
    return found


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_query_cells_show_the_garment_and_know_the_mean_of_their_flow(scenes, share):
    found = places.query_places(scenes, share=share)
    wanted = cells_by_hand(scenes, share)
    assert [(s, c) for s, c, _ in wanted] == list(
        zip(found.scene.tolist(), found.cell.tolist(), strict=True)
    )
    assert len(wanted) > 30
    torch.testing.assert_close(found.true, torch.stack([place for *_, place in wanted]))


def test_guesses_are_right_as_often_as_counted_by_hand(scenes):
    count = {name: [0.0, 0.0] for name in ("chance", "garment", "centre", "same")}
    cells = cells_by_hand(scenes, 0.5)
    for scene, cell, (y, x) in cells:
        masked = scenes.garment_mask[scene].nonzero().double() + 0.5
        cy, cx = masked.mean(0) / 8
        for number, share in enumerate((0.05, 0.1)):
            limit = share * math.hypot(*GRID)
            near = [
                math.hypot(r + 0.5 - y, c + 0.5 - x) <= limit for r in range(16) for c in range(12)
            ]
            count["chance"][number] += sum(near) / 192
            weights = scenes.garment_mask[scene].unflatten(0, (16, 8)).unflatten(2, (12, 8))
            weights = weights.mean((1, 3)).flatten()
            count["garment"][number] += float(weights[torch.tensor(near)].sum() / weights.sum())
            # cells weigh a garment's area exactly, but hold it in their middle
            count["centre"][number] += math.hypot(cy - y, cx - x) <= limit
            count["same"][number] += near[cell]
    found = evaluating.without_a_model([0, 1, 2], split="test", batch=2)
    for name, title, tolerance in (
        ("chance", "uniform chance", 1e-9),
        ("garment", "uniform on the garment", 1e-6),
        ("centre", "garment centre", 2 / len(cells)),
        ("same", "same image position", 1e-9),
    ):
        wanted = {p: n / len(cells) for p, n in zip(("5", "10"), count[name], strict=True)}
        assert found["baselines"][title] == pytest.approx(wanted, abs=tolerance), name
    assert found["areas"]["mask"] == pytest.approx(float(scenes.mask.mean()))
    assert found["areas"]["garment"] == pytest.approx(float(scenes.garment_mask.mean()))


def test_views_are_what_the_maps_say_themselves():
    sites = [
        make_site(f"up_blocks.{i}.attn2", grid, (4, 3)) for i, grid in enumerate([(4, 3), (2, 2)])
    ]
    region = reading.patch(0)
    maps = make_maps(sites, samples=3, time_groups=2, regions=[region])
    names = reading.view_names(maps)
    read = reading.views(maps.specific_reference(region, per=("time", "layer", "head")))
    assert len(names) == len(read) == 1 + 2 + 2 + 2 + 4
    by_name = dict(zip(names, read, strict=True))
    same = torch.testing.assert_close
    same(by_name["all"], maps.specific_reference(region))
    for i, layer in enumerate(maps.layers):
        same(by_name[f"layer {layer}"], maps.specific_reference(region, per="layer")[:, i])
        heads = maps.select(layers=layer).specific_reference(region, per="head")
        for head in range(2):
            same(by_name[f"layer {layer} head {head}"], heads[:, head])
    for i in range(2):
        same(by_name[f"head {i}"], maps.specific_reference(region, per="head")[:, i])
        same(by_name[f"time group {i}"], maps.specific_reference(region, per="time")[:, i])


def recorded(looks_at, cells):
    """Maps of a model whose query cells look at ``looks_at`` ``[samples, 192]``, sharply."""
    key = torch.eye(192).expand(len(looks_at), 2, -1, -1)
    query = torch.eye(192)[looks_at][:, None].expand(-1, 2, -1, -1)
    accumulator = Accumulator(time_groups=1, regions=[reading.patch(cell) for cell in cells])
    site = make_site("up_blocks.1.attn2", GRID, GRID)
    accumulator.add(site, query, key, group=0, scale=20.0)
    return AttributionMaps(
        accumulator.layers(), votes=accumulator.votes, rows=accumulator.rows, provenance={}
    )


def test_a_model_that_looks_at_the_truth_is_right_and_a_shuffled_one_is_not(scenes):
    asked = places.query_places(scenes)
    looks_at = torch.zeros(3, 192, dtype=torch.int64)
    true_cells = asked.true.floor().long().clamp(max=torch.tensor([15, 11]))
    looks_at[asked.scene, asked.cell] = 12 * true_cells[:, 0] + true_cells[:, 1]
    maps = recorded(looks_at, asked.cell.unique().tolist())

    def accuracy(true):
        positions = reading.read_positions(maps, asked)
        views = reading.view_names(maps)
        return evaluating.Measured(maps.layers, views, positions, true, asked.scene, {}, {})

    right = accuracy(asked.true)
    assert right.accuracy("all") == {how: {"5": 1, "10": 1} for how in ("peak", "centroid")}
    assert right.standard_errors()["peak"] == {"5": 0, "10": 0}
    assert right.best_layer() == "up_blocks.1.attn2"
    shuffle = torch.randperm(len(asked.true), generator=torch.Generator().manual_seed(0))
    wrong = accuracy(asked.true[shuffle]).accuracy("all")
    # the garment's own chance, far above that of the whole picture
    assert wrong["peak"]["10"] < 0.35
    assert wrong["peak"]["5"] < 0.15


def test_the_best_layer_is_that_of_the_centroid():
    """Both layers have right peaks; the mass of one is elsewhere."""
    true = torch.full((4, 2), 3.5)
    positions = {
        "peak": true.expand(3, 4, 2),
        "centroid": torch.stack([true, true + 9, true + 0.5]),
    }
    views = ["all", "layer a", "layer b"]
    measured = evaluating.Measured(("a", "b"), views, positions, true, torch.arange(4), {}, {})
    assert measured.best_layer() == "b"


def test_a_spot_has_inverse_colours_and_its_place():
    garments = torch.rand(2, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    painted = paint.paint(garments, torch.tensor([[4.0, 5.5], [15.75, 0.5]]))
    changed = (painted != garments).any(1)
    wanted = torch.zeros(2, 128, 96, dtype=torch.bool)
    wanted[0, 24:40, 36:52] = True
    wanted[1, 118:, :12] = True
    assert torch.equal(changed, wanted)
    torch.testing.assert_close(painted[0, :, 24:40, 36:52], 1 - garments[0, :, 24:40, 36:52])


def test_a_change_is_measured_where_it_is(scenes):
    asked = places.query_places(scenes)
    first = [int((asked.scene == scene).nonzero()[5]) for scene in range(3)]
    cells = asked.cell[first]
    change = torch.full((3, 128, 96), 0.01, dtype=torch.float64)
    row, column = divmod(int(cells[0]), 12)
    change[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0.5
    change[1, :8, :8] = 0.5  # a corner, far from the shirt
    measured = paint._measure(change, cells, scenes)
    assert measured["change_at_patch"].tolist() == pytest.approx([0.5, 0.01, 0.01])
    assert measured["rank_on_shirt"].tolist() == [0, 0, 0]
    assert measured["largest_near"].tolist()[:2] == [1, 0]
    # all cells of the shirt but the asked one change more
    change = 1 - change
    assert paint._measure(change, cells, scenes)["rank_on_shirt"][0] == 1


def test_a_random_spot_is_far_from_the_true_one_and_on_the_garment(scenes):
    for sample in range(3):
        cell, true, random = paint._ask(scenes, sample, seed=sample)
        again = paint._ask(scenes, sample, seed=sample)
        assert again[0] == cell
        assert torch.equal(again[2], random)
        assert (random - true).norm() * 8 >= 28
        y, x = (random * 8).long().tolist()
        assert scenes.garment_mask[sample, y - 4 : y + 4, x - 4 : x + 4].mean() > 0.5


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pocket.safetensors"
    save_pocket_weights(POCKET.build(1), path)
    return path


FEW = ["--scenes", "2", "--selection-scenes", "1", "--swap-scenes", "2", "--paint-scenes", "2"]
FEW += ["--steps", "5", "--paint-steps", "5"]


def run(*options):
    return CliRunner().invoke(attribution_accuracy.main, [str(option) for option in options])


def test_a_run_writes_every_figure_and_prints_tables(tmp_path, weights):
    out = tmp_path / "accuracy.json"
    done = run("--weights", weights, "-o", out, *FEW)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert list(tmp_path.iterdir()) == [out]
    assert set(result["models"]) == {"trained", "untrained"}
    assert result["weights"] == {
        "name": "pocket.safetensors",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    assert result["settings"]["scenes"] == 2
    alone = evaluating.without_a_model([0, 1], split="test", batch=9)
    assert {name: result[name] for name in alone} == alone
    two = render([0, 1], split="test")
    for model in result["models"].values():
        assert model["query_cells"] == len(cells_by_hand(two, 0.5))
        assert model["best_layer"] in model["scores"]
        assert len(model["accuracy"]) == 1 + 3 + 4 + 5 + 12
        for of in model["accuracy"].values():
            for how in ("peak", "centroid"):
                assert 0 <= of[how]["5"] <= of[how]["10"] <= 1
        layers = model["scores"].keys() - {"all"}
        assert len(layers) == 3
        assert {f"layer {layer}" for layer in layers} < set(model["accuracy"])
        for of in model["scores"].values():
            assert set(of) == set(tables.SCORES)
        assert set(model["pictures"]) == {
            "generated",
            "mean garment colour",
            "autoencoder round trip",
            "wrong garment",
            "unpaired",
            "unpaired mean garment colour",
        }
        assert model["paint"]["scenes"] == 2
        assert model["paint"]["ratio_peak_to_random"] == pytest.approx(
            model["paint"]["peak"]["change_at_patch"] / model["paint"]["random"]["change_at_patch"]
        )
    assert tables.tables(result) in done.output
    for title in ("trained, all layers", "guess: same image position", "IMACS_r", "wrong garment"):
        assert title in done.output


def test_a_scene_does_not_depend_on_its_batch(tmp_path, weights):
    results = []
    for batch in (1, 2):
        out = tmp_path / f"{batch}.json"
        done = run("--weights", weights, "-o", out, *FEW, "--batch", batch, "--skip-untrained")
        assert done.exit_code == 0, done.output
        results.append(json.loads(out.read_text())["models"])
    one, two = (result["trained"] for result in results)
    assert set(results[0]) == {"trained"}
    assert one["accuracy"]["all"] == two["accuracy"]["all"]
    for picture, of in one["pictures"].items():
        assert of == pytest.approx(two["pictures"][picture], abs=1e-5)
    for layer, of in one["scores"].items():
        assert of == pytest.approx(two["scores"][layer], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "missing.safetensors"], "missing.safetensors does not exist"),
        (["--weights", __file__, "-o", "missing/a.json"], "missing does not exist"),
        (["--weights", __file__], "test_attribution_accuracy.py"),
        (["--weights", __file__, "--steps", "2"], "2 is not in the range x>=5"),
    ],
)
def test_a_wrong_option_is_refused_before_the_work(options, message):
    done = run(*options)
    assert done.exit_code == 2
    assert message in done.output


def test_without_weights_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(attribution_accuracy, "pocket_weights", lambda: None)
    done = run()
    assert done.exit_code == 2
    assert "--weights must name a file: the package has no trained weights" in done.output
