"""`i2am evaluate` from outside: what it says, how it ends, what it leaves."""

import errno
import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from i2am.cli import main
from i2am.data import write_viton_hd
from i2am.evaluation import store
from i2am.evaluation.memory import Need
from i2am.evaluation.store import Store
from i2am.models import pocket_pipeline

FEW = ("--steps=2", "--time-groups=2", "--batch=2", "--shard=2", "--threads=1", "--pairs=paired")


@pytest.fixture(scope="module")
def dolls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dolls") / "set"
    write_viton_hd(folder, train=0, test=3)
    return folder


@pytest.fixture
def evaluate(dolls, tmp_path, capsys):
    """Runs the command; its exit code, stdout and its error, or else all of stderr."""
    threads = torch.get_num_threads()

    def run(*options, data=dolls, out=tmp_path / "run", model="pocket", few=FEW):
        code = main(["evaluate", model, "--data", str(data), "-o", str(out), *few, *options])
        text = capsys.readouterr()
        errors = [line for line in text.err.splitlines() if line.startswith("error: ")]
        return code, text.out, (errors or [text.err])[-1]

    yield run
    torch.set_num_threads(threads)


def test_weights_behind_a_link_belong_to_the_run(evaluate, tmp_path):
    model, shared = tmp_path / "model", tmp_path / "shared"
    pocket_pipeline().save_pretrained(model)
    (model / "unet").rename(shared)
    (model / "unet").symlink_to(shared)
    assert evaluate(model=str(model))[0] == 0
    (tmp_path / "run/shards/paired/000001.safetensors").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (weights,) = shared.glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, weights)
    code, _, error = evaluate(model=str(model))
    assert code == 5
    assert "model.weights_sha256" in error
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    }


def test_nothing_is_written_through_a_link_in_a_run(evaluate, tmp_path):
    assert evaluate()[0] == 0
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "shards/paired/000001.safetensors").unlink()
    for name in ("shards", "images/paired", "logs"):
        path = run / name
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        before = sorted(elsewhere.rglob("*"))
        code, _, error = evaluate()
        assert code == 5
        assert f"{path} is a link, and nothing is written through it" in error
        assert sorted(elsewhere.rglob("*")) == before
        path.unlink()
        elsewhere.rename(path)
    assert evaluate()[0] == 0


def test_a_run_goes_on_with_its_own_settings(evaluate, tmp_path):
    code, out, _ = evaluate("--seed=7", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["samples"], result["failed"], result["remaining"]) == (3, 0, 0)
    shard = tmp_path / "run/shards/paired/000001.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    # nothing said about settings: those of the run
    code, out, _ = evaluate("--json", few=())
    assert code == 0
    assert json.loads(out)["samples"] == 1
    assert shard.read_bytes() == content
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, error = evaluate("--seed=8", "--guidance=3")
    assert code == 5
    assert "settings.guidance (5.0 there, 3.0 now), settings.seed (7 there, 8 now)" in error
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_is_there_already_is_not_computed(evaluate, tmp_path):
    run = tmp_path / "run"
    assert evaluate("--batch=1", "--shard=3", "--steps=1")[1].startswith(f"{run}: 3 samples in ")
    code, out, said = evaluate("--batch=1", "--shard=3", "--steps=1")
    assert (code, out) == (0, f"{run}: all samples were there already\n")
    # FEW asks for two groups of one step
    assert said.count("2 time groups were asked for and the run has 1 step") == 1
    plan = json.loads((run / "run.json").read_text())
    assert plan["settings"]["time_groups"] == 1
    (shard,) = Store.open(run).shards("paired", tensors=None)
    assert shard.maps["r2g_uniform"].shape[1] == 1


@pytest.mark.parametrize("options", [[], ["--memory-budget=8GiB"]], ids=["default", "budget"])
def test_the_batch_is_at_most_the_shard(evaluate, tmp_path, monkeypatch, options):
    # a thousand samples would fit
    monkeypatch.setattr("i2am.cli.evaluating.need", lambda opened: Need(0, 8 * 2**20))
    few = ["--steps=1", "--threads=1", "--pairs=paired", "--shard=2"]
    code, _, error = evaluate(*options, few=few)
    assert code == 0, error
    settings = json.loads((tmp_path / "run/run.json").read_text())["settings"]
    assert (settings["batch"], settings["shard"]) == (2, 2)


ENDINGS = (".JPG", ".bmp", ".tif")


