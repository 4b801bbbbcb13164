"""Paper-doll scenes as files in the layout of VITON-HD, for everything that reads that data set."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from i2am.data.paper_doll_person import PARTS, Person
from i2am.data.paper_doll_scene import SIZE, draw_scene, garment_of, person_of
from i2am.files import fresh_folder

if TYPE_CHECKING:
    from PIL.Image import Image

# trousers, and as in VITON-HD neck and chest are "jumpsuits" and any top is "upper clothes"
_LIP = {
    "background": 0,
    "hair": 2,
    "face": 13,
    "neck": 10,
    "left arm": 14,
    "right arm": 15,
    "left leg": 9,
    "right leg": 9,
    "torso": 5,
    "left sleeve": 5,
    "right sleeve": 5,
    "logo": 5,
}
# the colours in which parsers of people save their 20 labels
_LIP_PALETTE = bytes.fromhex(
    "000000 800000 ff0000 005500 aa0033 ff5500 000055 0077dd 555500 005555"
    "553300 345680 008000 0000ff 33aadd 00ffff 55ffaa aaff55 ffff00 ffaa00"
)
# OpenPose BODY_25, up to the last joint that a paper doll has
_BODY_25 = (
    "nose",
    "collar",
    *(f"{side} {joint}" for side in ("right", "left") for joint in ("shoulder", "elbow", "wrist")),
    "pelvis",
    "right hip",
    "right knee",
    "right ankle",
    "left hip",
    "left knee",
)


def write_viton_hd(folder: str | Path, *, train: int, test: int) -> None:
    """Writes scenes 0, 1, ... of both splits as a data set in the layout of VITON-HD.

    Scene i is person ``0000i_00`` with the garment of the same name. The pairs of the training
    split, and the first columns of both, are paired; the second column of the test split names
    the next scene's garment. Pictures are JPEG files of 128 x 96 pixels, with the losses of that;
    the flow is not written, the layout has no place for it. What it does is: ``cloth-warp`` and
    ``cloth-warp-mask`` hold the garment's picture moved by it, on black, as a faultless warp
    network would; in the test split also ``unpaired-cloth-warp`` and its mask, of the garment in
    the second column.

    Args:
        folder: New or empty. It is complete or not there at all.
        train: How many training scenes, at least 0.
        test: How many test scenes, 0 or at least 2: with one, none could be unpaired.

    Raises:
        ValueError: If a count is not allowed, or both are 0.
        OutputRefused: If the folder is a file, has content, or cannot be made.
        OSError: If something cannot be written; nothing is left behind then.
    """
    if train < 0:
        raise ValueError(f"train must be at least 0, got {train}")
    if test < 0 or test == 1:
        raise ValueError(f"test must be 0 or at least 2, so that pairs can differ, got {test}")
    if train == test == 0:
        raise ValueError("train and test must not both be 0")
    with fresh_folder(Path(folder), overwrite=False) as partial:
        for split, count in (("train", train), ("test", test)):
            stems = [_stem(index) for index in range(count)]
            shift = 1 if split == "test" else 0
            for index in range(count):
                _write_scene(partial / split, split, index, (index + shift) % count)
            pairs = zip(stems, stems[shift:] + stems[:shift], strict=True)
            text = "".join(f"{person}.jpg {garment}.jpg\n" for person, garment in pairs)
            (partial / f"{split}_pairs.txt").write_text(text, encoding="utf-8")


def _stem(index: int) -> str:
    return f"{index:05d}_00"


def _write_scene(folder: Path, split: str, index: int, other: int) -> None:
    from PIL import Image

    person = person_of(split, index)
    scene = draw_scene(person, garment_of(split, index))
    files = {
        "image": _rgb(scene["image"]),
        "cloth": _rgb(scene["garment"]),
        "agnostic-v3.2": _rgb(scene["agnostic"]),
        "image-densepose": _rgb(scene["pose"]),
        "cloth-mask": Image.fromarray(_bytes(scene["garment_mask"])),
        "agnostic-mask": Image.fromarray(_bytes(scene["mask"])),
    }
    if split == "train":
        files["gt_cloth_warped_mask"] = Image.fromarray(_bytes(scene["garment_region"]))
    files |= _warps("cloth-warp", scene)
    if split == "test":
        files |= _warps("unpaired-cloth-warp", draw_scene(person, garment_of(split, other)))
    labels = np.array([_LIP[part] for part in PARTS], np.uint8)[scene["parts"]]
    files["image-parse-v3"] = _parse(labels)
    files["image-parse-agnostic-v3.2"] = _parse(np.where(scene["mask"] > 0, np.uint8(0), labels))
    stem = _stem(index)
    for name, image in files.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        if name == "agnostic-mask":
            image.save(folder / name / f"{stem}_mask.png")
        elif name.startswith("image-parse"):
            image.save(folder / name / f"{stem}.png")
        else:
            # no subsampling of colour: a texture is a few pixels wide
            image.save(folder / name / f"{stem}.jpg", quality=95, subsampling=0)
    (folder / "openpose_json").mkdir(exist_ok=True)
    pose = folder / "openpose_json" / f"{stem}_keypoints.json"
    pose.write_text(json.dumps(_keypoints(person)), encoding="utf-8")


def _warps(name: str, scene: dict[str, NDArray]) -> dict[str, "Image"]:
    """The garment's picture, moved to where the person wears it, and the mask of that."""
    import torch
    from PIL import Image

    region = scene["garment_region"]
    # (y, x) as fractions to (x, y) in [-1, 1], which has the same idea of a pixel's centre
    places = np.nan_to_num(scene["flow"][::-1] * 2 - 1).transpose(1, 2, 0)
    moved = torch.nn.functional.grid_sample(
        torch.from_numpy(scene["garment"])[None],
        torch.from_numpy(np.ascontiguousarray(places))[None],
        padding_mode="border",
        align_corners=False,
    )
    picture = moved[0].numpy() * region
    return {name: _rgb(picture), f"{name}-mask": Image.fromarray(_bytes(region))}


def _bytes(values: NDArray) -> NDArray[np.uint8]:
    return np.rint(values * 255).astype(np.uint8)


def _rgb(picture: NDArray) -> "Image":
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(_bytes(picture).transpose(1, 2, 0)))


def _parse(labels: NDArray[np.uint8]) -> "Image":
    from PIL import Image

    image = Image.fromarray(labels)
    image.putpalette(_LIP_PALETTE)  # turns grey levels into labels
    return image


def _keypoints(person: Person) -> dict[str, object]:
    """OpenPose's document for one person; joints that are not in the picture have confidence 0."""
    numbers: list[float] = []
    for name in _BODY_25:
        x, y = person.joints.get(name, (-1.0, -1.0))
        seen = 0 <= x < SIZE[1] and 0 <= y < SIZE[0]
        numbers += [round(x, 3), round(y, 3), 1.0] if seen else [0.0, 0.0, 0.0]
    numbers += [0.0] * (75 - len(numbers))
    return {"version": 1.3, "people": [{"person_id": [-1], "pose_keypoints_2d": numbers}]}
