import importlib
import json

import numpy as np
import pytest
from PIL import Image

from i2am.cli.errors import ExitCode

demo = importlib.import_module("i2am.cli.demo")


def test_inputs_are_photographs_and_masks_of_their_sizes(tmp_path):
    demo.make_inputs(tmp_path / "inputs")
    images = {path.stem: Image.open(path) for path in tmp_path.glob("inputs/*.png")}
    assert set(images) == {"person", "mask", "reference", "reference_mask"}
    assert images["person"].size == images["mask"].size
    assert images["reference"].size == images["reference_mask"].size
    # photographs, not drawings: thousands of colours
    assert len(images["person"].getcolors(1 << 24)) > 10_000
    # the model's shape, so that nothing is stretched
    for name in ("person", "reference"):
        width, height = images[name].size
        assert width / height == pytest.approx(96 / 128, abs=0.005)
    for name in ("mask", "reference_mask"):
        assert 0.2 < np.asarray(images[name]).mean() / 255 < 0.7


def test_the_suit_is_orange_and_the_cup_is_not_the_table(tmp_path):
    demo.make_inputs(tmp_path / "inputs")
    person = np.asarray(Image.open(tmp_path / "inputs" / "person.png")).astype(float)
    suit = np.asarray(Image.open(tmp_path / "inputs" / "mask.png")) > 0
    orange = (person[..., 0] > person[..., 2] + 60).astype(float)
    assert orange[suit].mean() > 0.6
    assert orange[~suit].mean() < 0.2


def test_without_scikit_image_it_says_what_to_install(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    done = run_here(["demo", "-o", str(tmp_path / "demo")])
    assert done.code == ExitCode.REJECTED
    assert 'pip install "i2am[demo]"' in done.err
    assert list(tmp_path.iterdir()) == []


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
    run = json.loads((out / "pocket" / "run.json").read_text())
    for given in run["inputs"].values():
        assert (out / "pocket" / given["file"]).is_file()
    assert str(out / "pocket") in first.out
    assert ("has random weights" in first.out) is not run["model"]["trained"]
    for name in ("overview.png", "time_groups.png", "heads.png", "region_badge.png"):
        assert (out / "pocket" / name).is_file()
        assert name in first.out

    again = run_here(["demo", "--steps", "5", "-o", str(out)])
    assert again.code == ExitCode.CONFLICT
    assert "--overwrite" in again.err
    assert run_here(["demo", "--steps", "5", "--overwrite", "-o", str(out)]).code == ExitCode.DONE
