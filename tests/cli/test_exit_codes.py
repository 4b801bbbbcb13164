"""How commands end: refusals in this process, and every exit code from a process of its own."""

import contextlib
import json
import os
import re
import signal
import termios
from pathlib import Path

import pytest
import torch
from PIL import Image

from i2am.cli.errors import ExitCode
from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_plan


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def one_sentence(err):
    """The error line; there is no traceback, and nothing after it."""
    lines = err.strip().splitlines()
    assert lines[-1].startswith("error: "), err
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


# Refusals that need no model: what, how, and which sentence


def broken(path, content):
    path.write_bytes(content)
    return path


def black(path, size=(96, 128), value=0):
    Image.new("L", size, value).save(path)
    return path


REJECTED = {
    "person-missing": (lambda f: {"person": f / "no.png"}, r"person \S+no.png does not exist"),
    "person-long": (lambda f: {"person": f / ("9" * 300)}, "File name too long"),
    "person-folder": (lambda f: {"person": f}, r"person \S+ is a folder, a file was expected"),
    "person-text": (
        lambda f: {"person": broken(f / "x.png", b"text")},
        r"person \S+x.png is not an image that can be read",
    ),
    "person-truncated": (
        lambda f: {"person": broken(f / "x.png", (f / "person.png").read_bytes()[:999])},
        r"person \S+x.png is damaged",
    ),
    "reference-missing": (lambda f: {"reference": f / "no.png"}, "reference .* does not exist"),
    "mask-size": (
        lambda f: {"mask": f / "reference_mask.png"},
        r"mask \S+ must be 96 x 128 pixels like its image, got 80 x 80 pixels",
    ),
    "mask-black": (lambda f: {"mask": black(f / "x.png")}, "all of it is black"),
    "mask-white": (lambda f: {"mask": black(f / "x.png", value=255)}, "all of it is white"),
    "reference-mask-size": (
        lambda f: {"reference_mask": f / "mask.png"},
        r"reference-mask \S+ must be 80 x 80 pixels like its image",
    ),
    "pose-size": (
        lambda f: {"pose": f / "reference.png"},
        r"pose \S+ must be 96 x 128 pixels like the person, got 80 x 80",
    ),
    "model-unknown": (
        lambda f: {"model": "stabel-viton"},
        r"model must be a built-in name \(pocket\) or a folder .* got 'stabel-viton'",
    ),
    "model-empty-folder": (
        lambda f: {"model": f},
        r"model \S+ cannot be loaded: \S+model_index.json is missing",
    ),
    "model-other-class": (
        lambda f: {
            "model": broken(f / "model_index.json", b'{"_class_name": "FluxPipeline"}').parent
        },
        "holds a FluxPipeline; known pipelines are CustomPipeline, DCIVTONPipeline, "
        "PaintByExamplePipeline, StableVITONPipeline",
    ),
    "region-outside": (
        lambda f: {"region": "sky=100,0,29,10"},
        r"region sky=100,0,29,10 must lie inside the person image, 96 pixels wide and 128 high",
    ),
    "region-empty": (lambda f: {"region": "sky=0,0,0,10"}, "and not be empty"),
    "size": (lambda f: {"size": "127x96"}, "size 127x96 does not suit pocket"),
    "steps": (
        lambda f: {"steps": 1001},
        "steps 1001 do not suit pocket: DDIMScheduler cannot make 1001 steps",
    ),
    "steps-of-a-sampler": (
        lambda f: {"steps": 501, "sampler": "paper"},
        "steps 501 do not suit pocket: CustomModelDDIMScheduler cannot make 501 steps",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry-run"])
def test_bad_input_is_one_sentence_and_nothing_is_written(
    case, dry, run_here, record_line, files, tmp_path
):
    options, sentence = REJECTED[case]
    arguments = record_line(*["--dry-run"] * dry, **options(files))
    before = names(tmp_path)
    done = run_here(arguments)
    assert done.code == ExitCode.REJECTED
    assert re.search(sentence, one_sentence(done.err)), done.err
    assert done.out == ""
    assert names(tmp_path) == before


def test_cuda_is_refused_where_there_is_none(run_here, record_line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run_here(record_line(device="cuda"))
    assert done.code == ExitCode.REJECTED
    assert "device cuda needs a CUDA GPU" in one_sentence(done.err)


def test_pose_is_refused_by_a_model_without_one(
    run_here, record_line, files, paint_by_example_folder
):
    done = run_here(record_line(model=paint_by_example_folder, pose=files / "pose.png"))
    assert done.code == ExitCode.REJECTED
    assert "painter takes no pose" in one_sentence(done.err)


def test_regions_are_refused_by_a_model_without_reference_patches(
    run_here, record_line, paint_by_example_folder, tmp_path
):
    done = run_here(record_line(model=paint_by_example_folder, region="a=0,0,9,9"))
    assert done.code == ExitCode.REJECTED
    assert "has a single reference token" in one_sentence(done.err)
    assert "out" not in names(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param({"mask": None}, "Missing option '--mask'", id="missing-option"),
        pytest.param({"steps": "many"}, "Invalid value for '--steps'", id="not-a-number"),
        pytest.param({"steps": 0}, "Invalid value for '--steps'", id="zero-steps"),
        pytest.param({"seed": -1}, "Invalid value for '--seed'", id="negative-seed"),
        pytest.param({"preset": "mine"}, "Invalid value for '--preset'", id="preset"),
        pytest.param({"size": "512"}, "must be HEIGHTxWIDTH", id="size"),
        pytest.param({"region": "0,0,9,9"}, "must be NAME=top,left,height,width", id="no-name"),
        pytest.param({"region": "../x=0,0,9,9"}, "must be NAME=", id="path-as-name"),
        pytest.param({"region": "mask=0,0,9,9"}, "'mask' is taken", id="reserved-name"),
        pytest.param(
            {"region": ["a=0,0,9,9", "a=9,9,9,9"]},
            "region names must differ, got a twice",
            id="region-twice",
        ),
        pytest.param(
            {"guidance": 1, "guidance_branch": "both"},
            "guidance-branch both needs a guidance above 1, got 1",
            id="branch-without-guidance",
        ),
        pytest.param({"guidance": "nan"}, "nan is not a finite number", id="guidance-nan"),
        pytest.param({"colour": "jet"}, "No such option '--colour'", id="unknown-option"),
    ],
)
def test_usage_errors_point_to_the_help(change, sentence, run_here, record_line):
    done = run_here(record_line(**change))
    assert done.code == ExitCode.USAGE
    assert sentence in one_sentence(done.err)
    assert done.err.rstrip().endswith("See 'i2am record --help'.")
    assert done.out == ""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["record", "--help"], ["demo", "-h"], ["--version"]], ids=" ".join
)
def test_help_and_version_go_to_stdout(arguments, run_here):
    done = run_here(arguments)
    assert done.code == ExitCode.DONE
    assert done.out
    assert done.err == ""


