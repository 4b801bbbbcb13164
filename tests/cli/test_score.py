"""`i2am score` from outside: exit codes, what is printed and written, broken installations."""

import csv
import io
import json
import subprocess
import sys
import time

import pytest

from i2am.cli import main
from i2am.cli.errors import Terminated
from i2am.evaluation.scores import scoring
from i2am.evaluation.scores.protocols import PROTOCOLS
from i2am.evaluation.scores.ssim import SSIM
from i2am.evaluation.scores.testing import make_run

QUICK = ["--bootstrap", "20", "--quiet"]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", tmp_path / "data")


def written(run):
    folder = run.folder / "results"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_files(document):
    return {name: value for name, value in document.items() if name != "files"}


def test_imacs_alone_is_done(run, run_here):
    done = run_here(["score", str(run.folder), "--metrics", "imacs", *QUICK])
    assert (done.code, done.err) == (0, f"reading {run.folder}\n")
    assert set(written(run)) == {"scores.csv", "metrics.json"}
    lines = done.out.splitlines()
    assert lines[1].split() == ["model", "n", *["IMACS_g", "IMACS_g", "share", "IMACS_r"] * 2]
    assert lines[2].split()[:2] == ["pocket", "6+6"]
    assert "imacs_g_mask_votes" in done.out


def test_json_is_the_document_that_is_written(run, run_here):
    done = run_here(["score", str(run.folder), "--metrics", "imacs,ssim", "--json", *QUICK])
    assert done.code == 0
    assert json.loads(done.out) == without_files(json.loads(written(run)["metrics.json"]))


def test_a_shard_that_is_deleted_while_scoring(run, run_here, monkeypatch):
    path = run.shard_path("paired", 1)

    def read(*arguments):
        samples = scoring_samples(*arguments)
        path.unlink(missing_ok=True)
        return samples

    scoring_samples = scoring.read_samples
    monkeypatch.setattr(scoring, "read_samples", read)
    done = run_here(["score", str(run.folder), "--metrics", "imacs,ssim", *QUICK])
    assert done.code == 5
    assert "error: shard 1 of paired is not in" in done.err
    assert "or was removed" in done.err
    assert not [*(run.folder / "results").iterdir()]


def test_results_that_cannot_be_written_are_refused_before(run, run_here, monkeypatch, tmp_path):
    def forbidden(*_, **__):
        raise AssertionError("scored before")

    monkeypatch.setattr(scoring, "score_run", forbidden)
    (run.folder / "results").symlink_to(tmp_path)
    done = run_here(["score", str(run.folder), *QUICK])
    assert done.code == 5
    assert "results is a link, and nothing is written through it" in done.err


def test_the_same_command_writes_the_same_bytes(run, run_here):
    line = ["score", str(run.folder), "--metrics", "imacs,ssim", *QUICK]
    run_here(line)
    first = written(run)
    run_here(line)
    assert written(run) == first


def test_weights_that_are_not_there_cost_three_metrics(run, run_here):
    done = run_here(["score", str(run.folder), *QUICK])
    assert done.code == 3
    # one sentence each, for six rows
    rows = [line for line in done.out.splitlines() if "not computed [" in line]
    assert [row.split()[1] for row in rows] == [
        *("lpips", "fid", "kid_full", "kid_subset50", "kid_full_x1000", "kid_subset50_x1000")
    ]
    assert [row.split()[-1] for row in rows] == ["[1]", *["[2]"] * 5]
    first, second = done.out.splitlines()[-2:]
    assert first.startswith("[1] LPIPS needs the weights")
    assert second.startswith("[2] Inception for FID and KID needs the weights")
    assert second.endswith("name the file with --inception")
    for said in ("LPIPS needs", "Inception for FID and KID needs"):
        assert done.out.count(said) == 1
    made = json.loads(written(run)["metrics.json"])["settings"]
    assert made["paired"]["metrics"]["ssim"]["status"] == "ok"
    assert made["paired"]["metrics"]["lpips"]["value"] is None
    assert made["unpaired"]["metrics"]["fid"]["status"] == "not_computed"


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_the_protocol_is_named_with_the_numbers(run, run_here, protocol):
    line = ["score", str(run.folder), "--metrics", "ssim", "--protocol", protocol, *QUICK]
    done = run_here(line)
    assert done.code == 0
    assert f"protocol {protocol}" in done.out
    assert json.loads(written(run)["metrics.json"])["protocol"]["name"] == protocol


