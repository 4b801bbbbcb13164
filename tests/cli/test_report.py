"""`i2am report`: runs of record and of evaluate become pages. No model runs here."""

import io
import json
import os
import re
import shutil
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from i2am.attribution import Box
from i2am.cli.app import app
from i2am.cli.errors import ExitCode
from i2am.cli.report import report as command
from i2am.cli.reporting import Wanted, samples_of
from i2am.cli.result import Run, write
from i2am.cli.settings import NamedBox, Settings, read_inputs
from i2am.data import write_viton_hd
from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_plan, make_shard
from i2am.files import digests_of
from i2am.metrics.names import IMACS_NAMES
from i2am.testing import make_maps, make_site

SITES = (make_site("down_blocks.0", (4, 3), (5, 5)), make_site("up_blocks.0", (8, 6), (5, 5)))
LOGO = NamedBox("logo", top=40, left=24, height=16, width=16, truth=(0.25, 0.5))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(app.commands, "report", command)


@pytest.fixture
def run(run_here):
    return lambda *arguments: run_here([str(argument) for argument in arguments])


@pytest.fixture
def recorded(files, tmp_path):
    """Writes the output folder of a recording without running a model."""

    def record(name="run", halves=("conditional",), change=lambda maps: None):
        out = tmp_path / name
        settings = Settings(
            model="pocket",
            person=files / "person.png",
            mask=files / "mask.png",
            reference=files / "reference.png",
            reference_mask=files / "reference_mask.png",
            out=out,
            steps=4,
            guidance=2.0,
            time_groups=2,
            regions=(LOGO,),
            guidance_branch="both" if len(halves) > 1 else halves[0],
        )
        region = torch.zeros(128, 96)
        region[40:56, 24:40] = 1
        maps = {
            half: make_maps(
                SITES,
                samples=1,
                steps=4,
                seed=number,
                mask=torch.eye(128)[:, :96],
                reference_mask=torch.eye(80),
                regions={"logo": region},
                pairs=True,
                provenance={
                    "steps": 4,
                    "branch": half,
                    "regions": {"logo": str(Box(40, 24, 16, 16, (128, 96)))},
                },
            )
            for number, half in enumerate(halves)
        }
        for of in maps.values():
            change(of)
        image = Image.fromarray(np.full((128, 96, 3), 90, np.uint8))
        out.mkdir()
        inputs = read_inputs(settings)
        write(out, settings, inputs, Run(image, maps, True, "CustomPipeline", "DDIM", "cpu", 1.0))
        return out

    return record


def documents(path):
    html = path.read_text(encoding="utf-8")
    return [json.loads(text) for text in re.findall(r'class="sample">(.*?)</script>', html)]


def test_a_recorded_run_becomes_a_page(recorded, run, tmp_path):
    out = recorded()
    done = run("report", out, "-o", tmp_path / "page.html")
    assert (done.code, done.out) == (0, f"{tmp_path / 'page.html'}\n")
    (document,) = documents(tmp_path / "page.html")
    assert document["id"] == "run"
    names = [entry["name"] for entry in document["maps"]]
    assert names == [
        "share",
        "r2g",
        "r2g_mask",
        "g2r",
        "g2r_mask",
        "region 0",
        "pairs_g2r",
        "pairs_r2g",
    ]
    region = {"name": "logo", "box": [40 / 128, 24 / 96, 16 / 128, 16 / 96], "truth": [0.25, 0.5]}
    assert document["regions"] == [region]
    scores = json.loads((out / "scores.json").read_text())
    assert document["scores"] == scores
    assert document["generated"]["outline"]
    assert document["sources"][0]["reference"]["outline"]
    assert document["facts"]["Guidance"] == "2, conditional half recorded"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("direction", ["g2r", "r2g"])