def test_without_a_command_the_help_comes_as_it_is_on_stderr(run_here):
    done = run_here([])
    assert done.code == ExitCode.USAGE
    assert done.out == ""
    assert done.err == run_here(["--help"]).out


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        pytest.param(OSError("Error no file named x"), 4, "cannot be loaded: Error no", id="bare"),
        pytest.param(KeyError("unet"), 4, "cannot be loaded: 'unet'", id="key"),
        pytest.param(TypeError("no such option"), 4, "cannot be loaded: no such", id="type"),
        pytest.param(FileNotFoundError(2, "No such file"), 4, "cannot be loaded", id="missing"),
        pytest.param(OSError(5, "Input/output error"), 74, "Input/output error", id="disk"),
        pytest.param(MemoryError(), 4, "out of memory", id="memory"),
    ],
)
def test_whatever_ails_a_model_folder_it_is_rejected(
    error, code, sentence, run_here, record_line, monkeypatch
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("i2am.models.loading.load_pipeline", fail)
    done = run_here(record_line())
    assert done.code == code
    assert sentence in one_sentence(done.err)


def test_verbose_shows_the_traceback_before_the_sentence(run_here, record_line):
    done = run_here(record_line("-v", model="nonesuch"))
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("error: model must be")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
    ids=["python", "torch"],
)
def test_running_out_of_memory_is_no_bug(error, run_here, record_line, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("i2am.cli.recording._run", fail)
    done = run_here(record_line())
    assert done.code == ExitCode.REJECTED
    assert "out of memory; ask for fewer regions" in one_sentence(done.err)
    assert "out" not in names(tmp_path)


# One real process per exit code


def test_0_done(run_apart, record_line, tmp_path):
    done = run_apart(record_line("--json"))
    assert done.code == 0, done.err
    assert sorted(json.loads(done.out)["files"]) == names(tmp_path / "out")
    assert "it/s" not in done.err  # no progress bar where stderr is not a terminal


def test_a_terminal_sees_a_progress_bar_on_stderr(start, record_line):
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, 80))
    to_terminal = f"import os; os.dup2(os.open({os.ttyname(end)!r}, os.O_RDWR), 2)"
    process = start(record_line(steps=6), before=to_terminal)
    out, _ = process.communicate(timeout=100)
    os.close(end)
    seen = ""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(terminal, 1 << 16):
            seen += part.decode()
    os.close(terminal)
    assert process.returncode == 0, seen
    assert "steps: 100%" in seen
    assert "6/6" in seen
    assert "steps" not in out


