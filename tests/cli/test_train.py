"""``i2am train``: what it asks the training for, how it ends, and that its result is a model."""

import json
import signal
import sys
import time
from dataclasses import replace

import pytest

import i2am.training.run
from i2am.cli.app import main
from i2am.cli.errors import ExitCode
from i2am.data.paper_doll import write_viton_hd
from i2am.files import OutputRefused
from i2am.models import CustomConfiguration, load_pipeline, pocket
from i2am.training.checkpoint import read_checkpoint
from i2am.training.loop import Intervals
from i2am.training.recipe import PAPER_RECIPE, POCKET_RECIPE, Recipe

FEW = ["--steps", "4", "--batch", "2", "--mixed-precision", "no", "--trainable", "all"]
FEW += ["--checkpoint-every", "2", "--validate-every", "0", "--workers", "0", "--quiet"]


@pytest.fixture
def asked(monkeypatch):
    """What `train` was called with; it trains nothing."""
    calls = []

    def note(recipe, out, intervals, **options):
        calls.append((recipe, out, intervals, options))
        return out / "pipeline"

    monkeypatch.setattr(i2am.training.run, "train", note)
    return calls


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small untrained model, and drawn scenes in VITON-HD layout."""
    root = tmp_path_factory.mktemp("train")
    write_viton_hd(root / "viton", train=4, test=2)
    sizes = pocket.POCKET
    small = CustomConfiguration(
        vae={**sizes.vae, "width": 8, "fine_width": 8},
        vae_class=sizes.vae_class,
        image_encoder={**sizes.image_encoder, "hidden_size": 16, "image_size": 32},
        image_proj={"width": 16, "context_width": 16, "tokens": 13, "layers": 1},
        unet={
            **sizes.unet,
            "sample_size": (8, 6),
            "block_out_channels": (16, 16, 16),
            "cross_attention_dim": 16,
        },
        scheduler=sizes.scheduler,
        scheduler_options=sizes.scheduler_options,
        reference_size=(32, 24),
    )
    small.build(0).save_pretrained(root / "model")
    return root


@pytest.fixture
def command(folders, tmp_path):
    """The words of a short training, and its output folder."""
    out = tmp_path / "out"
    words = ["train", "--model", str(folders / "model"), "--data", str(folders / "viton")]
    return [*words, "-o", str(out), *FEW], out


def _error(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: "), lines
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_the_command_that_made_the_shipped_weights(asked, tmp_path, capsys) -> None:
    words = ["train", "--model", "pocket", "--data", "paper-doll", "-o", str(tmp_path / "run")]
    assert main(words) == ExitCode.DONE
    assert asked == [
        (POCKET_RECIPE, tmp_path / "run", Intervals(), {"workers": 2, "progress": True})
    ]
    assert json.loads(capsys.readouterr().out) == {"pipeline": str(tmp_path / "run" / "pipeline")}
    # they are the defaults
    assert main(["train", "-o", str(tmp_path / "run")]) == ExitCode.DONE
    assert asked[1] == asked[0]


def test_a_folder_is_trained_as_the_paper_did(asked, tmp_path) -> None:
    words = ["train", "--model", "/models/custom", "--data", "/data/viton", "-o", str(tmp_path)]
    assert main(words) == ExitCode.DONE
    wanted = replace(PAPER_RECIPE, model="/models/custom", data="/data/viton", scenes=None)
    assert asked[0][0] == wanted


def test_every_option_arrives(asked, tmp_path) -> None:
    words = ["train", "-o", str(tmp_path), "--scenes", "64", "--steps", "9", "--batch", "3"]
    words += ["--accumulate", "2", "--autoencoder-steps", "5", "--learning-rate", "0.01"]
    words += ["--dropout", "0.3", "--trainable", "lite", "--attention-tv", "0.001", "--no-ema"]
    words += ["--mixed-precision", "bf16", "--seed", "7", "--checkpoint-every", "11"]
    words += ["--validate-every", "12", "--keep", "3", "--max-steps", "8", "--workers", "1"]
    assert main([*words, "--quiet"]) == ExitCode.DONE
    recipe, _, intervals, options = asked[0]
    plan = replace(
        POCKET_RECIPE.denoiser.optimisation,
        steps=9,
        batch=3,
        accumulate=2,
        learning_rate=0.01,
        ema=None,
    )
    first = POCKET_RECIPE.autoencoder
    assert recipe == Recipe(
        model="pocket",
        data="paper-doll",
        scenes=64,
        seed=7,
        autoencoder=replace(first, optimisation=replace(first.optimisation, steps=5)),
        denoiser=replace(
            POCKET_RECIPE.denoiser,
            optimisation=plan,
            dropout=0.3,
            trainable="lite",
            attention_tv=0.001,
            precision="bf16",
        ),
    )
    assert intervals == Intervals(checkpoint=11, validate=12, keep=3, stop_after=8)
    assert options == {"workers": 1, "progress": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing option '-o' / '--out'"),
        (["-o", "x", "--steps", "0"], "Invalid value for '--steps'"),
        (["-o", "x", "--trainable", "some"], "Invalid value for '--trainable'"),
        (["-o", "x", "--dropout", "2"], "Invalid value for '--dropout'"),
        (
            ["-o", "x", "--model", "folder", "--autoencoder-steps", "5"],
            "--autoencoder-steps is for the pocket model, got folder",
        ),
    ],
)
def test_usage(asked, capsys, words, message) -> None:
    assert main(["train", *words]) == ExitCode.USAGE
    assert message in _error(capsys)
    assert not asked


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OutputRefused("another seed"), ExitCode.CONFLICT),
        (ValueError("model must be a custom model"), ExitCode.REJECTED),
        (FileNotFoundError("train_pairs.txt is missing"), ExitCode.REJECTED),
        (FloatingPointError("the loss is nan"), ExitCode.REJECTED),
        (OSError("checkpoint cannot be written"), ExitCode.IO),
        (RuntimeError("something else"), ExitCode.UNEXPECTED),
    ],
    ids=lambda value: getattr(value, "name", type(value).__name__),
)
def test_exit_codes(monkeypatch, capsys, tmp_path, error, code) -> None:
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(i2am.training.run, "train", fail)
    assert main(["train", "-o", str(tmp_path)]) == code
    assert str(error) in _error(capsys)


def test_without_accelerate(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["train", "-o", str(tmp_path / "run")]) == ExitCode.REJECTED
    assert 'pip install "i2am[train]"' in _error(capsys)
    assert not (tmp_path / "run").exists()


def test_stopped_resumed_and_refused(command, capsys) -> None:
    words, out = command
    assert main([*words, "--max-steps", "2"]) == ExitCode.INCOMPLETE
    assert json.loads(capsys.readouterr().out) == {"pipeline": None}
    assert main(words) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out) == {"pipeline": str(out / "pipeline")}
    steps = [json.loads(line)["step"] for line in (out / "denoiser/log.jsonl").open()]
    assert steps == [2, 4]
    assert load_pipeline(out / "pipeline").trained
    assert main([*words, "--seed", "5"]) == ExitCode.CONFLICT
    assert "holds a training with another seed" in _error(capsys)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_leaves_whole_checkpoints(command, start, number, code) -> None:
    words, out = command
    words[words.index("--steps") + 1] = "100000"
    run = start(words)
    deadline = time.monotonic() + 300
    while not list(out.glob("denoiser/checkpoint-*")) and time.monotonic() < deadline:
        assert run.returncode is None
        time.sleep(0.05)
    run.send_signal(number)
    error = run.communicate()[1].strip().splitlines()[-1]
    assert run.returncode == code
    assert error == f"error: stopped; the same command goes on from the last checkpoint in {out}"
    for path in (out / "denoiser").glob("checkpoint-*"):
        assert path.stem == f"checkpoint-{read_checkpoint(path).step:08d}"
