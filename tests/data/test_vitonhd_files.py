"""Files of pairs: each of their names, all that are missing at once, no link out, one digest."""

import os
import shutil

import pytest
import torch
from PIL import Image

from i2am.data import VitonHD, write_viton_hd
from i2am.data.images import ImageRejected
from i2am.data.vitonhd import DataRejected

SIZE = (32, 24)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "viton"
    write_viton_hd(folder, train=0, test=4)
    return folder


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "viton")


def rejected(*arguments, **options):
    with pytest.raises(DataRejected) as caught:
        VitonHD(*arguments, **options)
    return [(problem.file, problem.line, problem.code) for problem in caught.value.problems]


def convert(path, name):
    """The same pixels under another name, in another format."""
    with Image.open(path) as image:
        image.save(path.with_name(name), quality=100, subsampling=0)
    path.unlink()
    return path.with_name(name)


# Names


@pytest.mark.parametrize(
    "ending", [".png", ".jpeg", ".webp", ".bmp", ".tif", ".gif", ".JPG", ".PNG"]
)
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("image", "image"),
        ("cloth", "garment"),
        ("cloth-mask", "garment_mask"),
        ("agnostic-v3.2", "agnostic"),
        ("image-densepose", "pose"),
        ("cloth-warp", "warped"),
    ],
)
def test_a_picture_has_any_ending(root, written, folder, name, ending):
    path = convert(root / f"test/{folder}/00001_00.jpg", f"00001_00{ending}")
    data = VitonHD(root, "test", SIZE, warps=True)
    assert data.path(name, 1) == path
    expected = VitonHD(written, "test", SIZE, warps=True).read(name, 1)
    # webp's colours lose most
    assert (data.read(name, 1) - expected).abs().mean() < 0.02
    # the others are called as ever
    assert data.path(name, 2).name == "00002_00.jpg"


@pytest.mark.parametrize(
    "name", ["00001_00.png", "00001_00.jpg", "00001_00_mask.jpg", "00001_00_mask.jpeg"]
)
def test_a_mask_with_and_without_its_ending(root, written, name):
    path = convert(root / "test/agnostic-mask/00001_00_mask.png", name)
    data = VitonHD(root, "test", (128, 96))
    assert data.path("mask", 1) == path
    mask = data.read("mask", 1)
    # JPEG's waves around the edge are cut off
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mask, VitonHD(written, "test", (128, 96)).read("mask", 1))


def test_the_listed_name_comes_first(root):
    with Image.open(root / "test/cloth/00001_00.jpg") as image:
        image.save(root / "test/cloth/00001_00.png")
        image.save(root / "test/cloth/00001_00.tif")
    (root / "test_pairs.txt").write_text(
        "00000_00.jpg 00001_00.png\n00001_00.jpg 00001_00.jpg\n"
        "00002_00.jpg 00001_00.tif\n00003_00.jpg 00001_00\n"
    )
    data = VitonHD(root, "test", SIZE, pairs="unpaired")
    names = [data.path("garment", index).name for index in range(4)]
    assert names == ["00001_00.png", "00001_00.jpg", "00001_00.tif", "00001_00.jpg"]


@pytest.mark.parametrize("setting", ["paired", "unpaired"])
def test_paths_are_those_of_the_pair(root, setting):
    data = VitonHD(root, "test", SIZE, pairs=setting, warps=True)
    own = setting == "paired"
    assert [pair.id for pair in data.pairs[:2]] == (
        ["00000_00", "00001_00"] if own else ["00000_00_00001_00", "00001_00_00002_00"]
    )
    garment, prefix = ("00001_00", "") if own else ("00002_00", "unpaired-")
    expected = {
        "image": "image/00001_00.jpg",
        "agnostic": "agnostic-v3.2/00001_00.jpg",
        "mask": "agnostic-mask/00001_00_mask.png",
        "pose": "image-densepose/00001_00.jpg",
        "garment": f"cloth/{garment}.jpg",
        "garment_mask": f"cloth-mask/{garment}.jpg",
        "warped": f"{prefix}cloth-warp/00001_00.jpg",
        "warped_mask": f"{prefix}cloth-warp-mask/00001_00.jpg",
    }
    assert set(data.names) == set(expected)
    for name, path in expected.items():
        assert data.path(name, 1) == root / "test" / path
    with pytest.raises(ValueError, match=r"name must be one of image, .*, got 'garment_region'"):
        data.path("garment_region", 1)
    with pytest.raises(IndexError, match=r"index must be in 0\.\.3, got 4"):
        data.path("image", 4)