def test_pair_maps_that_are_not_finite_are_refused(recorded, run, tmp_path, direction, value):
    def change(maps):
        getattr(maps.pairs, direction)[0, -1, 2, 1] = value

    out = recorded(change=change)
    for page in ("page.html", "page"):
        done = run("report", out, "-o", tmp_path / page)
        assert done.code == ExitCode.REJECTED, done.err
        assert "cannot be shown: maps must be finite, got NaN or Inf in" in done.err
        assert "of the pair maps" in done.err
        assert not (tmp_path / page).exists()


def test_both_halves_and_several_runs_are_samples(recorded, run, tmp_path):
    runs = [recorded("first"), recorded("second", ("conditional", "unconditional"))]
    done = run("report", *runs, "-o", tmp_path / "report", "--title", "both", "--json")
    assert done.code == 0
    result = json.loads(done.out)
    assert result["page"] == str(tmp_path / "report" / "index.html")
    assert result["left_out"] == []
    assert len(result["files"]) == 7
    html = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    index = json.loads(re.search(r'id="index">(.*?)</script>', html)[1])
    ids = [entry["id"] for entry in index["samples"]]
    assert ids == ["first", "second, conditional", "second, unconditional"]
    assert index["samples"][2]["scores"].keys() == {*IMACS_NAMES}


def test_a_mask_that_is_gone_is_said_and_a_reference_is_missed(recorded, run, files, tmp_path):
    out = recorded()
    (files / "mask.png").unlink()
    (files / "reference_mask.png").write_bytes(b"another")
    done = run("report", out, "-o", tmp_path / "page.html")
    assert done.code == 0
    assert "its outline is left out" in done.err
    (document,) = documents(tmp_path / "page.html")
    assert document["generated"]["outline"] is None
    assert document["notes"] == [
        "The mask mask.png is not there any more: its outline is left out.",
        "The reference_mask reference_mask.png has changed since: its outline is left out.",
    ]
    (files / "reference.png").unlink()
    done = run("report", out, "-o", tmp_path / "other.html")
    assert done.code == ExitCode.REJECTED
    assert "reference" in done.err
    assert not (tmp_path / "other.html").exists()


def test_a_large_page_says_that_a_folder_would_be_better(recorded, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[command.callback.__module__], "LARGE", 1000)
    done = run("report", recorded(), "-o", tmp_path / "page.html")
    assert done.code == 0
    assert "becomes a folder" in done.err


@pytest.mark.parametrize("content", [None, "{}", "no json", '{"command": "demo"}'])
def test_other_folders_are_rejected(run, tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    if content is not None:
        (folder / "run.json").write_text(content)
    done = run("report", folder, "-o", tmp_path / "page.html")
    assert done.code == ExitCode.REJECTED
    assert str(folder) in done.err
    assert not (tmp_path / "page.html").exists()


def test_a_folder_in_use_is_a_conflict(recorded, run, tmp_path):
    out = recorded()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    done = run("report", out, "-o", tmp_path / "taken")
    assert done.code == ExitCode.CONFLICT
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


# i2am evaluate


def _other_maps(path):
    make_maps(SITES, samples=1, steps=4, seed=9, pairs=True).save(path)


def _other_image(path):
    Image.new("RGB", (96, 128), (9, 0, 0)).save(path)


def _other_scores(path):
    path.write_text('{"imacs_r": {"value": 0.875, "reason": null}}')


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("maps.safetensors", _other_maps),
        ("image.png", _other_image),
        ("scores.json", _other_scores),
    ],
)
def test_a_file_of_another_run_is_refused(recorded, run, tmp_path, name, write):
    out = recorded()
    write(out / name)
    done = run("report", out, "-o", tmp_path / "page.html")
    assert done.code == ExitCode.REJECTED
    assert f"{name} must be the one of run {out}" in done.err
    assert not (tmp_path / "page.html").exists()


