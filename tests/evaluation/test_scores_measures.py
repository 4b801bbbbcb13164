"""SSIM, LPIPS and features of single pictures: protocols, libraries, weight files."""

import importlib
import os
import re
import sys
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage.metrics import structural_similarity
from torch import nn

from i2am.evaluation.scores.inception import Features, inception
from i2am.evaluation.scores.lpips import LPIPS
from i2am.evaluation.scores.measure import NotComputable, Pictures
from i2am.evaluation.scores.pictures import find_picture, grey, resize, to_image, to_pixels
from i2am.evaluation.scores.protocols import PROTOCOLS
from i2am.evaluation.scores.ssim import SSIM
from i2am.evaluation.scores.summary import to_json
from i2am.evaluation.scores.testing import tiny_extractor


def pixels(seed, height=72, width=64):
    """A smooth picture with noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    noisy = smooth + generator.normal(0, 8, smooth.shape)
    return to_pixels(Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)))


def pair():
    generated, real = pixels(1), pixels(1, 144, 128)
    return Pictures(generated, real, resize(real, (72, 64), "pil-bicubic"))


# Pictures


def test_bilinear_looks_at_four_pixels_whatever_the_reduction():
    # a reduction by 4 puts the new centre between the second and third pixel of each four
    large = pixels(0, 16, 16)
    small = resize(large, (4, 4), "bilinear")
    middle = large.float().reshape(3, 4, 4, 4, 4)[:, :, 1:3, :, 1:3].mean((2, 4))
    assert (small.float() - middle).abs().max() <= 0.5


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
def test_pillows_filters_are_pillows(name):
    large = pixels(0)
    expected = to_image(large).resize((20, 30), Image.Resampling[name.upper()])
    assert torch.equal(resize(large, (30, 20), f"pil-{name}"), to_pixels(expected))


def test_a_picture_of_the_right_size_is_left_alone():
    picture = pixels(0)
    assert all(resize(picture, (72, 64), how) is picture for how in ("bilinear", "pil-lanczos"))


def test_grey_values_are_pillows():
    picture = pixels(0)
    assert torch.equal(grey(picture), to_pixels(to_image(picture).convert("L")))


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp", ".tif", ".tiff", ".gif", ".JPG"])
@pytest.mark.parametrize("listed", [".jpg", ".png", ".JPG", ".Png"])
def test_a_picture_is_found_whatever_its_format(tmp_path, listed, ending):
    path = tmp_path / f"00001_00{ending}"
    path.touch()
    assert find_picture(tmp_path, f"00001_00{listed}") == path


@pytest.mark.parametrize("listed", ["00001_00.png", "00001_00.JPG", "00001_00.gif"])
def test_the_listed_picture_comes_before_others_of_its_stem(tmp_path, listed):
    for name in ("00001_00.jpg", "00001_00.jpeg", listed):
        (tmp_path / name).touch()
    assert find_picture(tmp_path, listed) == tmp_path / listed


def test_a_missing_picture_is_named_like_the_data_set_does(tmp_path):
    assert find_picture(tmp_path, "00001_00.JPG") == tmp_path / "00001_00.JPG"


# Protocols


def test_protocols_are_told_apart_by_name_and_content():
    described = [protocol.as_dict() for protocol in PROTOCOLS.values()]
    assert [of["name"] for of in described] == list(PROTOCOLS)
    contents = [{k: v for k, v in of.items() if k not in ("name", "after")} for of in described]
    assert len({to_json(of) for of in contents}) == len(PROTOCOLS)


# SSIM


@pytest.mark.parametrize("name", ["ladi", "catvton"])
def test_ssim_is_that_of_torchmetrics(name):
    from torchmetrics.functional.image import structural_similarity_index_measure

    pictures = pair()
    both = (side[None].float() / 255 for side in (pictures.generated, pictures.resized))
    expected = structural_similarity_index_measure(*both, data_range=1.0)
    assert SSIM(PROTOCOLS[name])(pictures)["ssim"].item() == pytest.approx(
        float(expected), abs=1e-6
    )


@pytest.mark.parametrize("name", ["i2am", "hr-viton"])
def test_ssim_of_windows_inside_is_that_of_scikit_image(name):
    pictures = pair()
    sides = [pictures.generated, pictures.resized]
    options = {"data_range": 255, "gaussian_weights": True, "use_sample_covariance": False}
    if name == "hr-viton":
        expected = structural_similarity(*(grey(side)[0].numpy() for side in sides), **options)
    else:
        arrays = (side.permute(1, 2, 0).numpy() for side in sides)
        expected = structural_similarity(*arrays, channel_axis=2, **options)
    assert SSIM(PROTOCOLS[name])(pictures)["ssim"].item() == pytest.approx(expected, abs=1e-5)


def test_protocols_disagree_about_one_pair_of_pictures():
    values = {round(float(SSIM(of)(pair())["ssim"]), 6) for of in PROTOCOLS.values()}
    assert len(values) == 3  # ladi and catvton differ in the resizing, which was done before


def test_equal_pictures_have_ssim_one():
    picture = pixels(2)
    found = SSIM(PROTOCOLS["i2am"])(Pictures(picture, picture, picture))["ssim"]
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(1, abs=1e-6)


def test_ssim_refuses_a_picture_smaller_than_its_window():
    small = pixels(2, 10, 40)
    with pytest.raises(ValueError, match=r"more than 10 pixels on each side for SSIM, got \[10, 4"):
        SSIM(PROTOCOLS["i2am"])(Pictures(small, small, small))


# LPIPS, with a stand-in for torchvision, which cannot be installed beside a CPU build of torch


def alexnet_features():
    sizes = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1)]
    layers = []
    for number, (given, made, kernel, stride, padding) in enumerate([*sizes, (256, 256, 3, 1, 1)]):
        layers += [nn.Conv2d(given, made, kernel, stride, padding), nn.ReLU()]
        if number in (0, 1, 4):
            layers.append(nn.MaxPool2d(3, 2))
    return nn.Sequential(*layers)


class AlexNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = alexnet_features()
        self.classifier = nn.Sequential(nn.Linear(4, 2))


@pytest.fixture
def torchvision(monkeypatch):
    """A module like torchvision, which can only make an AlexNet without weights."""
    # these look for torchvision when they are imported, and must not find this one
    for package in ("transformers", "torchmetrics"):
        importlib.import_module(package)
    module = ModuleType("torchvision")
    module.__version__ = "0.0"
    module.models = ModuleType("torchvision.models")

    def alexnet(weights):
        assert weights is None, "nothing may be downloaded"
        return AlexNet()

    module.models.alexnet = alexnet
    monkeypatch.setitem(sys.modules, "torchvision", module)
    monkeypatch.setattr("torchmetrics.functional.image.lpips._TORCHVISION_AVAILABLE", True)
    return module


@pytest.fixture
def backbone():
    torch.manual_seed(3)
    return AlexNet()


@pytest.fixture
def backbone_file(tmp_path, backbone):
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save(backbone.state_dict(), path)
    return path


def direct_lpips(backbone, generated, real):
    """By the definition: unit features, squared differences, weighted, averaged over places."""
    from torchmetrics.functional.image import lpips

    heads = torch.load(
        os.path.join(os.path.dirname(lpips.__file__), "lpips_models", "alex.pth"),
        map_location="cpu",
        weights_only=True,
    )
    shift, scale = (
        torch.tensor(of)[:, None, None] for of in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45))
    )
    features = []
    for picture in (generated, real):
        x, found = ((picture.float() / 127.5 - 1 - shift) / scale)[None], []
        for layer in backbone.features[:-1]:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        features.append(found)
    return sum(
        float((heads[f"lin{number}.model.1.weight"] * (a - b).square()).sum(1).mean())
        for number, (a, b) in enumerate(zip(*features, strict=True))
    )


@pytest.mark.parametrize("name", ["i2am", "ladi", "hr-viton"])
@torch.no_grad()
def test_lpips_is_its_definition(torchvision, backbone, backbone_file, name):
    pictures = pair()
    generated, real = pictures.generated, pictures.resized
    if name == "hr-viton":
        generated, real = (resize(side, (128, 128), "pil-bilinear") for side in (generated, real))
    found = LPIPS(PROTOCOLS[name], backbone_file)(pictures)["lpips"]
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert float(found) > 0
    assert float(found) == pytest.approx(direct_lpips(backbone, generated, real), rel=1e-5)


def test_equal_pictures_have_lpips_zero(torchvision, backbone_file):
    picture = pixels(2)
    assert LPIPS(PROTOCOLS["i2am"], backbone_file)(Pictures(picture, picture, picture)) == {
        "lpips": 0
    }


def test_lpips_says_that_pictures_are_too_small(torchvision, backbone_file):
    small = pixels(2, 12, 12)
    with pytest.raises(ValueError, match=r"LPIPS cannot be computed at \[12, 12\] pixels"):
        LPIPS(PROTOCOLS["i2am"], backbone_file)(Pictures(small, small, small))


def test_weights_are_known_by_their_checksum(torchvision, backbone, backbone_file, tmp_path):
    key = LPIPS(PROTOCOLS["i2am"], backbone_file).key["weights"]
    assert key["published"] is False
    assert len(key["sha256"]) == 64
    save_file(backbone.state_dict(), tmp_path / "same.safetensors")
    other = LPIPS(PROTOCOLS["i2am"], tmp_path / "same.safetensors")
    assert other.key["weights"]["sha256"] != key["sha256"]
    assert other(pair()) == LPIPS(PROTOCOLS["i2am"], backbone_file)(pair())


def test_lpips_without_torchvision_says_so(backbone_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    remedy = f"; install the torchvision that was built for torch {torch.__version__}"
    with pytest.raises(NotComputable, match=f"LPIPS needs torchvision.*{re.escape(remedy)}$"):
        LPIPS(PROTOCOLS["i2am"], backbone_file)


class Malicious:
    def __init__(self, command):
        self._command = command

    def __reduce__(self):
        return os.system, (self._command,)


def weight_problems(tmp_path):
    marker = tmp_path / "executed"
    files = {
        "absent.pth": None,
        "text.pth": b"not a weight file",
        "empty.pth": b"",
        "malicious.pth": Malicious(f"touch {marker}"),
        "number.pth": 3,
        "other.pth": {"features.0.weight": torch.zeros(2)},
    }
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
    return marker, [tmp_path / name for name in files]


def test_weights_that_are_none_are_named_and_never_executed(torchvision, torch_fidelity, tmp_path):
    marker, files = weight_problems(tmp_path)
    for path in files:
        for make in (LPIPS, inception):
            with pytest.raises(NotComputable, match=path.name):
                make(PROTOCOLS["i2am"], path)
    assert not marker.exists()


def test_weights_that_are_no_numbers_are_named(torchvision, torch_fidelity, tmp_path):
    values = torch.tensor([1.0, float("nan"), float("inf")])
    torch.save({"features.0.bias": values}, tmp_path / "x.pth")
    for make in (LPIPS, inception):
        with pytest.raises(NotComputable, match=r"NaN or infinite: .*features\.0\.bias \(2 of 3\)"):
            make(PROTOCOLS["i2am"], tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (LPIPS, "LPIPS needs the weights alexnet-owt-7be5be79.pth .*begins with 7be5be79.*--lpips"),
        (inception, "Inception for FID and KID needs the weights weights-inception-.*--inception"),
    ],
    ids=["lpips", "inception"],
)
def test_missing_weights_name_file_checksum_and_option(make, said):
    with pytest.raises(NotComputable, match=said):
        make(PROTOCOLS["i2am"], None)


# Features


class Network(nn.Module):
    """Stands in for torch-fidelity's: reads weights as it does, unpickling whatever is there."""

    made: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        self.arguments = (name, features_list)
        self.convolution = nn.Conv2d(3, 4, 3)
        assert feature_extractor_weights_path is not None, "nothing may be downloaded"
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
        self.eval()

    def forward(self, pictures):
        assert pictures.dtype == torch.uint8
        Network.made.append(tuple(pictures.shape))
        return (self.convolution(pictures.float()).mean((2, 3)),)


