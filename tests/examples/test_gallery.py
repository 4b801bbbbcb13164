"""docs/gallery.py runs a page's commands, and the page in the repository has its pictures."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from i2am.cli.app import app

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(tmp_path):
    """Writes a page of some blocks and pictures."""

    def write(*blocks, pictures=("out/a.jpg",)):
        text = "\n".join(f"```{language}\n{block}\n```" for language, block in blocks)
        links = "\n".join(f"![what it shows](page/{name})" for name in pictures)
        path = tmp_path / "page.md"
        path.write_text(f"# Page\n\n{text}\n\n{links}\n")
        return path

    return write


def test_blocks_run_in_order_in_one_folder_and_pictures_are_copied(gallery, page, tmp_path):
    old = tmp_path / "page" / "old.jpg"
    old.parent.mkdir()
    old.touch()
    path = page(
        ("sh", "mkdir out\ni2am --version > version"),
        ("python", "open('out/a.jpg', 'w').write(open('version').read())"),
        ("text", "not run"),
    )
    gallery.main(path)
    assert (tmp_path / "page" / "out" / "a.jpg").read_text().startswith("i2am, version")
    assert not old.exists()


@pytest.mark.parametrize(
    ("block", "error"),
    [
        (("sh", "false; true"), subprocess.CalledProcessError),
        (("python", "raise SystemExit(3)"), subprocess.CalledProcessError),
        (("sh", "true"), SystemExit),
        (("sh", "mkdir out; touch out/a.jpg"), SystemExit),
        (("sh", "mkdir out; head -c 150001 /dev/zero > out/a.jpg"), SystemExit),
    ],
    ids=["shell", "python", "no-picture", "empty", "large"],
)
def test_failures_leave_the_old_pictures(gallery, page, tmp_path, block, error):
    old = tmp_path / "page" / "old.jpg"
    old.parent.mkdir()
    old.touch()
    with pytest.raises(error):
        gallery.main(page(block))
    assert old.exists()


def test_the_page_has_its_pictures_and_no_others(gallery):
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^\]]+\]\((gallery/[^)]+)\)", text)
    held = [path for path in (DOCS / "gallery").rglob("*") if path.is_file()]
    assert sorted(linked) == sorted(str(path.relative_to(DOCS)) for path in held)
    assert all(path.stat().st_size <= gallery.MAX_BYTES for path in held)


def test_commands_of_the_page_are_ones_that_exist():
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    lines = re.findall(r"^i2am (.+)$", text, re.MULTILINE)
    # the variable of the page holds options and files
    inputs = re.search(r'^INPUTS="(.+)"$', text, re.MULTILINE)[1]
    assert len(lines) >= 10
    for line in lines:
        name, *arguments = shlex.split(line.replace("$INPUTS", inputs))
        # parses, and checks every option and choice
        app.commands[name].make_context(name, arguments)
