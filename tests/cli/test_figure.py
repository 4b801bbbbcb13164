"""`i2am figure`: runs read again, files, refusals. The runs are written by what records write."""

import json
import os
import sys
from dataclasses import replace

import click
import numpy as np
import pytest
import torch
from PIL import Image

from i2am.attribution import Box
from i2am.cli import drawing
from i2am.cli.errors import ExitCode, InputRejected
from i2am.cli.figure import WHICH
from i2am.cli.figure import figure as command
from i2am.cli.recorded import read_run
from i2am.cli.result import Run, write
from i2am.cli.settings import NamedBox, Settings, read_inputs
from i2am.files import digests_of
from i2am.plots.recorded import FIGURES, NUMBERS
from i2am.testing import make_maps, make_site

SITES = (make_site("down_blocks.0", (4, 3), (5, 5)), make_site("up_blocks.0", (8, 6), (5, 5)))
LOGO = NamedBox("logo", top=40, left=24, height=16, width=16, truth=(0.25, 0.5))


@pytest.fixture
def recorded(files, tmp_path):
    """Writes the output folder of a recording without running a model."""

    def run(name="run", *, sites=SITES, halves=("conditional",), **options):
        out = tmp_path / name
        settings = Settings(
            model="pocket",
            person=files / "person.png",
            mask=files / "mask.png",
            reference=files / "reference.png",
            reference_mask=files / "reference_mask.png",
            out=out,
            **{"steps": 4, "guidance": 2.0, "time_groups": 2, "regions": (LOGO,), **options},
        )
        region = torch.zeros(128, 96)
        region[40:56, 24:40] = 1
        maps = {
            half: make_maps(
                sites,
                samples=1,
                steps=4,
                seed=number,
                mask=torch.eye(128)[:, :96],
                reference_mask=torch.eye(80),
                regions={"logo": region} if settings.regions else None,
                provenance={
                    "steps": settings.steps,
                    "branch": half,
                    "regions": {"logo": str(Box(40, 24, 16, 16, (128, 96)))},
                },
            )
            for number, half in enumerate(halves)
        }
        image = Image.fromarray(np.full((128, 96, 3), 90, np.uint8))
        out.mkdir()
        write(
            out,
            settings,
            read_inputs(settings),
            Run(image, maps, True, "CustomPipeline", "DDIMScheduler", "cpu", 1.0),
        )
        return out

    return run


@pytest.fixture(autouse=True)
def _no_sheets(monkeypatch):
    # their own tests draw them
    monkeypatch.setattr("i2am.cli.result.draw", lambda *_, **__: [])


@pytest.fixture
def headings(monkeypatch):
    """What was asked of each figure: name, number of recordings, keywords."""
    seen, figure = [], drawing.figure

    def watch(which, recordings, **keywords):
        seen.append((which, recordings, keywords))
        return figure(which, recordings, **keywords)

    monkeypatch.setattr(drawing, "figure", watch)
    return seen


def listed(run):
    """Makes run.json list the files as they are."""
    manifest = json.loads((run / "run.json").read_text())
    manifest["files"] = digests_of(run, manifest["files"])
    (run / "run.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("which", ["all", *FIGURES])
def test_maps_that_are_not_finite_are_refused(recorded, run_here, tmp_path, which):
    out = recorded()
    maps = read_run(out).maps
    maps.layer_sums[0].generated_to_reference[0, 0, 0] = torch.nan
    maps.layer_sums[0].reference_to_generated[0, 0, 0] = torch.nan
    maps.save(out / "maps.safetensors")
    listed(out)
    other = recorded("other")
    done = run_here(["figure", str(out), str(other), "--which", which, "-o", str(tmp_path / "f")])
    assert done.code == ExitCode.REJECTED, done.err
    assert "NaN" in done.err.splitlines()[-1]
    assert not (tmp_path / "f").exists()


def test_all_that_one_run_allows(recorded, run_here, tmp_path):
    out = tmp_path / "figures"
    done = run_here(["figure", str(recorded()), "-o", str(out), "--dpi", "50"])
    names = [name for name in FIGURES if name != "models"]
    assert done.code == ExitCode.DONE
    assert done.out.split() == [str(out / f"{name}.png") for name in names]
    assert "models left out, because it compares two recordings or more" in done.err
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{name}.png" for name in names), "run.json"]
    )
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["runs"] == ["../run"]
    assert manifest["settings"]["threshold"] == 0.4
    for name in names:
        with Image.open(out / f"{name}.png") as picture:
            picture.load()
            assert picture.info["dpi"][0] == pytest.approx(50, abs=0.1)
            assert "Software" not in picture.info