def test_score_finds_the_pictures_that_evaluate_read(evaluate, dolls, tmp_path, run_here):
    data = shutil.copytree(dolls, tmp_path / "set")
    pairs = data / "test_pairs.txt"
    text = pairs.read_text()
    for number, ending in enumerate(ENDINGS):
        path = data / f"test/image/0000{number}_00.jpg"
        listed = path.with_suffix(ending)
        with Image.open(path) as image:
            image.load()
        path.unlink()
        image.save(listed)
        text = text.replace(f"{path.name} ", f"{listed.name} ", 1)
    pairs.write_text(text)
    code, _, error = evaluate("--steps=1", "--time-groups=1", "--maps=none", data=data)
    assert code == 0, error

    def ssim():
        line = ["score", str(tmp_path / "run"), "--metrics", "ssim", "--bootstrap", "0", "--json"]
        done = run_here(line)
        assert done.code == 0, done.out
        return json.loads(done.out)["settings"]["paired"]["metrics"]["ssim"]

    found = ssim()
    assert (found["n_ok"], found["n_expected"], found["status"]) == (3, 3, "ok")
    # another picture of the same stem, which the list does not name
    shutil.copy(data / "test/cloth/00002_00.jpg", data / "test/image/00001_00.jpg")
    assert ssim() == found


def test_suspicious_input_is_told(evaluate, dolls, tmp_path):
    data = shutil.copytree(dolls, tmp_path / "set")
    shutil.rmtree(data / "test/image-densepose")
    shutil.copy(data / "test/image/00001_00.jpg", data / "test/cloth-mask/00001_00.jpg")
    few = [*FEW, "--steps=1", "--time-groups=1", "--maps=none", "--size=64x48"]
    code, _, said = evaluate(data=data, few=few)
    assert code == 0
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: model pocket was made for images of 128x96 pixels, height by width, and is asked "
        "for 64x48: images and maps may be worse",
        f"warning: model pocket takes poses and {data} has no folder image-densepose: it gets "
        "all-black ones",
        "warning: paired: 1 of 3 masks of cloth-mask look like pictures rather than masks, the "
        "first that of line 2: their pixels of half brightness and more count as white",
    ]


def test_what_concerns_the_run_one_worker_says(evaluate, monkeypatch):
    monkeypatch.setattr("i2am.models.custom.CustomPipeline.trained", False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, said = evaluate("--steps=1")
    assert code == 0
    assert "worker 1 of 2" in said
    assert "warning" not in said


def test_a_dry_run_measures_and_writes_nothing(evaluate, tmp_path):
    code, out, _ = evaluate("--dry-run", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["pairs"] == {"paired": 3}
    assert found["shards"] == [2, 2]
    assert found["batch"] == 2
    assert 8e6 < found["memory"] < 2e9
    # images uncompressed, and five kinds of maps of 2 groups, 4 heads, 16 x 12 cells as float16
    maps = 5 * 2 * 4 * (16 * 12 * 2 + 4)
    assert found["disk"] == 3 * (3 * 128 * 96 + maps)
    assert found["seconds"] > 0
    assert not (tmp_path / "run").exists()
    code, out, _ = evaluate("--dry-run")
    assert code == 0
    assert "shards to compute   2 of 2" in out
    assert out.rstrip().endswith("nothing was written")


def test_a_budget_picks_the_batch(evaluate, tmp_path):
    few = [option for option in FEW if not option.startswith(("--batch", "--shard"))]
    code, _, error = evaluate("--memory-budget=1MB", few=few)
    assert code == 4
    assert "memory-budget must be at least the" in error
    assert not (tmp_path / "run").exists()
    assert evaluate("--memory-budget=8GiB", few=few)[0] == 0
    plan = json.loads((tmp_path / "run/run.json").read_text())
    # all there are
    assert plan["settings"]["batch"] == 3
    # the batch belongs to the run
    code, _, error = evaluate("--memory-budget=1MB", few=())
    assert code == 0
    assert "the batch belongs to the run and stays 3" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch=2", "--memory-budget=1GiB"], "--memory-budget picks the batch, leave --batch"),
        (["--memory-budget=many"], "'many' must be a number with a unit, 12GiB or 800MB"),
        (["--pairs=mixed"], "'mixed' is not one of"),
        (["--size=512"], "must be HEIGHTxWIDTH"),
    ],
)
def test_usage(evaluate, options, message):
    code, _, error = evaluate(*options)
    assert code == 2
    assert message in error


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"model": "pockets"}, [], "model must be a built-in name (pocket) or a folder"),
        ({}, ["--batch=9"], "shard must be at least the batch of 9, got 2"),
        ({}, ["--size=102x77"], "height must be a positive multiple of 4, got 102"),
        ({}, ["--size=96x96"], "none of the first 3 pairs can be read"),
        ({}, ["--vae-tiling"], "the autoencoder PocketAutoencoder cannot do --vae-tiling"),
        ({}, ["--offload=model"], "offload model needs a GPU to load to, got device cpu"),
    ],
)
def test_refusals(evaluate, tmp_path, change, options, message):
    code, _, error = evaluate(*options, **change)
    assert code == 4, error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_data_set_with_problems(evaluate, dolls, tmp_path):
    code, _, error = evaluate(data=tmp_path / "none")
    assert code == 4
    assert "test_pairs.txt" in error
    broken = tmp_path / "set"
    shutil.copytree(dolls, broken)
    (broken / "test/cloth/00001_00.jpg").unlink()
    (broken / "test_pairs.txt").write_text(
        "00000_00.jpg\n../x.jpg 00000_00.jpg\n00001_00.jpg 1.jpg\n"
    )
    code, _, error = evaluate(data=broken)
    assert code == 4
    assert "line 1" in error
    assert "line 2" in error
    assert not (tmp_path / "run").exists()


