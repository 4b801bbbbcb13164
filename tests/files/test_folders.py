import json
import os

import pytest

from i2am.files import OutputRefused, check_free, fresh_folder


def write(folder, name="image.png", text="x"):
    (folder / name).write_text(text)
    (folder / "run.json").write_text(json.dumps({"files": [name]}))


def build(out, *actions, overwrite=False):
    with fresh_folder(out, overwrite=overwrite) as folder:
        for action in actions:
            action(folder)


def failing(error):
    def action(folder):
        raise error

    return action


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_folder_appears_when_the_block_ends_and_not_before(tmp_path):
    out = tmp_path / "a" / "b"
    with fresh_folder(out, overwrite=False) as folder:
        write(folder)
        assert not out.exists()
        assert folder.parent == out.parent  # same file system, so the rename is atomic
    assert names(out) == ["image.png", "run.json"]
    assert names(out.parent) == ["b"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt], ids=str)
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error):
        build(tmp_path / "a" / "b", write, failing(error))
    assert names(tmp_path) == []


def test_parents_that_were_there_stay(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="x"):
        build(tmp_path / "a" / "b", failing(ValueError("x")))
    assert names(tmp_path) == ["a"]


def test_overwrite_replaces_an_earlier_result_whole(tmp_path):
    out = tmp_path / "out"
    with fresh_folder(out, overwrite=False) as folder:
        write(folder, "old.png")
    with fresh_folder(out, overwrite=True) as folder:
        assert names(out) == ["old.png", "run.json"]
        write(folder, "new.png")
    assert names(out) == ["new.png", "run.json"]
    assert names(tmp_path) == ["out"]


def test_failed_overwrite_keeps_the_earlier_result(tmp_path):
    out = tmp_path / "out"
    with fresh_folder(out, overwrite=False) as folder:
        write(folder, text="old")
    with pytest.raises(ValueError, match="x"):
        build(out, write, failing(ValueError("x")), overwrite=True)
    assert (out / "image.png").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_file_modes_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        with fresh_folder(tmp_path / "out", overwrite=False) as folder:
            write(folder)
    finally:
        os.umask(previous)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with fresh_folder(tmp_path / "out", overwrite=False) as folder:
        write(folder)
    assert names(tmp_path / "out") == ["image.png", "run.json"]


def test_overwrite_replaces_folders_within(tmp_path):
    out = tmp_path / "out"
    for name in ("old", "new"):
        with fresh_folder(out, overwrite=True) as folder:
            (folder / name).mkdir()
            write(folder, f"{name}/image.png")
    assert names(out) == ["new", "run.json"]
    assert names(out / "new") == ["image.png"]


def a_file(path):
    path.write_text("mine")


def not_empty(path):
    path.mkdir()
    write(path)


def foreign(path):
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def foreign_manifest(path):
    path.mkdir()
    (path / "run.json").write_text('{"their": "run"}')


def ours_and_more(path):
    path.mkdir()
    write(path)
    (path / "thesis.tex").write_text("mine")


def ours_and_more_below(path):
    (path / "inner").mkdir(parents=True)
    write(path, "inner/image.png")
    (path / "inner" / "thesis.tex").write_text("mine")


@pytest.mark.parametrize(
    ("make", "overwrite", "match"),
    [
        pytest.param(a_file, False, "is a file, a folder was expected", id="file"),
        pytest.param(a_file, True, "is a file", id="file-overwrite"),
        pytest.param(not_empty, False, "is not empty; .*--overwrite", id="not-empty"),
        pytest.param(foreign, True, "was not written by i2am", id="foreign"),
        pytest.param(foreign_manifest, True, "was not written by i2am", id="foreign-manifest"),
        pytest.param(ours_and_more, True, r"holds thesis\.tex", id="ours-and-more"),
        pytest.param(ours_and_more_below, True, r"holds inner/thesis\.tex", id="more-below"),
    ],
)
def test_conflict_is_refused_and_nothing_touched(tmp_path, make, overwrite, match):
    out = tmp_path / "out"
    make(out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputRefused, match=match):
        check_free(out, overwrite=overwrite)
    with pytest.raises(OutputRefused, match=match):
        build(out, failing(AssertionError("the block was entered")), overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_conflict_that_arises_meanwhile_is_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputRefused, match="not empty"):
        build(out, write, lambda _: foreign(out))
    assert names(out) == ["thesis.tex"]
    assert names(tmp_path) == ["out"]