def test_several_runs_are_rows_and_single_figures_are_numbered(
    recorded, run_here, headings, tmp_path
):
    runs = [recorded("guided"), recorded("plain", guidance=1.0)]
    arguments = ["figure", *map(str, runs), "--which", "4", "--which", "8", "--which", "models"]
    done = run_here([*arguments, "-o", str(tmp_path / "out"), "--json", "--format", "jpg"])
    assert done.code == ExitCode.DONE
    assert json.loads(done.out)["files"] == [
        "time_and_head.jpg",
        "reference_maps_1.jpg",
        "reference_maps_2.jpg",
        "models.jpg",
    ]
    (_, rows, keywords), *singles, (_, columns, _) = headings
    assert [row.label for row in rows] == ["guidance 2", "no guidance"]
    assert len(columns) == 2
    assert keywords["heading"] == (
        "Maps of the whole run (pocket). R2G: every reference token votes. "
        "G2R: all generated patches count"
    )
    assert [keywords["heading"] for _, _, keywords in singles] == [
        "G2R over time and per head (pocket, guidance 2). G2R: all generated patches count",
        "G2R over time and per head (pocket, no guidance). G2R: all generated patches count",
    ]


def test_options_arrive(recorded, run_here, headings, tmp_path):
    options = "--which 9 --votes mask --weights mask --style paper --threshold 0.2 --shared"
    done = run_here(
        [
            "figure",
            str(recorded()),
            *options.split(),
            "--format",
            "pdf",
            "-o",
            str(tmp_path / "out"),
        ]
    )
    assert done.code == ExitCode.DONE, done.err
    ((which, (one,), keywords),) = headings
    assert which == "specific_reference"
    assert one.truths == {"logo": (0.25, 0.5)}
    assert keywords == {
        "votes": "mask",
        "weights": "mask",
        "style": "paper",
        "threshold": 0.2,
        "shared": True,
        "preset": "paper",
        "heading": "Where on the reference the red patch looked (pocket, guidance 2)",
    }
    assert (tmp_path / "out" / "specific_reference.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("kind", ["png", "jpg", "pdf"])
def test_the_same_run_gives_the_same_bytes(recorded, run_here, tmp_path, kind):
    run, files = str(recorded()), []
    for name in ("first", "second"):
        out = tmp_path / name
        arguments = ["--which", "heads", "--format", kind, "-o", str(out)]
        assert run_here(["figure", run, *arguments]).code == ExitCode.DONE
        files.append((out / f"heads.{kind}").read_bytes())
    assert files[0] == files[1]


def test_a_run_is_read_as_it_was_recorded(recorded):
    run = read_run(recorded())
    assert (run.model, run.guidance, run.steps, run.preset) == ("pocket", 2.0, 4, "paper")
    assert run.trained
    assert run.maps.regions == ("logo",)
    assert run.generated.size == (96, 128)
    assert run.reference.size == (80, 80)


def test_halves_of_guidance_are_told_apart(recorded):
    both = recorded(halves=("conditional", "unconditional"), guidance_branch="both")
    for branch in (None, "conditional", "unconditional"):
        maps = read_run(both, branch=branch).maps
        assert maps.provenance["branch"] == (branch or "conditional")
    with pytest.raises(InputRejected, match="must hold the unconditional half, it holds the con"):
        read_run(recorded("one"), branch="unconditional")


def test_choices_are_the_figures_there_are():
    assert set(WHICH) == {*NUMBERS, *FIGURES, "all"}
    assert isinstance(command, click.Command)


def test_an_earlier_result_is_replaced_on_request_alone(recorded, run_here, tmp_path):
    line = ["figure", str(recorded()), "--which", "heads", "-o", str(tmp_path / "out")]
    assert run_here(line).code == ExitCode.DONE
    assert run_here(line).code == ExitCode.CONFLICT
    assert run_here([*line, "--overwrite"]).code == ExitCode.DONE


def _no_manifest(run):
    (run / "run.json").unlink()
    return "must be an output folder of i2am record, it has no run.json"


def _other_command(run):
    (run / "run.json").write_text('{"files": []}')
    return "its run.json is of another command"


def _no_json(run):
    (run / "run.json").write_text('{"files"')
    return "run.json is damaged"


def _no_settings(run):
    (run / "run.json").write_text('{"command": "record"}')
    return "run.json is damaged: it has no i2am"


def _no_maps(run):
    (run / "maps.safetensors").unlink()
    return "must hold maps.safetensors, it is not there"


def _cut_maps(run):
    path = run / "maps.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    return "it has changed since, or is of another run"


def _no_image(run):
    (run / "image.png").unlink()
    return "must hold image.png, it is not there"


def _no_reference(run):
    (run.parent / "files" / "reference.png").unlink()
    return "it was an input of run"


def _other_reference(run):
    Image.new("RGB", (80, 80)).save(run.parent / "files" / "reference.png")
    return "it has changed since"


def _other_maps(run):
    make_maps(SITES, samples=1, steps=4, seed=9).save(run / "maps.safetensors")
    return "maps.safetensors must be the one of run"


def _other_image(run):
    Image.new("RGB", (96, 128)).save(run / "image.png")
    return "image.png must be the one of run"


def _pipe(name):
    def damage(run):
        (run / name).unlink()
        os.mkfifo(run / name)
        return f"{name} must be a regular file, it is a pipe or a device"

    damage.__name__ = f"pipe_{name}"
    return damage


def _endless_manifest(run):
    (run / "run.json").unlink()
    (run / "run.json").symlink_to("/dev/zero")
    return "run.json must be a regular file"


def _folder_of_maps(run):
    (run / "maps.safetensors").unlink()
    (run / "maps.safetensors").mkdir()
    return "maps.safetensors is a folder, a file was expected"


def _large_manifest(run):
    with (run / "run.json").open("ab") as file:
        file.truncate(6 * 10**9)
    return "run.json must have at most"


def _manifest_with(said, **fields):
    def damage(run):
        manifest = json.loads((run / "run.json").read_text())
        for path, value in fields.items():
            *above, last = path.split("__")
            holder = manifest
            for name in above:
                holder = holder[name]
            holder[last] = value
        (run / "run.json").write_text(json.dumps(manifest))
        return said

    damage.__name__ = "_".join(fields)
    return damage


def _deep_manifest(run):
    (run / "run.json").write_text(
        '{"command": "record", "deep": ' + "[" * 10**5 + "]" * 10**5 + "}"
    )
    return "run.json is damaged: it is nested too deeply"


@pytest.mark.parametrize(
    "damage",
    [
        *(_no_manifest, _other_command, _no_json, _no_settings, _no_maps, _cut_maps),
        *(_no_image, _no_reference, _other_reference, _other_maps, _other_image),
        *map(_pipe, ("run.json", "maps.safetensors", "image.png")),
        *(_endless_manifest, _folder_of_maps, _large_manifest, _deep_manifest),
        _manifest_with('settings.steps must be an integer, got "50"', settings__steps="50"),
        _manifest_with("settings.guidance must be a finite number", settings__guidance=None),
        _manifest_with("NaN is no finite number", settings__guidance=float("nan")),
        _manifest_with("settings.regions is damaged: it has no name", settings__regions=[{}]),
        _manifest_with("truth of region a", settings__regions=[{"name": "a", "truth": "xy"}]),
        _manifest_with(
            "inputs.reference is damaged: it has no sha256", inputs__reference={"file": "x"}
        ),
        _manifest_with("does not list it", files={}),
        _manifest_with("files must be an object", files=["image.png"]),
        _manifest_with("files.image.png is damaged: it has no bytes", files={"image.png": {}}),
        _manifest_with("it has no image.width", image={"height": 3}),
    ],
    ids=lambda damage: damage.__name__.strip("_"),
)
def test_damaged_runs_are_rejected_in_a_sentence(recorded, run_here, tmp_path, damage):
    run = recorded()
    said = damage(run)
    done = run_here(["figure", str(run), "-o", str(tmp_path / "out")])
    assert done.code == ExitCode.REJECTED
    assert said in done.err
    assert done.err.count("error: ") == 1
    assert done.err.count("\n") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--which", "models"], "because it compares two recordings or more"),
        (["--which", "9"], "because no region was recorded"),
        (["--which", "8", "--guidance-branch", "unconditional"], "must hold the unconditional"),
    ],
    ids=["models", "no-region", "half"],
)
def test_what_was_not_recorded_cannot_be_drawn(recorded, run_here, tmp_path, options, said):
    run = recorded(regions=())
    done = run_here(["figure", str(run), *options, "-o", str(tmp_path / "out")])
    assert done.code == ExitCode.REJECTED
    assert said in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:preset 'official' is approximate")
