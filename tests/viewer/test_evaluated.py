"""Samples of an evaluation in a browser: every view of the folder and of the single page."""

import io
import zlib
from dataclasses import replace

import pytest
from PIL import Image

from i2am.cli.reporting import Wanted, samples_of
from i2am.data import write_viton_hd
from i2am.evaluation.store import Store
from i2am.evaluation.testing import make_plan, make_shard
from i2am.viewer import write_report

PEOPLE = [f"{number:05d}_00" for number in range(2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "dolls"
    write_viton_hd(folder, train=0, test=2)
    return folder


@pytest.fixture
def samples(data, tmp_path):
    """Two samples, whose maps were kept or not."""

    def evaluated(*, maps):
        kept = "float16" if maps else "none"
        plan = make_plan(
            pairs=2,
            settings=("paired",),
            maps=kept,
        )
        pairs = [
            [person, person, person, line, f"{person}.jpg"] for line, person in enumerate(PEOPLE, 1)
        ]
        plan["data"] = {"folder": str(data), "split": "test", "pairs": {"paired": pairs}}
        store = Store.create(tmp_path / "run", plan)
        shard, images = make_shard(plan, "paired", 0, undefined=1, maps=maps)
        images = {id: png(40 * number) for number, id in enumerate(images)}
        sums = {id: zlib.crc32(content) for id, content in images.items()}
        store.commit(replace(shard, images=sums), images)
        return list(samples_of(Wanted((tmp_path / "run",))))

    return evaluated


def png(level):
    file = io.BytesIO()
    Image.new("RGB", (96, 128), (level, 2 * level, 200)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("out", ["report", "report.html"])
def test_every_slice_of_a_sample_can_be_seen(samples, visit, tmp_path, out):
    write_report(tmp_path / out, samples(maps=True))
    page = tmp_path / out / "index.html" if out == "report" else tmp_path / out
    view = visit(page, link=f"#paired%2F{PEOPLE[0]}").wait()
    assert [panel["map"] for panel in view.status["panels"]] == ["r2g", "g2r"]
    assert not view.page.locator("#layer").is_visible()
    for group in (1, 2, 0):
        view.slide("time", group)
        assert view.status["slice"] == ("all" if group == 0 else f"t{group - 1}")
        assert ("whole run" in view.page.locator(".score").first.text_content()) == (group > 0)
    for head in ("h0", "h1", "h2", "all"):
        view.page.click(f"#heads button[value={head}]")
        assert view.status["slice"] == head
        assert view.panel("generated")["map"] == "r2g"
    view.page.select_option("#compare", f"paired/{PEOPLE[1]}")
    view.page.wait_for_selector(".pairs.two")
    assert [panel["map"] for panel in view.status["panels"]] == ["r2g", "g2r"] * 2
    view.close()


def test_without_maps_there_are_pictures_and_scores(samples, visit, tmp_path):
    shown = samples(maps=False)
    write_report(tmp_path / "page.html", shown)
    view = visit(tmp_path / "page.html", link=f"#paired%2F{PEOPLE[1]}").wait()
    assert view.page.text_content("#reading") == "No maps were kept of this sample."
    assert not view.page.locator("#slice").is_visible()
    facts = view.page.locator("#facts")
    assert "Mapsnone kept" in facts.text_content()
    assert "imacs_rundefined: its map is the same everywhere" in facts.text_content()
    value = shown[1].scores["imacs_g"]["value"]
    score = view.page.locator(".score").first.text_content()
    assert score == f"IMACSg {value:+.3f} (whole run, all patches)"
    view.close()
