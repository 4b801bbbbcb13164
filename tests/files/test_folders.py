import json
import os
import shutil
from pathlib import Path

import pytest

from i2am.files import (
    OutputRefused,
    check_free,
    check_place,
    fresh_folder,
    inner_folder,
    make_folder,
    refuse_links,
    replaced_folder,
)


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


# Paths at which nothing can be written


def check_overwrite(out):
    check_free(out, overwrite=True)


def check_file(out):
    check_place(out, kind="file")


def check_folder(out):
    check_place(out, kind="folder")


def check_replaced(out):
    with replaced_folder(out):
        raise AssertionError("the block was entered")


FOLDER_CHECKS = [check_overwrite, check_replaced]
CHECKS = [check_file, check_folder, *FOLDER_CHECKS]
HERE = "is the current folder or holds it; name one in it"


def link_to(target):
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("make", "out", "message"),
    [
        (None, os.fsdecode(b"a/\xff"), r"output a/\S+ must have a name in UTF-8"),
        (None, os.fsdecode(b"\xff/a"), r"output \S+/a must have a name in UTF-8"),
        (link_to("nothing"), "thing", "output thing is a link to nothing"),
        (link_to("thing"), "thing", "output thing is a link to nothing"),
        (a_file, "thing/out", "output thing/out cannot be made, because .*/thing is no folder"),
        (a_file, "thing/a/b/out", "cannot be made, because .*/thing is no folder"),
        (os.mkfifo, "thing/out", "cannot be made, because .*/thing is no folder"),
        (link_to("nothing"), "thing/out", "cannot be made, because .*/thing is no folder"),
    ],
)
def test_places_where_nothing_can_be_written(tmp_path, monkeypatch, check, make, out, message):
    monkeypatch.chdir(tmp_path)
    if make is not None:
        make(Path("thing"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputRefused, match=message):
        check(Path(out))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("check", FOLDER_CHECKS)
@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", HERE),
        ("..", HERE),
        ("../..", HERE),
        ("../../b", HERE),
        ("a", "is a link; name the folder itself"),
        ("b", "is a link; name the folder itself"),
        ("/", HERE),
        ("{absolute}", HERE),
        ("{absolute}/..", HERE),
        ("none/..", r"output none/\.\. must end with a name of its own"),
        ("full/inner/..", r"output full/inner/\.\. must end with a name of its own"),
    ],
)
def test_folders_that_cannot_be_replaced(tmp_path, monkeypatch, check, out, message):
    here = tmp_path / "b" / "here"
    (here / "full" / "inner").mkdir(parents=True)
    (here / "a").symlink_to("full")
    (here / "b").symlink_to(here)
    (here / "full" / "thesis.tex").write_text("mine")
    monkeypatch.chdir(here)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputRefused, match=message):
        check(Path(out.format(absolute=here)))
    assert sorted(tmp_path.rglob("*")) == before


def test_places_for_runs_that_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for out in ("/", ".", "..", "folder", "link", "link/new", "new/../other", "a/b/c", tmp_path):
        check_folder(Path(out))
    assert names(tmp_path) == ["folder", "link"]


@pytest.mark.parametrize("check", FOLDER_CHECKS)
def test_a_mount_point_is_refused(tmp_path, monkeypatch, check):
    mount = tmp_path / "mount"
    mount.mkdir()
    monkeypatch.setattr(type(mount), "is_mount", lambda path: path == mount)
    with pytest.raises(OutputRefused, match=r"mount is a mount point; name a folder in it$"):
        check(mount)
    with fresh_folder(mount / "out", overwrite=False) as folder:
        write(folder)
    assert names(mount) == ["out"]


def test_where_a_file_can_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "file").touch()
    for name in ("folder", "link", ".", "/"):
        with pytest.raises(OutputRefused, match="is a folder, a file was expected"):
            check_file(tmp_path / name)
    for name in ("new", "folder/new", "link/new", "a/b/new", "file"):
        check_file(tmp_path / name)
    with pytest.raises(OutputRefused, match="is a file, a folder was expected"):
        check_folder(tmp_path / "file")


# Manifests that decide what may be replaced


def test_a_fifo_as_manifest_is_refused_at_once(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / "run.json")
    with pytest.raises(OutputRefused, match="was not written by i2am"):
        check_free(out, overwrite=True)