def test_1_unexpected(run_apart, record_line):
    # the only way to a bug on purpose: put one in
    bug = "import i2am.cli.recording as r; r.read_inputs = lambda _: 1 / 0"
    done = run_apart(record_line(), before=bug)
    assert done.code == 1
    assert one_sentence(done.err) == "error: unexpected ZeroDivisionError: division by zero"


def test_2_usage(run_fresh):
    done = run_fresh(["recrod"])
    assert done.code == 2
    assert "No such command 'recrod'" in one_sentence(done.err)


def test_3_incomplete(run_apart, record_line, tmp_path):
    from i2am.models import pocket_pipeline

    pipe = pocket_pipeline()
    # finite, as weights have to be, and beyond what their products may be
    pipe.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_q.weight.data[0] = 3e38
    pipe.save_pretrained(tmp_path / "ill")
    done = run_apart(record_line(model=tmp_path / "ill"))
    assert done.code == 3, done.err
    # what could be made is there; what could not is null and says why
    assert {"image.png", "maps.safetensors", "run.json"} <= set(names(tmp_path / "out"))
    assert "overview.png" not in names(tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["imacs_g"]["value"] is None
    assert "NaN or Inf in" in scores["imacs_g"]["reason"]
    assert "NaN or Inf in" in done.err


def test_pair_maps_with_nan_cost_the_page_alone(run_here, record_line, monkeypatch, tmp_path):
    from i2am.cli import recording

    run = recording._run

    def ill(*args, **kwargs):
        made = run(*args, **kwargs)
        made.maps["conditional"].pairs.g2r[0, 0, 3, 2] = torch.inf
        return made

    monkeypatch.setattr(recording, "_run", ill)
    done = run_here(record_line())
    assert done.code == ExitCode.INCOMPLETE, done.err
    note = "no page of the conditional half: NaN or Inf in generated_to_reference of the pair maps"
    assert note in done.err
    found = names(tmp_path / "out")
    assert {"image.png", "maps.safetensors", "overview.png", "run.json", "scores.json"} <= set(
        found
    )
    assert "report.html" not in found
    assert note in json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["imacs_g"]["value"] is not None


def test_4_rejected(run_apart, record_line, tmp_path):
    done = run_apart(record_line(mask=tmp_path / "no.png"))
    assert done.code == 4
    assert "mask" in one_sentence(done.err)


def test_5_conflict(run_apart, record_line, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    done = run_apart(record_line("--overwrite"))
    assert done.code == 5
    assert "was not written by i2am" in one_sentence(done.err)
    assert names(tmp_path / "out") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: Path(), "is the current folder or holds it"),
        (lambda folder: Path(".."), "is the current folder or holds it"),
        (lambda folder: Path("/"), "is the current folder or holds it"),
        (lambda folder: linked(folder / "out", folder / "none"), "is a link to nothing"),
        (lambda folder: linked(folder / "out", folder / "files"), "is a link; name the folder"),
        (lambda folder: folder / os.fsdecode(b"out\xff"), "must have a name in UTF-8"),
        (lambda folder: folder / "files" / "person.png", "is a file, a folder was expected"),
    ],
    ids=["here", "above", "root", "dangling", "link", "no-utf8", "file"],
)
@pytest.mark.parametrize("command", ["record", "convert", "figure", "report", "demo", "export"])
def test_5_no_place_for_an_output(
    run_here, record_line, tmp_path, monkeypatch, command, make, said
):
    def forbidden(*_, **__):
        raise AssertionError("work was done before the output was looked at")

    for work in (
        "i2am.models.loading.load_pipeline",
        "i2am.models.conversion.converting.read_checkpoint",
        "i2am.cli.drawing.read_run",
        "i2am.cli.reporting.read_run",
        "i2am.cli.demo.make_inputs",
    ):
        monkeypatch.setattr(work, forbidden)
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    out = make(tmp_path)
    run = tmp_path / "run"
    Store.create(run, make_plan())
    lines = {
        "record": record_line(out=out),
        "convert": ["convert", "x.ckpt", "--system", "custom", "-o", str(out)],
        "figure": ["figure", str(run), "-o", str(out)],
        "report": ["report", str(run), "-o", str(out)],
        "demo": ["demo", "-o", str(out)],
        "export": ["export", str(run), "--zarr", str(out)],
    }
    before = names(tmp_path)
    done = run_here(lines[command])
    assert done.code == 5, done.err
    assert said in done.err
    assert names(tmp_path) == before


