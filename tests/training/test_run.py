"""Whole trainings: resumed to the bit, killed and resumed, refused, finished, in two processes."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from i2am.files import OutputRefused
from i2am.files.atomic import temporary_name
from i2am.models import POCKET, load_pipeline, pocket_pipeline
from i2am.training.loop import Intervals, learning_rate
from i2am.training.recipe import POCKET_RECIPE, Optimisation, Recipe
from i2am.training.run import train

EVERY = Intervals(checkpoint=2, validate=0, log=1, keep=2)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _train(recipe: Recipe, out: Path, intervals: Intervals = EVERY) -> Path | None:
    return train(recipe, out, intervals, workers=0, progress=False)


def _weights(out: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((out / "pipeline").rglob("*.safetensors")):
        part = file.parent.name
        found |= {f"{part}.{name}": values for name, values in load_file(file).items()}
    return found


def _assert_same(first: Path, second: Path) -> None:
    weights, others = _weights(first), _weights(second)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def _log(out: Path, stage: str = "denoiser") -> list[dict[str, float]]:
    lines = (out / stage / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _without_time(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory) -> Path:
    """A training from beginning to end, not to be changed."""
    out = tmp_path_factory.mktemp("training") / "uninterrupted"
    _train(recipe(), out)
    return out


def test_a_finished_training(uninterrupted, recipe) -> None:
    pipeline = load_pipeline(uninterrupted / "pipeline")
    assert pipeline.trained
    assert Recipe.from_json((uninterrupted / "recipe.json").read_text()) == recipe()
    log = _log(uninterrupted)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    plan = recipe().denoiser.optimisation
    assert [line["lr"] for line in log] == [learning_rate(plan, step) for step in range(6)]
    assert sorted(os.listdir(uninterrupted / "denoiser")) == [
        "checkpoint-00000004.safetensors",
        "checkpoint-00000006.safetensors",
        "log.jsonl",
    ]
    # the averaged weights are what is kept
    last = load_file(uninterrupted / "denoiser" / "checkpoint-00000006.safetensors")
    weights = load_file(uninterrupted / "pipeline" / "unet" / WEIGHTS)
    assert torch.equal(weights["conv_out.weight"], last["ema/unet.conv_out.weight"])
    assert not torch.equal(weights["conv_out.weight"], last["model/unet.conv_out.weight"])


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_resumed_to_the_bit(uninterrupted, recipe, tmp_path, stop) -> None:
    out = tmp_path / "resumed"
    assert _train(recipe(), out, replace(EVERY, stop_after=stop)) is None
    assert not (out / "pipeline").exists()
    torch.rand(3)
    assert _train(recipe(), out) == out / "pipeline"
    _assert_same(out, uninterrupted)
    assert _without_time(_log(out)) == _without_time(_log(uninterrupted))


def test_resumed_from_the_one_before_a_torn_checkpoint(uninterrupted, recipe, tmp_path) -> None:
    out = tmp_path / "torn"
    _train(recipe(), out, replace(EVERY, stop_after=4))
    file = out / "denoiser" / "checkpoint-00000004.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    # a killed run also leaves half a line, and what it was writing
    with (out / "denoiser" / "log.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    (out / "denoiser" / temporary_name()).write_bytes(b"half")
    (out / temporary_name() / "unet").mkdir(parents=True)
    _train(recipe(), out)
    _assert_same(out, uninterrupted)
    assert _without_time(_log(out)) == _without_time(_log(uninterrupted))
    assert not list(out.rglob(".*"))


def test_nothing_is_written_through_a_link(recipe, tmp_path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    _train(recipe(), out, replace(EVERY, stop_after=1))
    (out / "denoiser").rename(elsewhere)
    (out / "denoiser").symlink_to(elsewhere)
    before = sorted(os.listdir(elsewhere))
    with pytest.raises(OutputRefused, match="denoiser is a link, and nothing is written through"):
        _train(recipe(), out)
    assert sorted(os.listdir(elsewhere)) == before


@pytest.mark.slow
def test_killed_and_resumed(fork, uninterrupted, recipe, tmp_path) -> None:
    out = tmp_path / "killed"
    out.mkdir()
    (tmp_path / "recipe.json").write_text(recipe().as_json())
    code = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from i2am.training.loop import Intervals; from i2am.training.recipe import Recipe\n"
        "from i2am.training.run import train\n"
        "recipe = Recipe.from_json(Path(sys.argv[1]).read_text())\n"
        "intervals = Intervals(checkpoint=2, validate=0, log=1, keep=2)\n"
        "train(recipe, Path(sys.argv[2]), intervals, workers=0, progress=False)\n"
    )
    run = fork(code, tmp_path / "recipe.json", out)
    # as soon as the first checkpoint is being written
    deadline = time.monotonic() + 300
    while not list(out.glob("denoiser/*checkpoint*")) and time.monotonic() < deadline:
        assert run.returncode is None
        time.sleep(0.002)
    run.kill()
    run.communicate()
    assert not (out / "pipeline").exists()
    again = fork(code, tmp_path / "recipe.json", out)
    _, err = again.communicate()
    assert again.returncode == 0, err
    _assert_same(out, uninterrupted)


def test_another_recipe_is_refused(uninterrupted, recipe) -> None:
    before = _weights(uninterrupted)
    message = r"holds a training with another denoiser.optimisation.learning_rate, seed; name"
    with pytest.raises(OutputRefused, match=message):
        _train(recipe(seed=1, learning_rate=0.5), uninterrupted)
    after = _weights(uninterrupted)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_folder_of_something_else_is_refused(recipe, tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputRefused, match=r"is not empty and holds no recipe.json"):
        _train(recipe(), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    (tmp_path / "recipe.json").write_text('{"flour": 500}')
    with pytest.raises(OutputRefused, match=r"recipe.json cannot be read"):
        _train(recipe(), tmp_path)


def test_a_finished_one_is_not_done_again(uninterrupted, recipe) -> None:
    times = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
    assert _train(recipe(), uninterrupted) == uninterrupted / "pipeline"
    assert times == {
        path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("which", ["all", "lite"])
def test_what_is_frozen_stays(recipe, tmp_path, build, which) -> None:
    _train(recipe(denoiser={"trainable": which}, ema=None), tmp_path / "run")
    before, after = (
        {
            f"{part}.{name}": values
            for part in ("vae", "unet", "image_encoder", "image_proj")
            for name, values in pipeline.components[part].state_dict().items()
        }
        for pipeline in (build(), load_pipeline(tmp_path / "run" / "pipeline"))
    )
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    if which == "all":
        frozen = {name for name in after if name.startswith("vae.")}
        frozen |= {"image_encoder.embeddings.mask_token"}
    else:
        trained = ("image_proj.", "unet.conv_in.")
        frozen = {x for x in after if not x.startswith(trained) and ".attn2." not in x}
    # the others have moved, but for a bias of keys: a softmax does not see it
    assert not changed & frozen
    assert not {name for name in set(after) - frozen - changed if not name.endswith("key.bias")}


def test_validation(recipe, tmp_path) -> None:
    pytest.importorskip("torchmetrics")
    _train(recipe(), tmp_path / "run", replace(EVERY, validate=4))
    lines = {line["step"]: line for line in _log(tmp_path / "run") if "x0_error" in line}
    assert list(lines) == [4, 6]
    assert all(0 < lines[6][name] < 100 for name in ("x0_error", "x0_error_wrong"))
    assert sorted(os.listdir(tmp_path / "run" / "panels")) == [
        "panel-00000004.png",
        "panel-00000006.png",
    ]


def test_validation_does_not_change_the_weights(uninterrupted, recipe, tmp_path) -> None:
    _train(recipe(), tmp_path / "run", replace(EVERY, validate=1))
    _assert_same(tmp_path / "run", uninterrupted)


def test_a_loss_that_is_not_finite_is_not_saved(recipe, tmp_path) -> None:
    wild = recipe(learning_rate=1e30, warmup=0, clip=0.0)
    with pytest.raises(FloatingPointError, match="the loss of the denoiser is nan at step"):
        _train(wild, tmp_path / "run", replace(EVERY, checkpoint=1, log=100))
    for file in (tmp_path / "run").glob("denoiser/checkpoint-*/ema.safetensors"):
        assert all(values.isfinite().all() for values in load_file(file).values())


def test_accumulated_steps_are_resumed_too(recipe, tmp_path) -> None:
    plan = {"accumulate": 3, "batch": 1, "ema": None}
    _train(recipe(**plan), tmp_path / "whole")
    _train(recipe(**plan), tmp_path / "parts", replace(EVERY, stop_after=3))
    _train(recipe(**plan), tmp_path / "parts")
    _assert_same(tmp_path / "whole", tmp_path / "parts")


def test_what_does_not_fit_is_refused(recipe, tmp_path) -> None:
    good = recipe()
    wrong = {
        "must be a built-in name": replace(good, model="nobody"),
        "paper-doll draws images of": replace(good, data="paper-doll", scenes=4),
        "autoencoder must be None": replace(good, autoencoder=POCKET_RECIPE.autoencoder),
        "scenes must be at most 6": replace(good, scenes=7),
    }
    for number, (message, case) in enumerate(wrong.items()):
        with pytest.raises(ValueError, match=message):
            _train(case, tmp_path / str(number))
    with pytest.raises(FileNotFoundError, match=r"train_pairs.txt is missing"):
        _train(replace(good, data=str(tmp_path)), tmp_path / "data")
    # what was refused left no folder behind
    assert not [path for path in tmp_path.iterdir() if (path / "recipe.json").exists()]


def test_intervals() -> None:
    for name, value in {
        "checkpoint": 0,
        "validate": -1,
        "log": 0,
        "keep": 0,
        "stop_after": 0,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be [01] or more, got {value}"):
            Intervals(**{name: value})


def test_learning_rate() -> None:
    plan = Optimisation(steps=110, batch=1, learning_rate=2.0, warmup=10, final_rate=0.1)
    assert learning_rate(plan, 0) == pytest.approx(0.2)
    assert learning_rate(plan, 9) == learning_rate(plan, 10) == pytest.approx(2.0)
    assert learning_rate(plan, 60) == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert learning_rate(plan, 110) == pytest.approx(0.2)
    constant = replace(plan, warmup=0, final_rate=1.0)
    assert {learning_rate(constant, step) for step in range(110)} == {2.0}


@pytest.mark.slow
def test_the_pocket_model_from_nothing(tmp_path) -> None:
    recipe = replace(POCKET_RECIPE, scenes=8)
    stages = {
        name: replace(
            getattr(recipe, name),
            optimisation=replace(getattr(recipe, name).optimisation, steps=4, batch=2),
        )
        for name in ("autoencoder", "denoiser")
    }
    recipe = replace(recipe, **stages)
    for out, stops in {"whole": [None], "parts": [1, 3, None]}.items():
        for stop in stops:
            _train(recipe, tmp_path / out, replace(EVERY, stop_after=stop))
    _assert_same(tmp_path / "whole", tmp_path / "parts")
    for stage in ("autoencoder", "denoiser"):
        lines = [_without_time(_log(tmp_path / out, stage)) for out in ("whole", "parts")]
        assert lines[0] == lines[1]
    # the file for the package holds the same model, in half precision
    packed = pocket_pipeline(weights=tmp_path / "whole" / "pocket.safetensors")
    full = load_pipeline(tmp_path / "whole" / "pipeline")
    assert packed.trained
    assert packed.scheduler.config.prediction_type == full.scheduler.config.prediction_type
    assert packed.vae.config.scaling_factor == full.vae.config.scaling_factor == 1
    assert (tmp_path / "whole" / "pocket.safetensors").stat().st_size < 8e6
    for name in ("unet", "vae"):
        state, other = packed.components[name].state_dict(), full.components[name].state_dict()
        assert all(torch.equal(state[key], other[key].half().float()) for key in state)
    fresh = POCKET.build(recipe.seed).unet.state_dict()
    assert not torch.equal(full.unet.state_dict()["conv_in.weight"], fresh["conv_in.weight"])


TWO = """
import sys, torch
from pathlib import Path
from accelerate import Accelerator
torch.set_num_threads(1)
from i2am.training.loop import Intervals
from i2am.training.recipe import Recipe
from i2am.training.run import train
recipe = Recipe.from_json(Path(sys.argv[1]).read_text())
train(recipe, Path(sys.argv[2]), Intervals(2, 0, 1), workers=0, progress=False)
state = Accelerator().state
assert state.num_processes == 2
# a file each: what two processes print into one pipe may run together
Path(sys.argv[2] + f".finished-{state.process_index}").touch()
"""


@pytest.mark.slow
def test_two_processes(recipe, tmp_path) -> None:
    (tmp_path / "recipe.json").write_text(recipe(batch=1).as_json())
    (tmp_path / "two.py").write_text(TWO)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(tmp_path / "two.py"), str(tmp_path / "recipe.json"), str(out)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("run.finished-*")) == [
        "run.finished-0",
        "run.finished-1",
    ]
    log = _log(out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    # two processes with one scene each see what one process with both sees, but for the noise
    assert all(0 < line["loss"] < 100 for line in log)
    assert load_pipeline(out / "pipeline").trained
