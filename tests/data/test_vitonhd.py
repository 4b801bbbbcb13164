"""VITON-HD's layout: what was written comes back, and what is missing is named with its line."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from i2am.data import VitonHD, render, write_viton_hd
from i2am.data.images import ImageRejected
from i2am.data.vitonhd import DataRejected

SIZE = (128, 96)
MASKS = ("mask", "garment_mask", "garment_region")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "viton"
    write_viton_hd(folder, train=3, test=3)
    return folder


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "viton")


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_come_back(written, split):
    data = VitonHD(written, split, SIZE)
    scenes = render(range(3), split=split)
    assert len(data) == 3
    for index, item in enumerate(data):
        names = {"image", "garment", "agnostic", "pose", "mask", "garment_mask"}
        assert set(item) == names | ({"garment_region"} if split == "train" else set())
        for name, field in item.items():
            expected = getattr(scenes, name)[index]
            assert field.dtype == torch.float32
            assert field.is_contiguous()
            if name in MASKS:
                assert torch.equal(field, expected)
            else:
                assert (field - expected).abs().mean() < 0.01  # JPEG


def test_a_batch_can_be_collated(written):
    (batch,) = torch.utils.data.DataLoader(VitonHD(written, size=SIZE), batch_size=3)
    assert batch["image"].shape == (3, 3, *SIZE)
    assert batch["garment_region"].shape == (3, *SIZE)


def test_unpaired_takes_the_second_column(written):
    paired = VitonHD(written, "test", SIZE)
    unpaired = VitonHD(written, "test", SIZE, pairs="unpaired")
    for index in range(3):
        for name in ("image", "agnostic", "pose", "mask"):
            assert torch.equal(paired[index][name], unpaired[index][name])
        for name in ("garment", "garment_mask"):
            assert torch.equal(paired[(index + 1) % 3][name], unpaired[index][name])
    # the region would be that of the person's own garment
    assert "garment_region" not in VitonHD(written, "train", SIZE, pairs="unpaired")[0]


@pytest.mark.parametrize("pairs", ["paired", "unpaired"])
def test_warped_garments_are_those_of_the_pairs(written, pairs):
    data = VitonHD(written, "test", SIZE, pairs=pairs, warps=True)
    garments = [0, 1, 2] if pairs == "paired" else [1, 2, 0]
    region = render(range(3), split="test", garments=garments).garment_region
    for index, item in enumerate(data):
        assert torch.equal(item["warped_mask"], region[index])
        stem = f"0000{index}_00.jpg"
        folder = "cloth-warp" if pairs == "paired" else "unpaired-cloth-warp"
        expected = np.asarray(Image.open(written / "test" / folder / stem)) / np.float32(255)
        assert np.array_equal(item["warped"].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", ["cloth-warp", "cloth-warp-mask"])
def test_a_missing_folder_of_warped_garments_says_what_makes_them(root, name):
    shutil.rmtree(root / "train" / name)
    VitonHD(root, size=SIZE)
    with pytest.raises(DataRejected, match=rf"{name} is missing: garments are warped by a"):
        VitonHD(root, size=SIZE, warps=True)
    with pytest.raises(DataRejected, match=r"unpaired-cloth-warp is missing"):
        VitonHD(root, size=SIZE, pairs="unpaired", warps=True)


def test_a_missing_warped_garment_is_named_with_its_line(root):
    (root / "train/cloth-warp/00001_00.jpg").unlink()
    with pytest.raises(DataRejected, match=r"cloth-warp/00001_00\.jpg is missing, line 2 of"):
        VitonHD(root, size=SIZE, warps=True)


def test_size_is_height_and_width(written):
    item = VitonHD(written, "train", (64, 48))[1]
    assert item["image"].shape == item["garment"].shape == (3, 64, 48)
    assert item["mask"].shape == (64, 48)
    whole = render([1]).image[0]
    expected = torch.nn.functional.interpolate(
        whole[None], (64, 48), mode="bilinear", antialias=True, align_corners=False
    )[0]
    assert (item["image"] - expected).abs().mean() < 0.02
    assert VitonHD(written)[0]["pose"].shape == (3, 512, 384)


def test_masks_are_thresholded_before_they_are_resized(root):
    levels = np.full((128, 96), 127, np.uint8)
    levels[:, 47:] = 128
    Image.fromarray(levels).save(root / "train/agnostic-mask/00000_00_mask.png")
    mask = VitonHD(root, "train", SIZE)[0]["mask"]
    assert (mask[:, :47] == 0).all()
    assert (mask[:, 47:] == 1).all()
    half = VitonHD(root, "train", (64, 48))[0]["mask"]
    assert (half[:, :22] == 0).all()
    assert (half[:, 25:] == 1).all()
    # the edge runs through this column
    assert ((half[:, 23] > 0.2) & (half[:, 23] < 0.8)).all()


def test_either_name_of_the_agnostic_folder(root, written):
    (root / "train/agnostic-v3.2").rename(root / "train/agnostic")
    assert torch.equal(
        VitonHD(root, size=SIZE)[2]["agnostic"], VitonHD(written, size=SIZE)[2]["agnostic"]
    )


def test_without_densepose_the_pose_is_black(root):
    shutil.rmtree(root / "train/image-densepose")
    pose = VitonHD(root, size=SIZE)[0]["pose"]
    assert pose.shape == (3, *SIZE)
    assert (pose == 0).all()


def test_blank_lines_are_skipped_and_numbers_count_them(root):
    (root / "train_pairs.txt").write_text("\n00001_00.jpg x.jpg\n\n00009_00.jpg x.jpg\n")
    with pytest.raises(DataRejected, match=r"00009_00\.jpg is missing, line 4 of train_pa"):
        VitonHD(root, size=SIZE)


@pytest.mark.parametrize(
    "name",
    [
        "image/00001_00.jpg",
        "cloth/00001_00.jpg",
        "cloth-mask/00001_00.jpg",
        "agnostic-v3.2/00001_00.jpg",
        "agnostic-mask/00001_00_mask.png",
        "image-densepose/00001_00.jpg",
        "gt_cloth_warped_mask/00001_00.jpg",
    ],
)
def test_a_missing_file_is_named_with_its_line(root, name):
    path = root / "train" / name
    path.unlink()
    with pytest.raises(DataRejected) as error:
        VitonHD(root, size=SIZE)
    assert str(error.value) == f"{path} is missing, line 2 of train_pairs.txt needs it"


def test_a_missing_folder_is_a_missing_file(root):
    shutil.rmtree(root / "train/agnostic-mask")
    with pytest.raises(DataRejected, match=r"train/agnostic-mask is missing: older downloads"):
        VitonHD(root, size=SIZE)


def test_a_damaged_file_is_named_with_its_line(root):
    path = root / "train/cloth/00002_00.jpg"
    path.write_bytes(path.read_bytes()[:300])
    data = VitonHD(root, size=SIZE)
    with pytest.raises(ImageRejected, match=r"garment .*00002_00\.jpg .* \(line 3 of train_pairs"):
        data[2]


@pytest.mark.parametrize(
    "line", ["one.jpg", "a.jpg b.jpg c.jpg", "../a.jpg b.jpg", "a.jpg b\\c.jpg"]
)
def test_a_line_that_is_no_pair(root, line):
    (root / "test_pairs.txt").write_text(f"00000_00.jpg 00001_00.jpg\n{line}\n")
    with pytest.raises(
        ValueError, match=r"line 2 of .*test_pairs\.txt must be two (bare )?file names"
    ):
        VitonHD(root, "test", SIZE)


def test_a_list_of_nothing(root):
    (root / "test_pairs.txt").write_text("\n")
    with pytest.raises(ValueError, match="must list at least one pair, it is empty"):
        VitonHD(root, "test", SIZE)
    (root / "test_pairs.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_pairs\.txt is missing: a VITON-HD folder"):
        VitonHD(root, "test", SIZE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "split must be train or test, got 'val'"),
        ({"pairs": "both"}, "pairs must be paired or unpaired, got 'both'"),
        ({"size": (0, 96)}, r"size must be a height and a width of at least 1, got \(0, 96\)"),
    ],
)
def test_refusals(written, arguments, message):
    with pytest.raises(ValueError, match=message):
        VitonHD(written, **arguments)


def test_no_such_pair(written):
    with pytest.raises(IndexError, match=r"index must be in 0\.\.2, got -1"):
        VitonHD(written, size=SIZE)[-1]