def test_a_part_of_a_run_says_how_much(tmp_path, run_here):
    run = make_run(tmp_path / "run", tmp_path / "data", commit=[0])
    done = run_here(["score", str(run.folder), "--metrics", "imacs", *QUICK])
    assert done.code == 3
    assert "1 of 3 shards of paired are committed" in done.err
    assert "2+2 of 6+6" in done.out
    assert "4 not committed" in done.out


def test_failed_samples_are_told(tmp_path, run_here):
    run = make_run(tmp_path / "run", tmp_path / "data", failed=0)
    done = run_here(["score", str(run.folder), "--metrics", "imacs", *QUICK])
    assert done.code == 3
    assert "1 sample of unpaired failed and have no scores" in done.err
    assert "1 without [1]" in done.out
    assert done.out.splitlines()[-1] == "[1] NaN in layer up.0"


@pytest.fixture
def models(tmp_path):
    return [
        make_run(
            tmp_path / f"run-{noise:.0f}", tmp_path / "data", noise=noise, model=f"m{noise:.0f}"
        )
        for noise in (5.0, 20.0, 60.0)
    ]


def test_several_runs_give_one_table_and_their_correlation(models, run_here, tmp_path):
    out = tmp_path / "out"
    folders = [str(run.folder) for run in models]
    done = run_here(["score", *folders, "--metrics", "imacs,ssim", "-o", str(out), *QUICK])
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()[2:5]] == ["m5", "m20", "m60"]
    rows = list(csv.DictReader(io.StringIO((out / "correlation.csv").read_text())))
    across = [row for row in rows if row["over"] == "models"]
    # worse pictures and lower IMACS go together in these runs, by construction
    assert [row["spearman"] for row in across] == ["1.0"] * len(across) != []
    assert {row["over"] for row in rows} == {"models", "m5", "m20", "m60"}
    assert (out / "models.png").read_bytes().startswith(b"\x89PNG")
    for run in models:
        assert set(written(run)) == {"scores.csv", "metrics.json"}


def test_several_runs_as_json(models, run_here):
    folders = [str(run.folder) for run in models]
    done = run_here(["score", *folders, "--metrics", "imacs,ssim", "--json", *QUICK])
    document = json.loads(done.out)
    assert [run["name"] for run in document["runs"]] == ["m5", "m20", "m60"]
    assert document["correlations"][0]["over"] == "models"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "Missing argument 'RUN [RUN ...]'"),
        (["{data}"], 5, "is not a run of i2am evaluate"),
        (["{run}", "--metrics", "imacs,psnr"], 2, "'psnr' is none of imacs, ssim, lpips"),
        (["{run}", "--protocol", "mine"], 2, "'mine' is not one of"),
        (["{run}", "{run}"], 2, "the same RUN is given twice"),
        (["{run}", "--bootstrap", "-1"], 2, "-1 is not in the range"),
    ],
    ids=["no-run", "no-run-folder", "metric", "protocol", "twice", "bootstrap"],
)
def test_a_wrong_line_is_answered_with_one_sentence(run, tmp_path, run_here, arguments, code, said):
    places = {"{run}": str(run.folder), "{data}": str(tmp_path / "data")}
    done = run_here(["score", *(places.get(argument, argument) for argument in arguments)])
    assert done.code == code
    assert said in done.err
    assert done.err.count("error: ") == 1
    assert done.err.count("\n") == (1 if code == 2 else 2)
    assert done.out == ""
    assert not (run.folder / "results").exists()