def _listed(out, name, content):
    (out / name).write_text(content)
    manifest = json.loads((out / "run.json").read_text())
    manifest["files"] = digests_of(out, manifest["files"])
    (out / "run.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "scores.json is damaged"),
        ('{"imacs_g": 1}', "scores.json is damaged"),
        ('{"imacs_g": {"value": "1", "reason": null}}', "value must be a finite number"),
        ('{"imacs_g": {"value": true, "reason": null}}', "value must be a finite number"),
        ('{"imacs_g": {"value": NaN, "reason": null}}', "NaN is no finite number"),
        ('{"imacs_g": {"value": 1e999, "reason": null}}', "1e999 is no finite number"),
        ('{"imacs_g": {"value": null, "reason": 3}}', "reason must be a string"),
        ("[" * 10**5, "nested too deeply"),
    ],
)
def test_scores_that_are_none(recorded, run, tmp_path, content, said):
    out = recorded()
    _listed(out, "scores.json", content)
    done = run("report", out, "-o", tmp_path / "page.html")
    assert done.code == ExitCode.REJECTED
    assert said in done.err


@pytest.fixture
def evaluated(tmp_path):
    """Four people in each setting, of whom one failed and one has an undefined score."""
    data = tmp_path / "data"
    write_viton_hd(data, train=0, test=4)
    plan = make_plan(pairs=4)
    plan["data"] |= {"folder": str(data), "split": "test"}
    people = [f"{number:05d}_00" for number in range(4)]
    plan["data"]["pairs"] = {"paired": [], "unpaired": []}
    for line, person in enumerate(people, 1):
        garment = people[line % 4]
        plan["data"]["pairs"]["paired"].append([person, person, person, line, f"{person}.jpg"])
        plan["data"]["pairs"]["unpaired"].append(
            [f"{person}_{garment}", person, garment, line, f"{person}.jpg"]
        )
    store = Store.create(tmp_path / "run", plan)
    for setting in store.settings():
        for number in store.shard_numbers(setting):
            shard, images = make_shard(
                plan,
                setting,
                number,
                failed=0 if (setting, number) == ("paired", 1) else None,
                undefined=1 if (setting, number) == ("paired", 0) else None,
            )
            images = {id: png(len(id) + number) for id in images}
            sums = {id: zlib.crc32(data) for id, data in images.items()}
            store.commit(replace(shard, images=sums), images)
    return store


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (96, 128), (level, 2 * level, 200)).save(file, "PNG")
    return file.getvalue()


def test_an_evaluation_becomes_a_folder(evaluated, run, tmp_path):
    done = run("report", tmp_path / "run", "-o", tmp_path / "report", "--json")
    assert done.code == ExitCode.INCOMPLETE
    result = json.loads(done.out)
    assert result["left_out"] == [{"id": "paired/00002_00", "reason": "NaN in layer up.0"}]
    html = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    index = json.loads(re.search(r'id="index">(.*?)</script>', html)[1])
    ids = [entry["id"] for entry in index["samples"]]
    assert ids[:3] == [f"paired/{person}_00" for person in ("00000", "00001", "00003")]
    assert ids[3] == "unpaired/00000_00_00001_00"
    assert len(ids) == 7
    undefined = index["samples"][1]["scores"]["imacs_r"]
    assert undefined == {"value": None, "reason": "its map is the same everywhere"}
    shard = evaluated.read("paired", 0)
    assert index["samples"][0]["scores"]["imacs_g"]["value"] == float(shard.scores[0, 0])


def test_the_maps_of_a_shard_are_read_as_recordings_are(evaluated, tmp_path):
    wanted = Wanted((tmp_path / "run",), setting="unpaired", limit=2)
    samples = list(samples_of(wanted))
    assert [sample.id.split("/")[0] for sample in samples] == ["unpaired"] * 2
    shard = evaluated.read("unpaired", 0)
    scale = shard.maps["g2r_uniform_scale"][1, :, :, None, None]
    sums = shard.maps["g2r_uniform"][1].double() * scale
    stack = next(stack for stack in samples[1].stacks if stack.name == "g2r")
    assert stack.slices == ("all", "t0", "t1", "h0", "h1", "h2")
    exact = [sums.sum(0).mean(0), *sums.mean(1), *sums.sum(0)]
    torch.testing.assert_close(stack.maps[:, 0].double(), torch.stack(exact), rtol=1e-6, atol=0)
    # an unpaired sample shows the garment of the other person
    garment = Image.open(tmp_path / "data" / "test" / "cloth" / "00001_00.jpg").convert("RGB")
    assert np.array_equal(np.asarray(samples[0].sources[0].reference), np.asarray(garment))