# Missing


def test_all_problems_come_at_once(root):
    (root / "test_pairs.txt").write_bytes(
        b"00000_00.jpg 00001_00.jpg\n"
        b"00001_00.jpg 00009_00.jpg\n"
        b"one.jpg\n"
        b"00002_00.jpg ../secret.jpg\n"
        b"\xe9.jpg 00000_00.jpg\n"
        b"00000_00.jpg 00001_00.jpg\n"
        b"00003_00.jpg 00000_00.jpg\n"
    )
    (root / "test/image/00003_00.jpg").unlink()
    (root / "test/agnostic-mask/00003_00_mask.png").unlink()
    (root / "test/image-densepose/00000_00.jpg").unlink()
    assert rejected(root, "test", SIZE, pairs="unpaired") == [
        ("test/image-densepose/00000_00.jpg", 1, "missing"),
        ("test/cloth/00009_00.jpg", 2, "missing"),
        ("test/cloth-mask/00009_00.jpg", 2, "missing"),
        ("test_pairs.txt", 3, "columns"),
        ("test_pairs.txt", 4, "name"),
        ("test_pairs.txt", 5, "encoding"),
        ("test_pairs.txt", 6, "duplicate"),
        ("test/image/00003_00.jpg", 7, "missing"),
        ("test/agnostic-mask/00003_00_mask.png", 7, "missing"),
    ]


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("image", r"test/image is missing"),
        ("cloth", r"test/cloth is missing"),
        ("agnostic-v3.2", r"test/agnostic-v3\.2 \(or agnostic\) is missing"),
        ("agnostic-mask", r"test/agnostic-mask is missing: older downloads of VITON-HD"),
        ("cloth-mask", r"test/cloth-mask is missing"),
    ],
)
@pytest.mark.parametrize("missing", ["raise", "keep"])
def test_a_missing_folder_is_one_problem(root, folder, message, missing):
    shutil.rmtree(root / "test" / folder)
    with pytest.raises(DataRejected, match=rf"^\S+{message}") as caught:
        VitonHD(root, "test", SIZE, missing=missing)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == (f"test/{folder}", None)


def test_pairs_with_missing_files_can_be_kept(root):
    gone = [root / "test/image/00001_00.jpg", root / "test/cloth-mask/00003_00.jpg"]
    for path in gone:
        path.unlink()
    data = VitonHD(root, "test", SIZE, missing="keep")
    assert len(data) == len(data.pairs) == 4
    assert [(problem.line, problem.code) for problem in data.problems] == [
        (2, "missing"),
        (4, "missing"),
    ]
    for index, name, path in ((1, "image", gone[0]), (3, "garment_mask", gone[1])):
        assert data.path(name, index) == path
        with pytest.raises(ImageRejected, match=rf"^{name} .* does not exist \(line") as caught:
            data[index]
        assert caught.value.code == "missing"
    assert set(data[0]) == set(data[2])
    assert VitonHD(root, "test", SIZE, missing="keep", pairs="unpaired").problems[0].line == 2


def test_keeping_does_not_excuse_wrong_lines(root):
    (root / "test/image/00001_00.jpg").unlink()
    with (root / "test_pairs.txt").open("a") as file:
        file.write("a/../../x 00000_00.jpg\n")
    assert rejected(root, "test", SIZE, missing="keep") == [
        ("test/image/00001_00.jpg", 2, "missing"),
        ("test_pairs.txt", 5, "name"),
    ]


def test_at_least_one_pair_is_whole(root):
    for index in range(4):
        assert len(VitonHD(root, "test", SIZE, missing="keep").problems) == index
        (root / f"test/image/0000{index}_00.jpg").unlink()
    assert len(rejected(root, "test", SIZE, missing="keep")) == 4


def test_missing_is_raise_or_keep(root):
    with pytest.raises(ValueError, match="missing must be raise or keep, got 'skip'"):
        VitonHD(root, "test", SIZE, missing="skip")


# Links


def linked(path, target):
    path.unlink()
    path.symlink_to(target)