def test_folders_that_hold_something_else(evaluate, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    code, _, error = evaluate(out=other)
    assert code == 5
    assert "holds thesis.txt but no run of i2am evaluate" in error
    code, _, error = evaluate(out=other / "thesis.txt")
    assert code == 5
    assert "is a file, a folder was expected" in error
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_disk_that_is_full(evaluate, monkeypatch, tmp_path):
    real = store.write

    def write(path, data):
        if path.name == "000001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(store, "write", write)
    code, _, error = evaluate()
    assert code == 74
    assert "No space left on device; shard 1 of paired with its images takes" in error
    assert [path.name for path in tmp_path.glob("run/shards/*/*")] == ["000000.safetensors"]
    monkeypatch.undo()
    assert evaluate()[0] == 0


def test_a_folder_that_cannot_be_made(evaluate, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "run")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    # before anything is computed
    monkeypatch.setattr("i2am.evaluation.worker.generate", pytest.fail)
    code, _, error = evaluate()
    assert code == 74
    assert "Read-only file system" in error


def test_samples_that_fail(evaluate, dolls, tmp_path):
    broken = tmp_path / "set"
    shutil.copytree(dolls, broken)
    path = broken / "test/cloth/00001_00.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    code, out, _ = evaluate(data=broken)
    assert code == 3
    assert "1 failed, i2am status" in out
    # the file is mended and keeps its size in the plan: what failed is computed again
    path.write_bytes(whole)
    code, _, error = evaluate("--retry-failed", data=broken)
    assert code == 5
    assert "data.digest.paired" in error
    path.write_bytes(whole[:300])
    code, out, _ = evaluate("--retry-failed", "--json", data=broken)
    assert code == 3
    assert json.loads(out)["samples"] == 2
    # its neighbour cannot be read any more: what was made of it stays
    before = (tmp_path / "run/shards/paired/000000.safetensors").read_bytes()
    neighbour = broken / "test/cloth/00000_00.jpg"
    neighbour.write_bytes(bytes(neighbour.stat().st_size))
    code, out, error = evaluate("--retry-failed", data=broken)
    assert code == 3
    assert "1 failed, i2am status" in out
    assert "00000_00 failed now and stay as they were" in error
    assert (tmp_path / "run/shards/paired/000000.safetensors").read_bytes() == before


def test_memory_that_runs_out(evaluate, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("i2am.models.custom.CustomPipeline.denoise", fail)
    code, _, error = evaluate()
    assert code == 3
    assert "a batch of 2 does not fit into memory" in error
    assert not [*tmp_path.glob("run/shards/*/*")]
    # also while a dry run measures
    code, _, error = evaluate("--dry-run")
    assert code == 3
    assert "does not fit into memory" in error


def test_an_engine_that_is_not_installed(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, error = evaluate("--engine=ray")
    assert code == 4
    assert 'pip install "i2am[ray]"' in error


def test_a_rank_that_cannot_be(evaluate, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = evaluate()
    assert code == 4
    assert "RANK must be a number below WORLD_SIZE, got '2' and '2'" in error


def test_random_weights_are_told(evaluate, monkeypatch):
    monkeypatch.setattr("i2am.models.custom.CustomPipeline.trained", False)
    code, _, error = evaluate()
    assert code == 0
    assert "the weights of pocket are random, not trained: scores mean nothing" in error