def test_a_sample_whose_kept_maps_are_not_finite_is_left_out(evaluated, run, tmp_path):
    shard = evaluated.read("unpaired", 0)
    shard.maps["g2r_uniform"][1, 0, 0, 0, 0] = torch.nan
    path = evaluated.shard_path("unpaired", 0)
    path.unlink()
    images = {id: evaluated.image_path("unpaired", id).read_bytes() for id in shard.ids}
    Store.create(evaluated.folder, evaluated.plan).commit(shard, images)
    done = run("report", tmp_path / "run", "-o", tmp_path / "r", "--setting", "unpaired", "--json")
    assert done.code == ExitCode.INCOMPLETE, done.err
    assert json.loads(done.out)["left_out"] == [
        {
            "id": f"unpaired/{shard.ids[1]}",
            "reason": "maps must be finite, got NaN or Inf in g2r",
        }
    ]


@pytest.mark.parametrize("damage", ["swapped", "missing", "pipe", "folder"])
def test_an_image_that_its_shard_does_not_list_is_left_out(evaluated, run, tmp_path, damage):
    path = evaluated.image_path("paired", "00000_00")
    path.unlink()
    if damage == "swapped":
        shutil.copy(evaluated.image_path("paired", "00003_00"), path)
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    done = run("report", tmp_path / "run", "-o", tmp_path / "report", "--json")
    assert done.code == ExitCode.INCOMPLETE
    left_out = json.loads(done.out)["left_out"]
    assert [entry["id"] for entry in left_out] == ["paired/00000_00", "paired/00002_00"]
    said = {
        "swapped": "does not match its checksum",
        "missing": "is missing",
        "pipe": "must be a regular file",
        "folder": "is a folder",
    }
    assert left_out[0]["reason"].startswith(str(path))
    assert said[damage] in left_out[0]["reason"]


def test_a_data_set_that_moved_is_named(evaluated, run, tmp_path):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    done = run("report", tmp_path / "run", "-o", tmp_path / "report")
    assert done.code == ExitCode.REJECTED
    assert "--data" in done.err
    assert not (tmp_path / "report").exists()
    options = ("--data", tmp_path / "elsewhere", "--setting", "unpaired")
    done = run("report", tmp_path / "run", "-o", tmp_path / "report", *options)
    assert done.code == 0


def test_a_reason_to_leave_samples_out_is_told_once(evaluated, run, tmp_path):
    write_viton_hd(tmp_path / "small", train=0, test=2)
    done = run("report", tmp_path / "run", "-o", tmp_path / "r", "--data", tmp_path / "small")
    assert done.code == ExitCode.INCOMPLETE
    told = [line.split("left out: ")[1] for line in done.err.splitlines() if "left out" in line]
    assert told == [
        "paired/00002_00: NaN in layer up.0",
        "paired/00003_00: it is not in the data set paired",
        "unpaired/00001_00_00002_00, unpaired/00002_00_00003_00, unpaired/00003_00_00000_00: "
        "it is not in the data set unpaired",
    ]


def test_many_samples_of_a_reason_are_counted(caplog):
    from i2am.cli.report import _tell

    _tell({f"paired/{number}": "it failed" for number in range(5)} | {"last": "another"})
    assert [record.getMessage() for record in caplog.records] == [
        "left out: paired/0, paired/1, paired/2 and 2 more: it failed",
        "left out: last: another",
    ]


def test_a_damaged_shard_is_a_conflict(evaluated, run, tmp_path):
    path = evaluated.shard_path("unpaired", 0)
    path.write_bytes(path.read_bytes()[:-3])
    done = run("report", tmp_path / "run", "-o", tmp_path / "report")
    assert done.code == ExitCode.CONFLICT
    assert not (tmp_path / "report").exists()
