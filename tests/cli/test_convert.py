"""``i2am convert``: what it prints, how it ends, and what it leaves."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from i2am.cli.app import app
from i2am.cli.convert import SYSTEMS
from i2am.cli.errors import ExitCode
from i2am.models import conversion


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def error_of(done):
    """The one line that says what was wrong."""
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.err
    return line


@pytest.fixture
def convert_line(tiny_checkpoint, tmp_path):
    def line(*flags, checkpoint=None, system="custom"):
        file = checkpoint or tiny_checkpoint(system)
        return ["convert", str(file), "--system", system, "-o", str(tmp_path / "out"), *flags]

    return line


def test_systems_are_those_of_the_package():
    assert SYSTEMS == conversion.SYSTEMS


def test_folder_and_summary(run_here, convert_line, tmp_path):
    done = run_here(convert_line(system="paint-by-example"))
    assert done.code == ExitCode.DONE, done.err
    first, second, third = done.out.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: PaintByExamplePipeline, 0.06 GB in 3 files")
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    digest = manifest["sources"]["checkpoint"]["sha256"]
    assert second == f"  from paint-by-example.ckpt, sha256 {digest}"
    assert third.startswith("  12 tensors that are no weights of it left out: alphas_cumprod, ")
    assert names(tmp_path / "out") == [
        *("image_encoder", "model_index.json", "run.json", "scheduler", "unet", "vae")
    ]


def test_json_options_and_overwriting(run_here, convert_line, tmp_path):
    assert run_here(convert_line()).code == ExitCode.DONE
    done = run_here(convert_line("--overwrite", "--json", "--dtype", "float16", "--drop", "x."))
    assert done.code == ExitCode.DONE, done.err
    result = json.loads(done.out)
    assert result["pipeline"] == "CustomPipeline"
    assert result["folder"] == str(tmp_path / "out")
    assert result["dropped"] == []
    manifest = json.loads((tmp_path / "out" / "run.json").read_text())
    assert result["files"].items() <= manifest["files"].items()
    assert all(name.endswith(".safetensors") for name in result["files"])
    assert sum(entry["bytes"] for entry in result["files"].values()) < 40_000_000  # half of before
    assert names(tmp_path) == ["out"]


def test_what_it_wrote_is_a_model_of_other_commands(run_here, convert_line, record_line, tmp_path):
    assert run_here(convert_line()).code == ExitCode.DONE
    line = record_line("--dry-run", model=str(tmp_path / "out"), out=tmp_path / "result")
    done = run_here(line)
    assert done.code == ExitCode.DONE, done.err


class Attack:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def written(path, content):
    torch.save(content, path)
    return path


def plain(path, text):
    path.write_text(text)
    return path


REJECTED = {
    "missing": (lambda f: f / "no.ckpt", r"checkpoint \S+no\.ckpt does not exist$"),
    "folder": (lambda f: f, r"checkpoint \S+ is not a file$"),
    "malicious": (
        lambda f: written(f / "x.ckpt", {"state_dict": {}, "x": Attack(f / "executed")}),
        r"is refused, and nothing in it was executed: beside tensors it names \S+\.system$",
    ),
    "no-tensors": (
        lambda f: written(f / "x.ckpt", {"epoch": 3}),
        r"must hold plain tensors by name and nothing else, 'epoch' is a int$",
    ),
    "text": (
        lambda f: plain(f / "x.ckpt", "hello, I am no checkpoint"),
        r"is text and no weights; it begins with 'hello, I am no checkpoint'$",
    ),
    "pointer": (
        lambda f: plain(f / "x.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        r"is a Git LFS pointer, a short text in place of the weights; 'git lfs pull' fetches them$",
    ),
    "other-model": (
        lambda f: written(f / "x.ckpt", {"conv.weight": torch.ones(1)}),
        r"the weights of the custom checkpoint \S+ do not fit; missing: 1[\d,]* tensors, .*; "
        r"unexpected: 1 tensor, conv\.weight$",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_input_that_is_rejected(case, run_here, convert_line, tmp_path):
    make, sentence = REJECTED[case]
    (tmp_path / "files").mkdir()
    done = run_here(convert_line(checkpoint=make(tmp_path / "files")))
    assert done.code == ExitCode.REJECTED
    assert re.search(sentence, error_of(done)), done.err
    assert names(tmp_path) == ["files"]
    assert not (tmp_path / "files" / "executed").exists()


def test_output_in_use(run_here, convert_line, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    done = run_here(convert_line())
    assert done.code == ExitCode.CONFLICT
    assert "is not empty; name another, or add --overwrite" in error_of(done)
    done = run_here(convert_line("--overwrite"))
    assert done.code == ExitCode.CONFLICT
    assert "was not written by i2am" in error_of(done)
    assert names(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize("option", ["--system", "-o"])
def test_usage(option, run_here, convert_line):
    line = convert_line()
    at = line.index(option)
    done = run_here(line[:at] + line[at + 2 :])
    assert done.code == ExitCode.USAGE
    assert "Missing option" in error_of(done)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["SIGINT", "SIGTERM"],
)
def test_stopping_leaves_nothing(number, code, word, run_here, convert_line, tmp_path, monkeypatch):
    from i2am.models.conversion import converting

    write = converting.write_safetensors

    def stopped(*arguments, **options):
        result = write(*arguments, **options)
        signal.raise_signal(number)
        return result

    monkeypatch.setattr(converting, "write_safetensors", stopped)
    done = run_here(convert_line())
    assert done.code == code
    assert error_of(done) == f"error: {word}; nothing was written"
    assert names(tmp_path) == []


def test_disk_full(tiny_checkpoint, run_apart, convert_line, tmp_path):
    # the kernel refuses to grow any file beyond this: a full disk, for one process
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))"
    done = run_apart(convert_line(), before=limit)
    assert done.code == ExitCode.IO, done.err
    assert "File too large" in error_of(done)
    assert names(tmp_path) == []


def test_weights_beyond_the_dtype(run_here, convert_line, tiny_checkpoint, tmp_path):
    state = torch.load(tiny_checkpoint("custom"))["state_dict"]
    state["mlp.proj.2.bias"] = torch.full_like(state["mlp.proj.2.bias"], 1e5)
    (tmp_path / "files").mkdir()
    file = written(tmp_path / "files" / "x.ckpt", state)
    done = run_here(convert_line("--dtype", "float16", checkpoint=file))
    assert done.code == ExitCode.REJECTED
    assert "weights are beyond the range of torch.float16, choose another" in error_of(done)
    assert names(tmp_path) == ["files"]


FIRST_LINE = """
import logging, os, sys

class First(logging.Handler):
    def emit(self, record):
        slow = {"torch", "diffusers", "transformers"} & set(sys.modules)
        print(record.getMessage(), slow or "before slow imports", flush=True)
        os._exit(0)

logging.getLogger("i2am").addHandler(First())
from i2am.cli import main
main(sys.argv[1:])
"""


def test_the_first_line_comes_before_slow_imports(convert_line, tmp_path):
    line = convert_line("--quiet", "--json", checkpoint=tmp_path / "x.ckpt")
    done = subprocess.run(
        [sys.executable, "-P", "-c", FIRST_LINE, *line], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"converting {tmp_path / 'x.ckpt'} as custom before slow imports\n"


def test_help_is_instant_and_says_what_it_takes():
    done = CliRunner().invoke(app, ["convert", "--help"])
    assert done.exit_code == 0
    assert "CHECKPOINT is a .ckpt or .safetensors file" in done.output
    assert all(system in done.output for system in SYSTEMS)
