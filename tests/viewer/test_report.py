"""Pages and folders as files: what is refused, what is in them, and a full disk."""

import errno
import json
import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from i2am.files import OutputRefused
from i2am.plots.titles import step_titles
from i2am.viewer import page, render, sample, write_report
from i2am.viewer.html import as_json
from i2am.viewer.packing import pack
from i2am.viewer.pictures import outline


def test_a_page_of_a_recording(recording, make_image):
    html = page(
        recording,
        generated=make_image(0),
        reference=make_image(1),
        scores={"imacs_g": {"value": 0.5, "reason": None}},
        title="a run",
        facts={"Model": "random"},
    )
    assert html.startswith("<!doctype html>")
    assert "<title>a run</title>" in html
    assert "<!--" not in html.replace("<!doctype", "")
    (block,) = re.findall(r'class="sample">(.*?)</script>', html)
    document = json.loads(block)
    assert document["id"] == "a run"
    assert document["times"] == ["steps 1 to 2", "steps 3 to 4", "steps 5 to 6"]
    assert document["layers"] == ["down_blocks.0", "up_blocks.0"]
    assert {entry["name"] for entry in document["maps"]} == {
        *("share", "r2g", "r2g_mask", "g2r", "g2r_mask", "region 0", "pairs_g2r", "pairs_r2g")
    }
    # equal content, equal bytes
    again = {"generated": make_image(0), "reference": make_image(1)}
    assert page(recording, **again) == page(recording, **again)


def test_several_samples_share_a_reference(make_recording, make_image):
    from i2am.attribution import AttributionMaps

    both = AttributionMaps.merge([make_recording(0), make_recording(1)])
    html = page(both, generated=[make_image(0), make_image(1)], reference=make_image(2))
    blocks = re.findall(r'class="sample">(.*?)</script>', html)
    documents = [json.loads(block) for block in blocks]
    assert [document["id"] for document in documents] == ["sample 0", "sample 1"]
    payloads = [document["payloads"]["pairs"]["base64"] for document in documents]
    assert payloads[0] != payloads[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generated": []}, "generated must hold at least one image, got an empty list"),
        ({"ids": ["a", "b"]}, "ids must be as many as samples, 1, got 2"),
        ({"preset": "best"}, "preset"),
    ],
)
def test_what_a_page_refuses(recording, make_image, options, message):
    given = {"generated": make_image(0), "reference": make_image(1), **options}
    with pytest.raises(ValueError, match=message):
        page(recording, **given)


def test_maps_that_are_not_finite_are_refused(make_recording, make_image):
    maps = make_recording()
    maps.layer_sums[1].generated_to_reference[0, 0, 0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"finite, got NaN or Inf in .*up_blocks\.0"):
        sample(maps, generated=make_image(0), reference=make_image(1))
    with pytest.raises(ValueError, match="maps must be finite"):
        pack(torch.tensor([[[[1.0, math.inf]]]]), [63])
    with pytest.raises(ValueError, match=r"maps must be \[slices, queries, height, width\]"):
        pack(torch.zeros(3, 2, 2), [63])