@pytest.fixture
def torch_fidelity(monkeypatch):
    package = ModuleType("torch_fidelity")
    package.__version__ = "0.0"
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Network, "made", [])


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("i2am", [(1, 3, 299, 299)] * 2),
        ("ladi", [(1, 3, 299, 299)] * 2),
        ("hr-viton", [(1, 3, 72, 64), (1, 3, 144, 128)]),
        ("catvton", [(1, 3, 299, 299)] * 2),
    ],
)
def test_inception_gets_pictures_as_the_protocol_says(torch_fidelity, tmp_path, name, shapes):
    network = nn.Conv2d(3, 4, 3)
    weights = {f"convolution.{key}": value for key, value in network.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    features = inception(PROTOCOLS[name], tmp_path / "weights.pth")
    pictures = pair()
    found = features(pictures)
    assert Network.made == shapes
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "generated": (4,),
        "real": (4,),
    }
    real = pictures.resized if name == "catvton" else pictures.original
    if name != "hr-viton":
        how = "bilinear" if name == "i2am" else "pil-bicubic"
        real = resize(real, (299, 299), how)
    with torch.no_grad():
        expected = network(real[None].float()).mean((2, 3))[0]
    assert torch.allclose(found["real"], expected)


def test_features_without_torch_fidelity_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    sentence = "Inception for FID and KID needs torch-fidelity.*then: pip install torch-fidelity$"
    with pytest.raises(NotComputable, match=sentence):
        inception(PROTOCOLS["i2am"], tmp_path / "weights.pth")


def test_any_network_can_give_the_features():
    extractor = tiny_extractor()
    features = Features(PROTOCOLS["hr-viton"], extractor, identity={"name": "tiny"})
    pictures = pair()
    found = features(pictures)
    assert features.name == "tiny-hr-viton"
    assert torch.equal(found["generated"], extractor(pictures.generated[None])[0])
    assert torch.equal(found["real"], extractor(pictures.original[None])[0])