def test_what_two_runs_lack_is_said_once(models, run_here):
    folders = [str(run.folder) for run in models]
    done = run_here(["score", *folders, "--metrics", "lpips", *QUICK])
    assert done.code == 3
    assert done.out.count("not computed [1]") == 3
    assert done.out.count("LPIPS needs the weights") == 1


def test_pictures_that_are_not_there_are_a_gap(run, run_here, tmp_path):
    for path in (tmp_path / "data" / "test" / "image").iterdir():
        path.unlink()
    done = run_here(["score", str(run.folder), "--metrics", "ssim", *QUICK])
    assert done.code == 3
    assert "00000_00.jpg does not exist" in done.out.splitlines()[-1]


def test_a_damaged_run_is_not_scored(run, run_here):
    path = run.shard_path("paired", 0)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    done = run_here(["score", str(run.folder), "--metrics", "imacs", *QUICK])
    assert done.code == 5
    assert "checksum" in done.err


def test_a_file_in_the_place_of_the_results_is_a_conflict(run, run_here):
    (run.folder / "results").write_text("in the way")
    done = run_here(["score", str(run.folder), "--metrics", "imacs", *QUICK])
    assert done.code == 5
    assert (run.folder / "results").read_text() == "in the way"


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_stopped_score_leaves_what_was_there_and_goes_on(run, run_here, monkeypatch, stop, code):
    line = ["score", str(run.folder), "--metrics", "imacs,ssim", *QUICK]
    run_here([*line, "--seed", "1"])
    before = written(run)
    for path in (run.folder / "features").rglob("000002.safetensors"):
        path.unlink()
    measured = []

    def counted(self, pictures, measure=SSIM.__call__):
        measured.append(1)
        if len(measured) == 2:
            raise stop
        return measure(self, pictures)

    monkeypatch.setattr(SSIM, "__call__", counted)
    done = run_here(line)
    assert done.code == code
    assert "the same command goes on" in done.err
    assert written(run) == before
    assert run_here(line).code == 0
    # the shard of two that was interrupted, and nothing else
    assert len(measured) == 2 + 2
    assert written(run) != before


@pytest.fixture
def broken_torchvision(tmp_path):
    """Site packages with a torchvision that was built for another torch."""
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    fault = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (package / "__init__.py").write_text(fault)
    info = tmp_path / "site" / "torchvision-0.28.0.dist-info"
    info.mkdir()
    metadata = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    (info / "METADATA").write_text(metadata)
    return tmp_path / "site"


def test_imacs_does_not_mind_a_broken_torchvision(run, run_fresh, broken_torchvision):
    line = ["score", str(run.folder), "--metrics", "imacs", *QUICK]
    done = run_fresh(line, path=broken_torchvision)
    assert (done.code, done.err) == (0, f"reading {run.folder}\n")


@pytest.mark.slow
def test_a_broken_torchvision_costs_what_needs_it(run, run_fresh, broken_torchvision):
    line = ["score", str(run.folder), "--metrics", "imacs,ssim", *QUICK]
    done = run_fresh(line, path=broken_torchvision)
    assert done.code == 3
    made = json.loads(written(run)["metrics.json"])["settings"]["paired"]["metrics"]
    assert made["imacs_g"]["value"] is not None
    assert made["ssim"]["status"] == "not_computed"
    assert "operator torchvision::nms does not exist" in made["ssim"]["reason"]
    assert "; install the torchvision that was built for torch" in made["ssim"]["reason"]


def test_help_imports_nothing_heavy():
    code = """
import sys
from i2am.cli import main
main(["score", "--help"])
print("loaded:", *{"torch", "numpy", "PIL", "scipy", "torchmetrics"} & {*sys.modules})
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "--inception" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.slow
def test_two_thousand_samples_take_less_than_ten_seconds(tmp_path):
    run = make_run(tmp_path / "run", tmp_path / "data", pairs=2032, shard=16, settings=("paired",))
    start = time.process_time()  # of this process alone: others may share the machine
    assert main(["score", str(run.folder), "--metrics", "imacs", "--quiet"]) == 0
    assert time.process_time() - start < 10
    assert len(written(run)["scores.csv"].splitlines()) == 2033
