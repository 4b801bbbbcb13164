"""Paper dolls as files: every folder of VITON-HD's layout, with its names, kinds and polarity."""

import json

import numpy as np
import pytest
from PIL import Image

from i2am.data import paper_doll_folder, render, write_viton_hd
from i2am.data.paper_doll import PARTS
from i2am.files import OutputRefused

PLACES = {
    "agnostic-mask": "_mask.png",
    "agnostic-v3.2": ".jpg",
    "cloth": ".jpg",
    "cloth-mask": ".jpg",
    "cloth-warp": ".jpg",
    "cloth-warp-mask": ".jpg",
    "image": ".jpg",
    "image-densepose": ".jpg",
    "image-parse-agnostic-v3.2": ".png",
    "image-parse-v3": ".png",
    "openpose_json": "_keypoints.json",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "viton"
    write_viton_hd(folder, train=2, test=3)
    return folder


def read(path):
    return np.asarray(Image.open(path))


def test_every_file_has_its_place(root):
    expected = {"train_pairs.txt", "test_pairs.txt"}
    for split, count in (("train", 2), ("test", 3)):
        more = {
            "train": ["gt_cloth_warped_mask"],
            "test": ["unpaired-cloth-warp", "unpaired-cloth-warp-mask"],
        }
        places = PLACES | dict.fromkeys(more[split], ".jpg")
        for folder, ending in places.items():
            expected |= {f"{split}/{folder}/{i:05d}_00{ending}" for i in range(count)}
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert found == expected
    assert [path.name for path in root.parent.iterdir()] == ["viton"]


def test_pairs(root):
    assert (root / "train_pairs.txt").read_text() == (
        "00000_00.jpg 00000_00.jpg\n00001_00.jpg 00001_00.jpg\n"
    )
    assert (root / "test_pairs.txt").read_text() == (
        "00000_00.jpg 00001_00.jpg\n00001_00.jpg 00002_00.jpg\n00002_00.jpg 00000_00.jpg\n"
    )


def test_kinds_and_polarity(root):
    scene = render([1])
    hidden, garment = (field[0].numpy() > 0 for field in (scene.mask, scene.garment_mask))
    stem = "00001_00"
    agnostic = Image.open(root / f"train/agnostic-v3.2/{stem}.jpg")
    assert (agnostic.format, agnostic.mode, agnostic.size) == ("JPEG", "RGB", (96, 128))
    # grey 128, away from the ripples of JPEG
    assert np.median(np.asarray(agnostic)[hidden]) == 128
    assert np.array_equal(read(root / f"train/agnostic-mask/{stem}_mask.png") == 255, hidden)
    assert np.array_equal(read(root / f"train/cloth-mask/{stem}.jpg") >= 128, garment)
    region = read(root / f"train/gt_cloth_warped_mask/{stem}.jpg") >= 128
    assert np.array_equal(region, scene.garment_region[0].numpy() > 0)


@pytest.mark.parametrize(
    ("split", "name", "garments"),
    [
        ("train", "cloth-warp", [0, 1]),
        ("test", "cloth-warp", [0, 1, 2]),
        ("test", "unpaired-cloth-warp", [1, 2, 0]),
    ],
)
def test_warped_garments_lie_on_the_person(root, split, name, garments):
    scenes = render(range(len(garments)), split=split, garments=garments)
    for index in range(len(garments)):
        stem = f"{index:05d}_00.jpg"
        region = scenes.garment_region[index].numpy() > 0
        assert np.array_equal(read(root / split / f"{name}-mask" / stem) >= 128, region)
        warped = read(root / split / name / stem) / 255
        worn = scenes.image[index].permute(1, 2, 0).numpy()
        # drawn twice, sampled once and compressed: textures of few pixels are not the same to the
        # level, but anything moved or of another garment is far off
        assert np.abs(warped - worn)[region].mean() < 0.06
        assert np.abs(np.roll(warped, 6, axis=0) - worn)[region].mean() > 0.07
        assert warped[~region].mean() < 0.03


def test_parse_has_the_labels_of_lip(root):
    scene = render([0, 1, 2], split="test")
    lip = {"hair": 2, "face": 13, "neck": 10, "left arm": 14, "right arm": 15, "left leg": 9}
    lip |= {"right leg": 9, "torso": 5, "left sleeve": 5, "right sleeve": 5, "logo": 5}
    for index, parts in enumerate(scene.parts.numpy()):
        image = Image.open(root / f"test/image-parse-v3/{index:05d}_00.png")
        assert image.mode == "P"
        labels = np.asarray(image)
        for number, part in enumerate(PARTS):
            assert (labels[parts == number] == lip.get(part, 0)).all()
        agnostic = read(root / f"test/image-parse-agnostic-v3.2/{index:05d}_00.png")
        hidden = scene.mask[index].numpy() > 0
        assert (agnostic[hidden] == 0).all()
        assert np.array_equal(agnostic[~hidden], labels[~hidden])


def test_keypoints_lie_on_the_parts_they_name(root):
    scene = render([0, 1, 2], split="test")
    # numbers of OpenPose's BODY_25; a sleeve may hide a shoulder, an elbow or a wrist
    sides = {2: "right", 3: "right", 4: "right", 5: "left", 6: "left", 7: "left"}
    seen = 0
    for index, parts in enumerate(scene.parts.numpy()):
        path = root / f"test/openpose_json/{index:05d}_00_keypoints.json"
        (person,) = json.loads(path.read_text())["people"]
        points = np.reshape(person["pose_keypoints_2d"], (25, 3))
        assert set(points[:, 2]) <= {0.0, 1.0}
        assert (points[points[:, 2] == 0] == 0).all()
        nose = points[0]
        assert PARTS[parts[int(nose[1]), int(nose[0])]] in ("face", "hair")
        for pairs, side in sides.items():
            x, y, confidence = points[pairs]
            if confidence:
                seen += 1
                part = PARTS[parts[int(y), int(x)]]
                assert part in (f"{side} arm", f"{side} sleeve", "torso", "logo")
    assert seen > 9


def test_a_folder_with_content_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(OutputRefused, match=r"output folder .* is not empty"):
        write_viton_hd(tmp_path, train=1, test=0)
    with pytest.raises(OutputRefused, match=r"output .*mine is a file, a folder was expected"):
        write_viton_hd(tmp_path / "mine", train=1, test=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "kept"


def test_an_empty_folder_is_filled(tmp_path):
    write_viton_hd(tmp_path / "new" / "er", train=1, test=0)
    (tmp_path / "empty").mkdir()
    write_viton_hd(tmp_path / "empty", train=1, test=0)
    for folder in (tmp_path / "new" / "er", tmp_path / "empty"):
        assert (folder / "train/image/00000_00.jpg").is_file()
        assert (folder / "test_pairs.txt").read_text() == ""


def test_after_a_failure_nothing_is_left(tmp_path, monkeypatch):
    whole = paper_doll_folder._write_scene

    def fail(folder, split, index, other):
        if index == 1:
            raise OSError("disk full")
        whole(folder, split, index, other)

    monkeypatch.setattr(paper_doll_folder, "_write_scene", fail)
    with pytest.raises(OSError, match="disk full"):
        write_viton_hd(tmp_path / "data", train=2, test=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (-1, 2, "train must be at least 0, got -1"),
        (1, -1, "test must be 0 or at least 2, so that pairs can differ, got -1"),
        (1, 1, "test must be 0 or at least 2, so that pairs can differ, got 1"),
        (0, 0, "train and test must not both be 0"),
    ],
)
def test_counts_are_checked(tmp_path, train, test, message):
    with pytest.raises(ValueError, match=message):
        write_viton_hd(tmp_path / "data", train=train, test=test)
    assert list(tmp_path.iterdir()) == []