@pytest.mark.parametrize(
    "manifest",
    [
        *('{"files": 1}', '{"files": null}', '{"files": true}', '{"files": 1.5}', '{"files": [1]}'),
        *('{"files": [["thesis.tex"]]}', '{"files": [null]}', '{"files": [{}]}', "[]", "{}", "1"),
        *('"files"', "null", "", "{", '{"files": ["thesis.tex"', "[" * 100_000, bytes(9).decode()),
        *('{"files": []}', '{"files": {}}', '{"files": ""}', '{"files": "thesis.tex"}'),
        *('{"files": ["", ".", "..", "/", "a/..", "../out", "\\u0000", "\\udcff"]}',),
        *('{"files": ["Thesis.tex", "thesis.tex ", "thesis.te", "thesis.tex.png"]}',),
        '{"files": ' + '{"a":' * 70 + "1" + "}" * 71,
    ],
)
def test_odd_manifests_give_nothing_away(tmp_path, manifest):
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(manifest)
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(OutputRefused, match=r"so it is kept$"):
        build(out, failing(AssertionError("the block was entered")), overwrite=True)
    assert names(tmp_path) == ["out"]
    assert (out / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("files", [["image.png"], {"image.png": {"sha256": "0"}}])
def test_both_kinds_of_manifests_allow_it(tmp_path, files):
    out = tmp_path / "out"
    out.mkdir()
    (out / "image.png").touch()
    (out / "run.json").write_text(json.dumps({"files": files}))
    build(out, lambda folder: write(folder, "new.png"), overwrite=True)
    assert names(out) == ["new.png", "run.json"]


def test_a_listed_link_is_replaced_and_not_followed(tmp_path):
    mine, out = tmp_path / "mine", tmp_path / "out"
    not_empty(mine)
    out.mkdir()
    (out / "link").symlink_to(mine)
    (out / "run.json").write_text('{"files": ["link"]}')
    build(out, write, overwrite=True)
    assert names(out) == ["image.png", "run.json"]
    assert names(mine) == ["image.png", "run.json"]


# Others at the same time


def test_processes_with_one_number_do_not_meet(tmp_path, monkeypatch):
    # as in two containers with one folder
    monkeypatch.setattr(os, "getpid", lambda: 1)
    out, other = tmp_path / "out", tmp_path / "other"
    with fresh_folder(out, overwrite=False) as one:
        with pytest.raises(ValueError, match="x"):
            build(out, write, failing(ValueError("x")))
        build(other, write)
        with pytest.raises(ValueError, match="x"), replaced_folder(other):
            raise ValueError("x")
        write(one)
    assert names(tmp_path) == ["other", "out"]
    assert names(out) == names(other) == ["image.png", "run.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_that_build_the_same_folder(tmp_path, overwrite):
    out = tmp_path / "out"

    def second(folder):
        build(out, lambda folder: write(folder, text="second"))

    if overwrite:
        build(out, write, second, overwrite=True)
    else:
        with pytest.raises(OutputRefused, match="is not empty"):
            build(out, write, second)
    assert (out / "image.png").read_text() == ("x" if overwrite else "second")
    assert names(tmp_path) == ["out"]


def test_a_folder_that_appears_at_the_last_moment_is_kept(tmp_path, monkeypatch):
    out = tmp_path / "out"
    rename = os.rename

    def late(source, target):
        if not out.exists():
            foreign(out)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(OutputRefused, match=r"out was made meanwhile, so it is kept$"):
        build(out, write)
    assert names(out) == ["thesis.tex"]
    assert names(tmp_path) == ["out"]


def test_what_others_put_beside_it_stays(tmp_path):
    def neighbour(folder):
        (tmp_path / "a" / "mine").touch()

    with pytest.raises(ValueError, match="x"):
        build(tmp_path / "a" / "b" / "out", neighbour, failing(ValueError("x")))
    assert names(tmp_path / "a") == ["mine"]


def test_an_error_is_not_hidden_by_one_while_tidying(tmp_path, monkeypatch):
    def fail(path, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "rmdir", fail)
    with pytest.raises(ValueError, match="x"):
        build(tmp_path / "a" / "b" / "out", write, failing(ValueError("x")))


def test_a_replaced_folder_takes_the_place_of_anything_of_ours(tmp_path):
    out = tmp_path / "out"
    foreign(out)
    with replaced_folder(out) as folder:
        assert names(out) == ["thesis.tex"]
        write(folder)
    assert names(out) == ["image.png", "run.json"]
    shutil.rmtree(out)
    a_file(out)
    with pytest.raises(OutputRefused, match="is a file"), replaced_folder(out) as folder:
        write(folder)
    assert out.read_text() == "mine"
    assert names(tmp_path) == ["out"]


# Folders inside


def test_inner_folders(tmp_path):
    assert inner_folder(tmp_path, "a", "b") == tmp_path / "a" / "b"
    assert inner_folder(tmp_path, "a", "b").is_dir()
    assert inner_folder(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (link_to("folder"), "is a link, and nothing is written through it"),
        (link_to("nothing"), "is a link, and nothing is written through it"),
        (a_file, "is a file, a folder was expected"),
        (os.mkfifo, "is a file, a folder was expected"),
    ],
)
def test_inner_folders_are_refused_through_anything_else(tmp_path, make, message):
    (tmp_path / "folder").mkdir()
    make(tmp_path / "a")
    for names_in in (["a"], ["a", "b"]):
        with pytest.raises(OutputRefused, match=rf"/a {message}$"):
            inner_folder(tmp_path, *names_in)
    assert names(tmp_path / "folder") == []
    assert not (tmp_path / "nothing").exists()


def test_links_in_a_folder_are_refused(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    refuse_links(tmp_path)
    (tmp_path / "a" / "b" / "link").symlink_to("nothing")
    with pytest.raises(OutputRefused, match=r"/a/b/link is a link, and nothing is written"):
        refuse_links(tmp_path)
    refuse_links(tmp_path / "none")


def test_made_folders_are_on_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    make_folder(tmp_path / "a" / "b")
    assert synced == [str(tmp_path), str(tmp_path / "a")]
    make_folder(tmp_path / "a" / "b")
    assert synced[2:] == [str(tmp_path / "a")]