def test_there_is_at_least_one_sample_and_no_two_of_a_name(make_sample, tmp_path):
    one = make_sample()
    for samples, message in (([], "at least one, got none"), ([one, one], "'one' twice")):
        with pytest.raises(ValueError, match=message):
            render(samples)
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path / "report", samples)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("groups", "steps", "names"),
    [
        (2, 50, ["steps 1 to 25", "steps 26 to 50"]),
        (3, 3, ["step 1", "step 2", "step 3"]),
        (3, 5, ["steps 1 to 2", "steps 3 to 4", "step 5"]),
        (2, None, ["time group 1", "time group 2"]),
        (0, 50, []),
    ],
)
def test_names_of_time_groups_are_the_steps_in_them(groups, steps, names):
    assert step_titles(groups, steps) == names
    if steps and groups:
        # the definition of docs: step s goes to group s * groups // steps
        counts = np.bincount([s * groups // steps for s in range(steps)])
        said = [1 if "to" not in n else 1 + int(n.split()[3]) - int(n.split()[1]) for n in names]
        assert said == counts.tolist()


def test_layers_without_a_grid_have_no_map_of_the_reference(make_image):
    from i2am.testing import make_maps, make_site

    sites = [make_site("a", (4, 3), (5, 5), heads=2), make_site("b", (4, 3), None, heads=4)]
    maps = make_maps(sites, samples=1)
    made = sample(maps, generated=make_image(0), reference=make_image(1))
    slices = {stack.name: stack.slices for stack in made.stacks}
    assert slices == {
        "r2g": ("all", "t0", "t1", "l0", "l1"),
        "g2r": ("all", "t0", "t1", "l0"),
    }
    assert any("single reference token" in note for note in made.notes)
    # heads of layers with different numbers of them cannot be compared
    assert made.heads == []


def test_an_outline_goes_round_what_a_mask_covers():
    mask = Image.new("L", (30, 20))
    ImageDraw.Draw(mask).rectangle((5, 4, 24, 12), fill=255)
    pieces = set(re.findall(r"M[\d ]+[hv]\d+", outline(mask, (30, 20))))
    assert pieces == {"M5 4h20", "M5 13h20", "M5 4v9", "M25 4v9"}
    assert outline(Image.new("L", (30, 20)), (30, 20)) == ""
    # at the frame too
    full = outline(Image.new("L", (3, 2), 255), (3, 2))
    assert full == "M0 0h3M0 2h3M0 0v2M3 0v2"


def test_json_cannot_end_a_script():
    text = as_json({"</script>": "<!-- & \u2028 \ud800 😀"})
    assert not {"<", ">", "&"} & {*text}
    assert text.isascii()
    assert json.loads(text) == {"</script>": "<!-- & \u2028 \ud800 😀"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_json(math.nan)


FAULTS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS]


@pytest.mark.parametrize("fault", FAULTS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_full_disk_keeps_the_old_page(make_sample, tmp_path, monkeypatch, fault, call):
    out = tmp_path / "page.html"
    write_report(out, [make_sample()], title="old")
    old = out.read_bytes()
    _break(monkeypatch, call, fault)
    with pytest.raises(OSError, match=os.strerror(fault)):
        write_report(out, [make_sample()], title="new")
    monkeypatch.undo()
    assert out.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("call", ["fsync", "write_text", "write_bytes", "rename"])
def test_a_full_disk_keeps_the_old_folder(make_sample, tmp_path, monkeypatch, call):
    out = tmp_path / "report"
    write_report(out, [make_sample()], title="old")
    old = {path: path.read_bytes() for path in out.rglob("*.*")}
    _break(monkeypatch, call, errno.ENOSPC)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_report(out, [make_sample(1, "new")], overwrite=True)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == old
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def _break(monkeypatch, call, fault):
    def fail(*_, **__):
        raise OSError(fault, os.strerror(fault))

    if call == "write":
        opened = open

        def broken(path, mode="r", *args, **kwargs):
            file = opened(path, mode, *args, **kwargs)
            if "x" in mode:
                file = replace_write(file, fail)
            return file

        monkeypatch.setattr("builtins.open", broken)
    elif call in ("fsync", "replace"):
        monkeypatch.setattr(os, call, fail)
    else:
        monkeypatch.setattr(f"pathlib.Path.{call}", fail)


def replace_write(file, fail):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            file.close()

        write = fail

    return Full()


def test_a_folder_of_others_is_kept(make_sample, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputRefused):
            write_report(tmp_path, [make_sample()], overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_earlier_folder_is_replaced_whole(make_sample, tmp_path):
    out = tmp_path / "report"
    write_report(out, [make_sample(), make_sample(1, "two")])
    with pytest.raises(OutputRefused, match="not empty"):
        write_report(out, [make_sample()])
    names = write_report(out, [make_sample(2, "three")], overwrite=True)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == sorted(
        [*names, "run.json"]
    )


@pytest.mark.parametrize(
    "score",
    [
        {"value": math.nan, "reason": None},
        {"value": -math.inf, "reason": "none"},
        {"value": None, "reason": None},
    ],
    ids=str,
)
def test_scores_are_numbers_or_have_a_reason(recording, make_image, score):
    given = {"generated": make_image(0), "reference": make_image(1), "scores": {"imacs_r": score}}
    with pytest.raises(ValueError, match=r"scores must be finite numbers, or None with .* imacs_r"):
        page(recording, **given)


def test_scores_keep_their_reasons(make_sample):
    document = make_sample().document()
    assert document["scores"]["imacs_r"]["reason"] == "its map is the same everywhere"
    assert replace(make_sample(), scores={}).document()["scores"] == {}
