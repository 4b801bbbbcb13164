"""The paper's four systems end to end, at tiny size, on drawn scenes in the layout of VITON-HD."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import i2am
from i2am.cli import main
from i2am.data import VitonHD, write_viton_hd
from i2am.evaluation.generating import generate
from i2am.evaluation.kept import score
from i2am.evaluation.plan import Settings
from i2am.evaluation.store import Store
from i2am.models import (
    CustomPipeline,
    DCIVTONPipeline,
    PaintByExamplePipeline,
    StableVITONPipeline,
    samplers,
)

SYSTEMS = ("paint_by_example", "dci_vton", "stableviton", "custom")
SIZE = (32, 24)
# what an item of the data set is called in a call, by system
INPUTS = {"image": "image", "mask": "mask_image", "garment": "reference_image"}
MORE_INPUTS = {
    "paint_by_example": {},
    "dci_vton": {
        "warped": "warped_image",
        "warped_mask": "warped_mask_image",
        "garment_mask": "reference_mask_image",
        "agnostic": "agnostic_image",
    },
    "stableviton": {"pose": "pose_image", "agnostic": "agnostic_image"},
    "custom": {"pose": "pose_image"},
}
# the warp blocks' maps are on the grids of the decoder's levels, the others' likewise
LAYERS = {"paint_by_example": 4, "dci_vton": 4, "stableviton": 6, "custom": 4}

pytestmark = pytest.mark.filterwarnings("ignore:layers with a single reference token")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "viton"
    write_viton_hd(folder, train=0, test=3)
    return folder


@pytest.fixture(params=SYSTEMS)
def name(request) -> str:
    return request.param


@pytest.fixture
def system(request, name) -> Any:
    return request.getfixturevalue(name)


@pytest.fixture
def batch(scenes, name) -> dict[str, torch.Tensor]:
    """Three pairs of a person and another one's garment, as arguments of a call."""
    data = VitonHD(scenes, "test", (64, 48), pairs="unpaired", warps=True)
    (items,) = torch.utils.data.DataLoader(data, batch_size=3)
    return {argument: items[key] for key, argument in {**INPUTS, **MORE_INPUTS[name]}.items()}


@pytest.fixture
def make(system) -> Callable[..., torch.Tensor]:
    """Runs the system on a batch, with a generator for each sample, numbered from `first`."""

    def run(batch: dict[str, torch.Tensor], *, first: int = 0, **settings: Any) -> torch.Tensor:
        count = len(batch["image"])
        generators = [torch.Generator().manual_seed(first + index) for index in range(count)]
        height, width = SIZE
        return system(
            **{"height": height, "width": width, "output_type": "pt", **batch, **settings},
            generator=generators,
        ).images

    return run