@pytest.mark.parametrize("command", ["evaluate", "train", "score"])
@pytest.mark.parametrize("kind", ["dangling", "no-utf8", "file", "below-a-file"])
def test_5_no_place_for_a_run(run_here, tmp_path, monkeypatch, command, kind):
    def forbidden(*_, **__):
        raise AssertionError("work was done before the output was looked at")

    monkeypatch.setattr("i2am.models.loading.load_pipeline", forbidden)
    monkeypatch.setattr("i2am.training.run.starting_pipeline", forbidden)
    monkeypatch.setattr("i2am.evaluation.scores.scoring.score_run", forbidden)
    (tmp_path / "file").touch()
    out = {
        "dangling": linked(tmp_path / "out", tmp_path / "none"),
        "no-utf8": tmp_path / os.fsdecode(b"out\xff"),
        "file": tmp_path / "file",
        "below-a-file": tmp_path / "file" / "out",
    }[kind]
    run = tmp_path / "run"
    Store.create(run, make_plan())
    lines = {
        "evaluate": ["evaluate", "pocket", "--data", "data", "-o", str(out)],
        "train": ["train", "-o", str(out)],
        "score": ["score", str(run), "-o", str(out)],
    }
    done = run_here(lines[command])
    assert done.code == 5, done.err
    assert re.search("link to nothing|UTF-8|is a file, a folder|cannot be made", done.err)


def linked(path, target):
    path.symlink_to(target)
    return path


def test_5_output_cannot_be_made(run_apart, record_line, files, tmp_path):
    before = names(tmp_path)
    done = run_apart(record_line(out=files / "person.png" / "out"))
    assert done.code == 5
    assert re.search(r"out cannot be made, because .*person\.png is no folder", done.err)
    assert names(tmp_path) == before


def test_74_disk_full_while_writing(run_apart, record_line, tmp_path):
    # the kernel refuses to grow any file beyond this: a full disk, for one process
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    before = names(tmp_path)
    done = run_apart(record_line(), before=limit)
    assert done.code == 74, done.err
    assert "File too large" in one_sentence(done.err)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["SIGINT", "SIGTERM"],
)
def test_stopping_leaves_nothing(number, code, word, start, record_line, tmp_path):
    before = names(tmp_path)
    process = start(record_line(steps=1000))
    try:
        line = ""
        while not line.startswith("recording"):
            line = process.stderr.readline()
            assert line, "it ended before it began to record"
        assert len(names(tmp_path)) == len(before) + 1  # the hidden beginning of the output
        assert "out" not in names(tmp_path)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert one_sentence(err) == f"error: {word}; nothing was written"
    assert names(tmp_path) == before
