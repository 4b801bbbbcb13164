"""What reaches the terminal: names that others chose obey nobody, and forge no lines."""

import io
import json
import logging
import re
import sys
import warnings
from pathlib import Path

import click
import pytest
from tqdm import tqdm

import i2am
from i2am.cli import main
from i2am.cli.app import app
from i2am.cli.errors import ExitCode
from i2am.cli.output import echo
from i2am.evaluation import plan_file
from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_plan, make_shard

# colour by ESC and by the C1 byte, a title, the start of the line, another line, text turned
# around, and a byte that is no UTF-8
HOSTILE = "a\x1b[31m\x9b31m\x1b]0;b\x07\r\nerror: c\u202egnp.\u2028d\udcff"
SHOWN = r"a\x1b[31m\x9b31m\x1b]0;b\x07\r\nerror: c\u202egnp.\u2028d\udcff"
IMAGES = [word for name in ("person", "mask", "reference") for word in (f"--{name}", HOSTILE)]
DATA = ["--data", HOSTILE]
OUT = ["-o", HOSTILE]

ERRORS = {
    "record": ["record", "pocket", *IMAGES, *OUT],
    "record-model": ["record", HOSTILE, *IMAGES, *OUT],
    "record-dry": ["record", "pocket", *IMAGES, *OUT, "--dry-run", "-v"],
    "report": ["report", HOSTILE, *OUT],
    "figure": ["figure", HOSTILE, HOSTILE, *OUT],
    "evaluate": ["evaluate", "pocket", *DATA, *OUT],
    "evaluate-model": ["evaluate", HOSTILE, *DATA, *OUT, "-v"],
    "status": ["status", HOSTILE],
    "score": ["score", HOSTILE, "b", *OUT],
    "verify": ["verify", HOSTILE],
    "export": ["export", HOSTILE, "--parquet", HOSTILE],
    "train": ["train", *DATA, *OUT],
    "train-model": ["train", "--model", HOSTILE, *OUT],
    "convert": ["convert", HOSTILE, "--system", "custom", "--vae", HOSTILE, *OUT],
    # click's own sentences
    "no-command": [HOSTILE],
    "no-option": ["record", f"--{HOSTILE}"],
    "no-choice": ["train", *OUT, "--trainable", HOSTILE],
    "no-number": ["train", *OUT, "--steps", HOSTILE],
    "no-float": ["train", *OUT, "--dropout", HOSTILE],
    "no-size": ["evaluate", "pocket", *DATA, *OUT, "--size", HOSTILE],
    "no-bytes": ["evaluate", "pocket", *DATA, *OUT, "--memory-budget", HOSTILE],
    "no-region": ["record", "pocket", *IMAGES, "--region", HOSTILE],
    "no-metric": ["score", "a", "--metrics", HOSTILE],
    "too-many": ["status", "a", HOSTILE],
}