def one(batch: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    return {argument: values[index : index + 1] for argument, values in batch.items()}


@pytest.mark.parametrize(("kind", "calls"), [("paper", 50), ("official", 51)])
def test_whole_runs(system, name, batch, make, kind, calls) -> None:
    # the grids of DDIM and PLMS, with guidance, on every system
    sampler = samplers.PAINT_BY_EXAMPLE[kind]
    system.scheduler = sampler.build(system.scheduler)
    settings = sampler.arguments()
    plain = make(one(batch, 0), **settings)
    with i2am.record(system) as recorder:
        recorded = make(one(batch, 0), **settings)
    assert plain.shape == (1, 3, *SIZE)
    assert torch.equal(plain, recorded)
    maps = recorder.maps()
    assert system.num_timesteps == calls
    assert maps.provenance["steps"] == 50
    assert maps.provenance["evaluations"] == calls == len(maps.provenance["timesteps"])
    assert maps.time_groups == 5
    assert len(maps.layers) == LAYERS[name]
    for layer in maps.layer_sums:
        # softmaxes over the generated cells: every evaluation adds 1, in the group of its step
        votes = layer.reference_to_generated.sum(dim=(-1, -2))[0, :, :, 0]
        expected = torch.tensor([10.0 + calls - 50, 10, 10, 10, 10])
        torch.testing.assert_close(votes, expected[:, None].expand_as(votes), rtol=1e-4, atol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_samples_do_not_know_their_batch_and_images_not_the_recorder(
    system, batch, make, guidance_scale
) -> None:
    settings = {"num_inference_steps": 3, "guidance_scale": guidance_scale}

    def both(batch: dict[str, torch.Tensor], first: int = 0) -> tuple[torch.Tensor, Any]:
        plain = make(batch, first=first, **settings)
        with i2am.record(system, time_groups=1) as recorder:
            recorded = make(batch, first=first, **settings)
        assert torch.equal(plain, recorded)
        return plain, recorder.maps()

    together, maps = both(batch)
    assert together.shape == (3, 3, *SIZE)
    for index in range(3):
        alone, its_maps = both(one(batch, index), first=index)
        torch.testing.assert_close(together[index], alone[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(
            maps.reference_to_generated()[index],
            its_maps.reference_to_generated()[0],
            rtol=1e-3,
            atol=1e-6,
        )
        if maps.informative:
            torch.testing.assert_close(
                maps.generated_to_reference()[index],
                its_maps.generated_to_reference()[0],
                rtol=1e-3,
                atol=1e-6,
            )
    assert (together[0] - together[1]).abs().max() > 0.05


def test_every_input_matters(system, batch, make) -> None:
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0}
    expected = make(one(batch, 0), **settings)
    for argument in batch:
        changed = one(batch, 0)
        if argument in ("mask_image", "warped_mask_image", "reference_mask_image"):
            changed[argument] = changed[argument].roll(9, dims=-1)
        else:
            changed[argument] = 1 - changed[argument]
        assert not torch.allclose(make(changed, **settings), expected, atol=1e-5), argument


def test_maps_are_those_of_the_system(system, name, batch, make) -> None:
    with i2am.record(system, time_groups=1) as recorder:
        make(batch, num_inference_steps=2, guidance_scale=1.0)
    maps = recorder.maps()
    assert maps.informative == (name in ("stableviton", "custom"))
    r2g = maps.reference_to_generated(size=SIZE)
    assert r2g.shape == (3, *SIZE)
    if name == "custom":
        assert maps.generated_to_reference().shape == (3, *system.reference_grid)
    elif name == "stableviton":
        # keys are on the query's own grid
        for layer in maps.layer_sums:
            assert layer.site.reference_grid == layer.site.generated_grid
        assert all(layer.startswith("warp_blocks.") for layer in maps.layers)
    else:
        with pytest.raises(ValueError, match="generated_to_reference"):
            maps.generated_to_reference()


CLASSES = {
    "paint-by-example": PaintByExamplePipeline,
    "dci-vton": DCIVTONPipeline,
    "stableviton": StableVITONPipeline,
    "custom": CustomPipeline,
}


@pytest.mark.parametrize("published", CLASSES)
def test_a_published_checkpoint_is_loaded_without_a_trace(
    published, tiny_keys, synthetic, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    checkpoint = tmp_path / "published.ckpt"
    state = synthetic(tiny_keys(published))
    torch.save({"state_dict": state, "epoch": 7}, checkpoint)
    pipe = CLASSES[published].from_checkpoint(checkpoint)
    assert type(pipe) is CLASSES[published]
    assert pipe.config._name_or_path == str(checkpoint)
    assert list((tmp_path / "temporary").iterdir()) == []
    # a convolution of the UNet by its original name, and the sampler of the paper
    names = ("model.diffusion_model.out.2.weight", "diffusion.final.conv.weight")
    (expected,) = (state[name] for name in names if name in state)
    assert torch.equal(pipe.unet.conv_out.weight, expected)
    assert pipe.unet.dtype == torch.float32
    pipe.scheduler.set_timesteps(50)
    assert pipe.scheduler.timesteps[1:3].tolist() in ([961, 941], [980, 960])
    if published == "dci-vton":
        half = DCIVTONPipeline.from_checkpoint(checkpoint, torch_dtype=torch.float16)
        assert half.unet.dtype == half.vae.dtype == torch.float16
    wrong = "custom" if published != "custom" else "stableviton"
    with pytest.raises(ValueError, match="missing"):
        CLASSES[wrong].from_checkpoint(checkpoint)


@pytest.fixture
def folder(system, tmp_path) -> Path:
    system.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def files(scenes, name) -> dict[str, Path]:
    """Options of `i2am record` and their files, as a user of a VITON-HD folder would give them."""
    test = scenes / "test"
    given = {
        "person": test / "image/00000_00.jpg",
        "mask": test / "agnostic-mask/00000_00_mask.png",
        "reference": test / "cloth/00001_00.jpg",
        "reference-mask": test / "cloth-mask/00001_00.jpg",
    }
    more = {
        "pose": test / "image-densepose/00000_00.jpg",
        "agnostic": test / "agnostic-v3.2/00000_00.jpg",
        "warped": test / "unpaired-cloth-warp/00000_00.jpg",
        "warped-mask": test / "unpaired-cloth-warp-mask/00000_00.jpg",
    }
    takes = {
        "paint_by_example": [],
        "dci_vton": ["agnostic", "warped", "warped-mask"],
        "stableviton": ["pose", "agnostic"],
        "custom": ["pose", "agnostic"],
    }
    return given | {option: more[option] for option in takes[name]}


def line(folder: Path, files: dict[str, Path], out: Path, *flags: str) -> list[str]:
    options = [part for option, file in files.items() for part in (f"--{option}", str(file))]
    return ["record", str(folder), *options, "--time-groups", "2", "-o", str(out), *flags]


def test_record(folder, files, name, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    code = main(line(folder, files, out, "--sampler", "official", "--steps", "3"))
    assert code == 0, capsys.readouterr().err
    run = json.loads((out / "run.json").read_text())
    scheduler = "CustomModelDDIMScheduler" if name == "custom" else "PNDMScheduler"
    assert run["model"]["scheduler"] == scheduler
    assert run["settings"]["steps"] == 3
    guidance = {"paint_by_example": 5, "custom": 5, "dci_vton": 1, "stableviton": 1}
    assert run["settings"]["guidance"] == guidance[name]
    assert set(run["inputs"]) == {option.replace("-", "_") for option in files}
    mixed = any("reference keys mix garment and person" in note for note in run["notes"])
    assert mixed == (name == "stableviton")
    maps = i2am.load_maps(out / "maps.safetensors")
    assert len(maps.layers) == LAYERS[name]
    assert Image.open(out / "image.png").size == (24, 32)
    assert (out / "overlay_g2r.png").is_file() == maps.informative
    scores = json.loads((out / "scores.json").read_text())
    assert (scores["imacs_r"]["value"] is not None) == maps.informative
    if name == "dci_vton":
        # pasted back without being asked, at the size it was made
        person = Image.open(files["person"]).resize((24, 32), Image.Resampling.BILINEAR)
        keep = np.asarray(Image.open(files["mask"]).resize((24, 32))) == 0
        difference = np.abs(
            np.asarray(Image.open(out / "image.png")) / 255.0 - np.asarray(person) / 255
        )
        assert difference[keep].mean() < 0.02
        assert difference[~keep].mean() > 0.05


def test_evaluate(folder, scenes, name, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    options = ["--batch", "2", "--shard", "2", "--sampler", "paper", "--steps", "2"]
    options += ["--time-groups", "2", "--threads", "1", "--size", "32x24"]
    line = ["evaluate", str(folder), "--data", str(scenes), "-o", str(out), *options]
    assert main(line) == 0, capsys.readouterr().err
    store = Store.open(out)
    assert store.plan["settings"]["guidance"] == (1 if name == "dci_vton" else 5)
    assert not store.verify()
    for setting in ("paired", "unpaired"):
        for shard in store.shards(setting, tensors=None):
            found = dict(zip(shard.score_names, shard.scores.T, strict=True))
            assert found["imacs_g"].isfinite().all()
            assert found["imacs_g_official"].isfinite().all() == (name != "custom")
            spatial = name in ("stableviton", "custom")
            assert found["imacs_r"].isfinite().all() == spatial
            assert ("g2r_mask" in shard.maps) == spatial
            if not spatial:
                # a single reference token has no place: not an error, and not 0
                reason = shard.reasons[shard.ids[0]]["imacs_r"]
                assert reason.code == "not_defined"
                assert "no reference grid" in reason.message
            for id in shard.ids:
                assert Image.open(store.image_path(setting, id)).size == (24, 32)


@pytest.mark.parametrize("name", ["dci_vton"])
def test_an_empty_garment_mask_costs_scores_alone(system, scenes, tmp_path) -> None:
    # DCI-VTON cuts the garment out by it
    data = VitonHD(scenes, "test", SIZE, warps=True)
    items = {key: value[None] for key, value in data[0].items()}
    items["garment_mask"] = torch.zeros(1, *SIZE)
    settings = Settings(SIZE, steps=2, guidance=1.0, time_groups=1, batch=1, shard=1)
    images, maps = generate(system, items, [0], settings)
    assert images.shape == (1, 3, *SIZE)
    values, reasons = score(maps, items["mask"], items["garment_mask"], "paper")
    assert values[0].isfinite().any()
    assert reasons[0]["imacs_r"].code == "not_defined"


@pytest.mark.parametrize("name", ["dci_vton"])
def test_evaluated_images_are_made_in_the_published_square(system, scenes, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(system, "check_size", lambda *size: made.append(size) or size)
    data = VitonHD(scenes, "test", (48, 36), warps=True)
    items = {key: value[None] for key, value in data[0].items()}
    settings = Settings((48, 36), steps=2, guidance=1.0, time_groups=1, batch=1, shard=1)
    images, _ = generate(system, items, [0], settings)
    assert images.shape == (1, 3, 48, 36)
    assert made == [system.default_size()]


@pytest.mark.parametrize("name", ["dci_vton", "stableviton"])
def test_record_as_published_code_does_both_halves_of_guidance(
    folder, files, name, tmp_path, capsys
) -> None:
    # one batch of two halves and two calls; StableVITON's pictures are of its warp block 4
    out = tmp_path / "out"
    flags = ("--preset", "official", "--guidance", "5", "--guidance-branch", "both", "--steps", "2")
    assert main(line(folder, files, out, *flags)) == 0, capsys.readouterr().err
    halves = [i2am.load_maps(out / f"maps{end}.safetensors") for end in ("", "_unconditional")]
    first, second = (half.reference_to_generated(preset="official") for half in halves)
    assert first.shape == second.shape
    assert not torch.allclose(first, second, rtol=1e-3)
    if name == "stableviton":
        (block,) = (layer for layer in halves[0].layer_sums if "warp_blocks.4." in layer.site.layer)
        assert halves[0].generated_to_reference(preset="official").shape[1:] == (
            block.site.reference_grid
        )
        assert len(halves[0].layers) == 6


def test_record_refuses_what_the_system_does_not_take(
    folder, files, name, scenes, tmp_path, capsys
) -> None:
    every = {
        "pose": "pose",
        "agnostic": "agnostic image",
        "warped": "warped garment",
    }
    picture = scenes / "test/image/00000_00.jpg"
    for option, what in every.items():
        if option in files:
            continue
        given = {**files, option: picture}
        if option == "warped":
            given["warped-mask"] = scenes / "test/cloth-warp-mask/00000_00.jpg"
        assert main(line(folder, given, tmp_path / "out", "--dry-run")) == 4
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.endswith(f"model {folder} takes no {what}, leave --{option} out")


@pytest.mark.parametrize("name", ["dci_vton"])
def test_record_needs_warped_garments(folder, files, tmp_path, capsys) -> None:
    both = {option: file for option, file in files.items() if not option.startswith("warped")}
    assert main(line(folder, both, tmp_path / "out")) == 4
    assert f"model {folder} needs a warped garment, give --warped; no" in capsys.readouterr().err
    half = {**both, "warped": files["warped"]}
    assert main(line(folder, half, tmp_path / "out")) == 2
    assert "warped needs warped-mask" in capsys.readouterr().err
    missing = {**files, "warped-mask": tmp_path / "cloth-warp-mask/00000_00.jpg"}
    assert main(line(folder, missing, tmp_path / "out")) == 4
    assert "warped-mask" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["dci_vton"])
def test_a_sampler_without_guidance_has_no_unconditional_half(
    folder, files, tmp_path, capsys
) -> None:
    flags = ("--sampler", "paper", "--guidance-branch", "unconditional")
    assert main(line(folder, files, tmp_path / "out", *flags)) == 4
    assert "needs a guidance above 1, got 1, by default of" in capsys.readouterr().err