def test_a_link_out_of_the_data_set_is_refused(root, tmp_path):
    secret = tmp_path / "secret.jpg"
    shutil.copy(root / "test/image/00000_00.jpg", secret)
    linked(root / "test/image/00002_00.jpg", secret)
    linked(root / "test/cloth/00003_00.jpg", "../../../secret.jpg")
    expected = [
        ("test/image/00002_00.jpg", 3, "outside"),
        ("test/cloth/00003_00.jpg", 4, "outside"),
    ]
    assert rejected(root, "test", SIZE) == expected
    assert rejected(root, "test", SIZE, missing="keep") == expected
    with pytest.raises(DataRejected, match=r"must stay in the data set, it is a link to \S+secret"):
        VitonHD(root, "test", SIZE)


def test_links_inside_and_linked_folders_are_fine(root, written, tmp_path):
    linked(root / "test/image/00002_00.jpg", "00001_00.jpg")
    linked(root / "test/agnostic-v3.2/00002_00.jpg", root / "test/image/00001_00.jpg")
    shutil.move(root / "test/cloth", tmp_path / "elsewhere")
    (root / "test/cloth").symlink_to(tmp_path / "elsewhere")
    linked(root / "test/cloth/00002_00.jpg", "00001_00.jpg")
    (tmp_path / "all").symlink_to(root)
    data, plain = VitonHD(tmp_path / "all", "test", SIZE), VitonHD(written, "test", SIZE)
    assert torch.equal(data.read("image", 2), plain.read("image", 1))
    assert torch.equal(data.read("agnostic", 2), plain.read("image", 1))
    assert torch.equal(data.read("garment", 2), plain.read("garment", 1))


@pytest.mark.parametrize("target", ["nothing.jpg", "00002_00.jpg"])
def test_a_link_to_nothing_is_a_missing_file(root, target):
    linked(root / "test/image/00002_00.jpg", target)  # the second is a link to itself
    assert rejected(root, "test", SIZE) == [("test/image/00002_00.jpg", 3, "missing")]
    data = VitonHD(root, "test", SIZE, missing="keep")
    with pytest.raises(ImageRejected) as caught:
        data[2]
    assert caught.value.code == "missing"


# Digest


def change_a_size(root):
    with (root / "test/cloth-mask/00001_00.jpg").open("ab") as file:
        file.write(b"\0")


def swap_two_pairs(root):
    lines = (root / "test_pairs.txt").read_text().splitlines()
    (root / "test_pairs.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]))


def leave_one_out(root):
    lines = (root / "test_pairs.txt").read_text().splitlines()
    (root / "test_pairs.txt").write_text("\n".join(lines[1:]))


def rename_a_mask(root):
    folder = root / "test/agnostic-mask"
    (folder / "00001_00_mask.png").rename(folder / "00001_00.png")


def drop_the_poses(root):
    shutil.rmtree(root / "test/image-densepose")


def remove_a_file(root):
    (root / "test/image/00001_00.jpg").unlink()


def change_a_byte(root):
    path = root / "test/cloth/00001_00.jpg"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def make_a_folder_of_a_file(root):
    remove_a_file(root)
    (root / "test/image/00001_00.jpg").mkdir()


def digests(root, **options):
    data = VitonHD(root, "test", SIZE, missing="keep", **options)
    return data.digest(), data.digest(contents=True)


@pytest.mark.parametrize(
    "change",
    [
        change_a_size,
        swap_two_pairs,
        leave_one_out,
        rename_a_mask,
        drop_the_poses,
        remove_a_file,
        make_a_folder_of_a_file,
    ],
)
def test_a_digest_shows_what_changed(root, written, change):
    before = digests(root)
    assert before == digests(written)
    change(root)
    assert [one != other for one, other in zip(before, digests(root), strict=True)] == [True, True]


def test_bytes_count_only_where_asked(root, written):
    change_a_byte(root)
    one, other = digests(root), digests(written)
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_a_digest_is_of_the_data_not_of_its_place(root, written):
    (root / "test/agnostic-v3.2").rename(root / "test/agnostic")
    list_ = root / "test_pairs.txt"
    list_.write_bytes(b"\xef\xbb\xbf\r\n" + list_.read_bytes().replace(b" ", b"\t "))
    os.utime(root / "test/image/00000_00.jpg", (0, 0))
    assert digests(root) == digests(written)
    options = [{}, {"pairs": "unpaired"}, {"warps": True}, {"pairs": "unpaired", "warps": True}]
    assert len({digest for one in options for digest in digests(root, **one)}) == 8