def clean(text):
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("case", ERRORS)
def test_refusals_show_names_and_obey_none(case, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_here(ERRORS[case])
    assert done.code not in (ExitCode.DONE, ExitCode.UNEXPECTED), done.err
    assert clean(done.out + done.err)
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.err
    assert r"a\x1b[31m\x9b31m\x1b]0;b\x07" in done.err
    assert not any(Path().iterdir())


@pytest.fixture
def act(monkeypatch, capsys):
    """Runs a function as a command; returns what it printed."""

    def run(function):
        monkeypatch.setitem(app.commands, "act", click.command("act")(function))
        code = main(["act"])
        return code, *capsys.readouterr()

    return run


def test_log_lines_and_warnings_are_one_line_each(act):
    def say():
        logging.getLogger("i2am").info("reading %s", HOSTILE)
        logging.getLogger("i2am.data.images").warning("%s", HOSTILE)
        warnings.warn(HOSTILE, stacklevel=1)

    code, out, err = act(say)
    assert (code, out) == (0, "")
    assert clean(err)
    assert [line[:10] for line in err.splitlines()] == ["reading a\\", "warning: a"]


def test_errors_nobody_foresaw_are_no_exception(act, monkeypatch):
    def fail():
        logging.getLogger("i2am").setLevel(logging.DEBUG)
        raise ValueError(HOSTILE)

    code, _, err = act(fail)
    assert code == ExitCode.UNEXPECTED
    assert "Traceback" in err
    assert clean(err)


def test_results_are_lines(act):
    code, out, err = act(lambda: echo(HOSTILE, "", "b"))
    assert (code, out, err) == (0, f"{SHOWN}\n\nb\n", "")
    assert act(lambda: echo(HOSTILE, err=True)) == (0, "", f"{SHOWN}\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_a_letter_gets_its_escape(encoding, monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding))
    echo("naïve \N{SNOWMAN}")
    sys.stdout.flush()
    shown = file.getvalue().decode(encoding)
    expected = {"ascii": "na\\xefve \\u2603", "latin-1": "naïve \\u2603"}
    assert shown == expected.get(encoding, "naïve \N{SNOWMAN}") + "\n"


@pytest.fixture
def evaluated(tmp_path):
    """A run of two samples, everything in it of names that are hostile."""
    plan = make_plan(pairs=2, settings=("paired",), size=[4, 4])
    plan["model"]["name"] = HOSTILE
    plan["data"]["split"] = "test"
    for number, pair in enumerate(plan["data"]["pairs"]["paired"]):
        pair[0] = f"{number}{HOSTILE[:-1]}"
    plan["fingerprint"] = plan_file.fingerprint_of(plan)
    store = Store.create(tmp_path / "run", plan)
    store.commit(*make_shard(plan, failed=0))
    run = store.folder.rename(tmp_path / HOSTILE)
    (run / "shards" / "paired" / HOSTILE).touch()
    return run


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("status", ()),
        ("verify", ()),
        ("export", ("--parquet", "x.parquet")),
        ("score", ("--metrics", "imacs")),
        ("score", ("--metrics", "imacs", "-o", "tables")),
    ],
)
def test_results_of_a_run_with_hostile_names(
    command, options, flags, evaluated, run_here, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = run_here([command, str(evaluated), *options, *flags])
    assert done.code in (ExitCode.INCOMPLETE, ExitCode.CONFLICT), done.err
    assert clean(done.out + done.err)
    if flags:
        json.loads(done.out)
        assert json.dumps(HOSTILE)[1:-1] in done.out
    elif command != "export":
        assert SHOWN[:-6] in done.out


def test_a_recording_with_hostile_names_is_told_and_read_again(
    run_here, record_line, files, tmp_path
):
    for name in ("person", "mask", "reference", "reference_mask"):
        (files / f"{name}.png").rename(files / f"{name}{HOSTILE}.png")
    options = {name: files / f"{name}{HOSTILE}.png" for name in ("person", "mask", "reference")}
    options["reference_mask"] = files / f"reference_mask{HOSTILE}.png"
    # outputs have names in UTF-8
    out, shown = tmp_path / HOSTILE[:-1], i2am.wording.printable(HOSTILE[:-1])
    done = run_here(record_line(out=out, **options))
    assert done.code == ExitCode.DONE, done.err
    assert clean(done.out + done.err)
    assert f"{shown}/" in done.out
    assert run_here([*record_line(out=out, **options), "--overwrite", "--json"]).code == 0
    run = out.rename(tmp_path / HOSTILE)
    for command in ("figure", "report"):
        again = run_here([command, str(run), "-o", f"{out}.{command}"])
        assert again.code == ExitCode.DONE, again.err
        assert clean(again.out + again.err)
        assert f"{shown}.{command}/" in again.out


def test_a_model_with_a_hostile_name(run_here, record_line, paint_by_example_folder, tmp_path):
    # safetensors reads files of UTF-8 names only
    model = paint_by_example_folder.rename(tmp_path / HOSTILE[:-1])
    done = run_here(record_line(model=model, size="32x32"))
    assert done.code == ExitCode.DONE, done.err
    assert clean(done.out + done.err)
    model = model.rename(tmp_path / HOSTILE)
    done = run_here(record_line(model=model, size="32x32", out=tmp_path / "other"))
    assert done.code == ExitCode.REJECTED
    assert "not valid UTF-8" in done.err
    assert clean(done.out + done.err)


PACKAGE = Path(i2am.__file__).parent
WAYS_OUT = re.compile(
    r"\bprint\(|\bclick\.s?echo|\becho_via_pager|sys\.std(?:out|err)\.(?:write|buffer)"
    r"|\bprint_exc|StreamHandler|basicConfig|\blastResort"
)


def test_nothing_is_printed_but_by_echo_and_the_log():
    """A way out that forgets to escape is not written again."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if ways := WAYS_OUT.findall(path.read_text(encoding="utf-8")):
            found[path.relative_to(PACKAGE).as_posix()] = ways
    assert found == {"cli/output.py": ["click.echo"], "cli/app.py": ["StreamHandler"]}


def test_descriptions_of_bars_are_ours_or_escaped():
    bars = []
    for path in PACKAGE.rglob("*.py"):
        for call in re.findall(r"\btqdm\((.*?)\)(?: as|\n|:)", path.read_text("utf-8"), re.DOTALL):
            positional = re.match(r"[\w.]+, (?!\w+=)(.*?),", call)
            named = re.search(r"desc=([^,]+)", call)
            bars += [made[1] for made in (positional, named) if made]
    assert len(bars) >= 7
    ours = {'"latents"', '"scenes"', "stage.name", "system"}
    assert all(bar in ours or bar.startswith("printable(") for bar in bars), bars
    file = io.StringIO()
    list(tqdm([1], i2am.wording.printable(HOSTILE), file=file))
    assert "\x1b" not in file.getvalue()
    assert "\x9b" not in file.getvalue()
