import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from i2am.cli.errors import ExitCode
from i2am.data.paper_doll import PARTS, render

demo = importlib.import_module("i2am.cli.demo")
INPUTS = {"person", "mask", "pose", "reference", "reference_mask", "truth"}


def test_inputs_are_a_person_in_one_garment_and_another_garment(tmp_path):
    demo.make_inputs(tmp_path / "scene", 3, 105)
    images = {path.stem: np.asarray(Image.open(path)) for path in tmp_path.glob("scene/*.png")}
    assert set(images) == INPUTS
    own, wanted = render([3], split="test"), render([3], split="test", garments=[105])
    for name, pixels in {"person": own.image, "truth": wanted.image}.items():
        expected = (pixels[0].permute(1, 2, 0) * 255).round().byte().numpy()
        np.testing.assert_array_equal(images[name], expected)
    # outside the mask nothing differs, inside the garment does: nothing of it is given away
    different = (images["person"] != images["truth"]).any(-1)
    assert not different[images["mask"] == 0].any()
    assert different[images["mask"] == 255].mean() > 0.2


def test_patches_lie_on_their_parts_and_know_their_true_places():
    scene = render([0], split="test", garments=[101])
    boxes = demo.pick_patches(scene)
    assert [box.name for box in boxes] == [*demo.PATCHES]
    assert len({(box.top, box.left) for box in boxes}) == len(boxes)
    for box in boxes:
        rows, columns = slice(box.top, box.top + 8), slice(box.left, box.left + 8)
        label = PARTS.index(demo.PATCHES[box.name])
        assert (scene.parts[0, rows, columns] == label).any()
        flow = scene.flow[0, :, rows, columns].flatten(1)
        places = flow[:, ~flow.isnan().any(0)]
        np.testing.assert_allclose(box.truth, places.mean(1), atol=1e-6)
        assert places.amin(1)[0] <= box.truth[0] <= places.amax(1)[0]


def test_a_part_that_does_not_show_has_no_patch():
    scene = render([0], split="test", garments=[101])
    without_logo = scene._replace(
        parts=torch.where(scene.parts == PARTS.index("logo"), PARTS.index("torso"), scene.parts)
    )
    names = [box.name for box in demo.pick_patches(without_logo)]
    assert names == ["left_sleeve", "right_sleeve"]


@pytest.mark.parametrize("pair", demo.PAIRS)
def test_every_scene_of_the_demo_asks_about_four_patches(pair, tmp_path):
    assert len(demo.make_inputs(tmp_path / "scene", *pair)) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left")], ids=repr)
def test_stopped_demo_leaves_nothing(error, run_here, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr("i2am.cli.recording._run", stop)
    done = run_here(["demo", "-o", str(tmp_path / "demo")])
    assert done.code in (ExitCode.INTERRUPTED, ExitCode.IO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_demo_runs_twice_and_tells_what_to_see(run_here, tmp_path):
    out = tmp_path / "demo"
    first = run_here(["demo", "--steps", "5", "-o", str(out)])
    assert first.code == ExitCode.DONE, first.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    assert "Open report.html in a browser" in first.out
    assert (out / "overview.png").is_file()
    # one page for all scenes, and one with each
    for page in ("report.html", *(f"scene_{number}/report.html" for number in (1, 2, 3))):
        assert (out / page).stat().st_size > 100_000
        assert page.partition("/")[2] in first.out
    for number in range(1, 1 + len(demo.PAIRS)):
        scene = out / f"scene_{number}"
        run = json.loads((scene / "run.json").read_text())
        for given in run["inputs"].values():
            assert (scene / given["file"]).is_file()
        assert str(scene) in first.out
        assert ("has random weights" in first.out) is not run["model"]["trained"]
        for name in ("overview.png", "time_groups.png", "heads.png", "region_left_sleeve.png"):
            assert (scene / name).is_file()
            assert name in first.out
        # what lies outside the mask is the person, to the last level
        mask = np.asarray(Image.open(out / "inputs" / scene.name / "mask.png")) > 127
        person = np.asarray(Image.open(out / "inputs" / scene.name / "person.png"))
        generated = np.asarray(Image.open(scene / "image.png"))
        np.testing.assert_array_equal(generated[~mask], person[~mask])

    again = run_here(["demo", "--steps", "5", "-o", str(out)])
    assert again.code == ExitCode.CONFLICT
    assert "--overwrite" in again.err
    assert run_here(["demo", "--steps", "5", "--overwrite", "-o", str(out)]).code == ExitCode.DONE