def test_runs_of_two_presets_need_a_choice(recorded, run_here, tmp_path):
    runs = [str(recorded()), str(recorded("official", preset="official"))]
    line = ["figure", *runs, "--which", "heads", "-o", str(tmp_path / "out")]
    done = run_here(line)
    assert done.code == ExitCode.REJECTED
    assert "choose one with --preset" in done.err
    assert run_here([*line, "--preset", "paper"]).code == ExitCode.DONE


def test_without_matplotlib_one_sentence_names_the_extra(recorded, run_here, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "i2am.plots.shown", raising=False)
    done = run_here(["figure", str(recorded()), "--which", "5", "-o", str(tmp_path / "out")])
    assert done.code == ExitCode.REJECTED
    assert 'install it with: pip install "i2am[plots]"' in done.err
    assert not (tmp_path / "out").exists()


def test_random_weights_and_single_tokens_are_said(recorded):
    run = read_run(recorded(regions=()))
    asked = drawing.Drawing(runs=(run.folder,), which=("heads",), out=run.folder)
    model = {**run.manifest["model"], "trained": False}
    untrained = replace(run, manifest={**run.manifest, "model": model})
    single = make_maps([make_site("a", (4, 3), None)], samples=1)
    heading = drawing._heading("heads", [replace(untrained, maps=single)], asked, "official")
    assert heading == (
        "R2G per head, averaged over 1 of 1 layers (pocket, random weights, guidance 2, layers "
        "with a single reference token, whose maps show no cause, preset official). R2G: every "
        "reference token votes"
    )
    # of two models it stands beside the one it is true of
    labels = drawing._labels([run, untrained])
    assert labels == ["pocket", "pocket, random weights"]
