"""Folders of every generation load; damaged, incomplete and foreign ones are refused by name."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler
from safetensors.torch import load_file, save_file

from i2am import models
from i2am.models import CustomPipeline, PaintByExamplePipeline, load_pipeline
from i2am.models.weights import weight_files
from i2am.wording import in_one_sentence

ENCODER = "image_encoder/model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(public_folder, tmp_path) -> Path:
    """A private copy to damage."""
    return Path(shutil.copytree(public_folder, tmp_path / "model"))


def edit_weights(file: Path, edit) -> None:
    # copies, for load_file maps the very file that is written
    save_file(edit({name: values.clone() for name, values in load_file(file).items()}), file)


def edit_index(folder: Path, **entries) -> None:
    edit_json(folder / "model_index.json", **entries)


def edit_json(file: Path, **entries) -> None:
    index = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in index.items() if value != "gone"}))


def to_bin(file: Path, name: str) -> None:
    torch.save(load_file(file), file.with_name(name))
    file.unlink()


def public_encoder_names(state):
    """The names transformers 4 wrote, buffer included."""
    renamed = {
        key.replace("model.", "model.vision_model.", 1) if key.startswith("model.") else key: values
        for key, values in state.items()
    }
    position_ids = torch.arange(17)[None]
    return renamed | {"model.vision_model.embeddings.position_ids": position_ids}


def old_vae_names(state):
    """The attention names of diffusers before 0.18."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): values
            for key, values in state.items()
        }
    return state


def test_the_public_folder_as_it_was_published(folder, public_folder, inputs, run) -> None:
    edit_weights(folder / ENCODER, public_encoder_names)
    edit_weights(folder / "vae/diffusion_pytorch_model.safetensors", old_vae_names)
    for name, file in ((ENCODER, "pytorch_model.bin"), (UNET, "diffusion_pytorch_model.bin")):
        to_bin(folder / name, file)
    edit_index(
        folder,
        image_encoder=["paint_by_example", "PaintByExampleImageEncoder"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        scheduler=["diffusers", "PNDMScheduler"],
    )
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    scheduler.save_pretrained(folder / "scheduler")
    loaded = load_pipeline(folder)
    expected = PaintByExamplePipeline.from_pretrained(public_folder, scheduler=scheduler)
    assert type(loaded) is PaintByExamplePipeline
    assert type(loaded.scheduler) is PNDMScheduler
    for pipeline in (loaded, expected):
        pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, **inputs), run(expected, **inputs))


def test_variants_and_shards(folder, custom, tmp_path) -> None:
    sharded = tmp_path / "sharded"
    custom.save_pretrained(sharded, variant="fp16", max_shard_size="40KB")
    files = weight_files(sharded / "unet", "fp16")
    assert len(files) > 1
    loaded = load_pipeline(sharded, variant="fp16")
    for name, values in custom.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], values)
    with pytest.raises(FileNotFoundError, match=r"no weights in .*vae: expected one of .*\.bin"):
        load_pipeline(sharded)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{files[1].name} is missing"):
        load_pipeline(sharded, variant="fp16")


def test_encoder_shards(paint_by_example, tmp_path) -> None:
    paint_by_example.image_encoder.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 1
    loaded = type(paint_by_example.image_encoder).from_pretrained(tmp_path)
    for name, values in paint_by_example.image_encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], values)


def test_builtin_and_folder_by_one_name(custom, tmp_path) -> None:
    assert load_pipeline("pocket").default_size() == (128, 96)
    assert load_pipeline("pocket", torch_dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    custom.save_pretrained(tmp_path)
    assert type(load_pipeline(str(tmp_path))) is CustomPipeline


def drop(*names):
    return lambda state: {key: values for key, values in state.items() if key not in names}


def rename(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "elsewhere")


def truncate(folder: Path, name: str) -> None:
    file = folder / name
    file.write_bytes(file.read_bytes()[:-1000])


def truncated_bin(folder: Path) -> None:
    to_bin(folder / UNET, "diffusion_pytorch_model.bin")
    truncate(folder, "unet/diffusion_pytorch_model.bin")


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def malicious_bin(folder: Path) -> None:
    (folder / ENCODER).unlink()
    (folder / "image_encoder/pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))


def not_tensors(folder: Path) -> None:
    (folder / ENCODER).unlink()
    torch.save({"epoch": 3}, folder / "image_encoder/pytorch_model.bin")


def damaged_shard_index(folder: Path, content: str = "{}") -> None:
    (folder / UNET).unlink()
    (folder / f"{UNET}.index.json").write_text(content)


BROKEN = {
    "no index": (
        lambda f: rename(f, "model_index.json"),
        FileNotFoundError,
        r"model_index\.json is missing",
    ),
    "bad index": (
        lambda f: (f / "model_index.json").write_text("{"),
        ValueError,
        r"model_index\.json is damaged: Expecting",
    ),
    "index list": (
        lambda f: (f / "model_index.json").write_text("[]"),
        ValueError,
        r"model_index\.json must hold a JSON object, got list",
    ),
    "no class": (
        lambda f: edit_index(f, _class_name="gone"),
        ValueError,
        "does not name a pipeline",
    ),
    "foreign class": (
        lambda f: edit_index(f, _class_name="FluxPipeline"),
        ValueError,
        "holds a FluxPipeline; known pipelines are CustomPipeline, DCIVTONPipeline, "
        "PaintByExamplePipeline, StableVITONPipeline",
    ),
    "undeclared component": (
        lambda f: edit_index(f, vae="gone"),
        ValueError,
        r"model_index\.json does not declare the component vae",
    ),
    "null component": (
        lambda f: edit_index(f, unet=[None, None]),
        ValueError,
        "does not declare the component unet",
    ),
    "foreign component": (
        lambda f: edit_index(f, unet=["os", "UNetSpatioTemporalConditionModel"]),
        ValueError,
        "unet of a PaintByExamplePipeline must be a UNet2DConditionModel, .* declares a UNetSpatio",
    ),
    "foreign scheduler": (
        lambda f: edit_index(f, scheduler=["diffusers", "AutoencoderKL"]),
        ValueError,
        "declares an unknown scheduler, AutoencoderKL",
    ),
    "nameless scheduler": (
        lambda f: edit_index(f, scheduler=["diffusers", 5]),
        ValueError,
        "does not declare the component scheduler",
    ),
    "abstract scheduler": (
        lambda f: edit_index(f, scheduler=["diffusers", "SchedulerMixin"]),
        ValueError,
        "cannot be loaded as SchedulerMixin: AttributeError",
    ),
    "scheduler of a wrong type": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", num_train_timesteps="many"),
        ValueError,
        r"scheduler_config\.json cannot be loaded as DDIMScheduler: TypeError linspace",
    ),
    "unet of a wrong type": (
        lambda f: edit_json(f / "unet/config.json", block_out_channels=3, down_block_types=5),
        ValueError,
        r"unet.config\.json cannot be loaded as UNet2DConditionModel: ValueError "
        r"down_block_types must be tuple\[str, ...\], got 5$",
    ),
    "unknown block": (
        lambda f: edit_json(f / "unet/config.json", down_block_types=["NoBlock2D"] * 2),
        ValueError,
        r"unet.config\.json cannot be loaded as UNet2DC.*: .*NoBlock2D does not exist",
    ),
    "vae of a wrong type": (
        lambda f: edit_json(f / "vae/config.json", block_out_channels=3),
        ValueError,
        r"vae.config\.json cannot be loaded as AutoencoderKL: TypeError",
    ),
    "encoder of a wrong type": (
        lambda f: edit_json(f / "image_encoder/config.json", hidden_size="wide"),
        ValueError,
        r"image_encoder.config\.json cannot be loaded as PaintByExampleImageEncoder: .*hidden_size",
    ),
    "encoder's unknown activation": (
        lambda f: edit_json(f / "image_encoder/config.json", hidden_act="nope"),
        ValueError,
        r"config\.json cannot be loaded as PaintByExampleImageEncoder: KeyError 'nope'",
    ),
    "no scheduler": (
        lambda f: rename(f, "scheduler/scheduler_config.json"),
        FileNotFoundError,
        r"scheduler_config\.json is missing",
    ),
    "no config": (
        lambda f: rename(f, "unet/config.json"),
        FileNotFoundError,
        r"unet.config\.json is missing",
    ),
    "no weights": (
        lambda f: rename(f, ENCODER),
        FileNotFoundError,
        "no weights in .*image_encoder: expected one of .*model.safetensors",
    ),
    "truncated": (
        lambda f: truncate(f, UNET),
        ValueError,
        r"unet.diffusion_pytorch_model\.safetensors is truncated or no safetensors file",
    ),
    "truncated bin": (truncated_bin, ValueError, r"diffusion_pytorch_model\.bin is truncated"),
    "empty": (
        lambda f: (f / ENCODER).write_bytes(b""),
        ValueError,
        r"image_encoder.model\.safetensors is empty",
    ),
    "pointer": (
        lambda f: (f / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        ValueError,
        r"unet.diffusion_pytorch_model\.safetensors is a Git LFS pointer, a short text in place",
    ),
    "web page bin": (
        lambda f: (rename(f, UNET), (f / "unet/diffusion_pytorch_model.bin").write_text("<html>")),
        ValueError,
        r"diffusion_pytorch_model\.bin is a web page \(HTML\) and no weights",
    ),
    "pickle named safetensors": (
        lambda f: torch.save({"conv_in.bias": torch.ones(1)}, (f / UNET).open("wb")),
        ValueError,
        r"model\.safetensors is a file of torch, a pickle, and not what its name says",
    ),
    "safetensors named bin": (
        lambda f: (f / UNET).rename(f / "unet/diffusion_pytorch_model.bin"),
        ValueError,
        r"model\.bin is a safetensors file; its name has to end in \.safetensors",
    ),
    "malicious": (
        malicious_bin,
        ValueError,
        r"pytorch_model\.bin is a pickle but no checkpoint of torch",
    ),
    "not tensors": (
        not_tensors,
        ValueError,
        "must hold plain tensors by name .*, 'epoch' is a int",
    ),
    "shard index": (damaged_shard_index, ValueError, "is not an index of weight files"),
    "shard list": (
        lambda f: damaged_shard_index(f, '{"weight_map": {"conv_in.bias": 3}}'),
        ValueError,
        "is not an index of weight files: TypeError",
    ),
    "missing tensor": (
        lambda f: edit_weights(f / ENCODER, drop("proj_out.bias", "uncond_vector")),
        ValueError,
        "image encoder in .* missing: 2 tensors, proj_out.bias, uncond_vector$",
    ),
    "extra tensor": (
        lambda f: edit_weights(f / ENCODER, lambda s: s | {"lora.up": torch.zeros(2)}),
        ValueError,
        "unexpected: 1 tensor, lora.up",
    ),
    "misshapen tensor": (
        lambda f: edit_weights(f / ENCODER, lambda s: s | {"proj_out.bias": torch.zeros(5)}),
        ValueError,
        r"misshapen: 1 tensor, proj_out.bias \(\[5\] for \[24\]\)",
    ),
    "missing in the unet": (
        lambda f: edit_weights(f / UNET, drop("conv_out.bias")),
        ValueError,
        "UNet2DConditionModel in .* missing: 1 tensor, conv_out.bias",
    ),
    "extra in the unet": (
        lambda f: edit_weights(f / UNET, lambda s: s | {"add_embedding": torch.zeros(2)}),
        ValueError,
        "UNet2DConditionModel in .* unexpected: 1 tensor, add_embedding",
    ),
    "misshapen in the unet": (
        lambda f: edit_weights(f / UNET, lambda s: s | {"conv_out.bias": torch.zeros(9)}),
        ValueError,
        r"misshapen: 1 tensor, conv_out.bias \(\[9\] for \[4\]\)",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_folders(folder, capsys, damage, error, message) -> None:
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


CUSTOM_BROKEN = {
    "projection of a wrong type": (
        "image_proj",
        {"width": "wide"},
        ".*width must be int, got 'wide'",
    ),
    "negative tokens": ("image_proj", {"tokens": -1}, ".*tokens must not be negative, got -1"),
    "encoder of a wrong type": (
        "image_encoder",
        {"hidden_size": "wide"},
        ".*hidden_size must be int",
    ),
    "encoder's unknown activation": ("image_encoder", {"hidden_act": "nope"}, "KeyError 'nope'"),
}


@pytest.mark.parametrize(
    ("component", "change", "message"), CUSTOM_BROKEN.values(), ids=CUSTOM_BROKEN.keys()
)
def test_broken_configurations_of_a_custom_model(
    custom, tmp_path, component, change, message
) -> None:
    custom.save_pretrained(tmp_path)
    edit_json(tmp_path / component / "config.json", **change)
    found = rf"{component}.config\.json cannot be loaded as \w+: {message}"
    with pytest.raises(ValueError, match=found) as caught:
        load_pipeline(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_wrong_option_in_the_index_names_the_folder(custom, tmp_path) -> None:
    custom.save_pretrained(tmp_path)
    edit_index(tmp_path, reference_size=[16])
    message = r"cannot be loaded as CustomPipeline: .*reference_size must be .* got \[16\]$"
    with pytest.raises(ValueError, match=message) as caught:
        load_pipeline(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_faulty_disk_is_no_broken_configuration() -> None:
    with pytest.raises(PermissionError), in_one_sentence("config.json"):
        raise PermissionError(13, "denied")
    with pytest.raises(ValueError, match=r"^config\.json: OSError no class found$"):
        with in_one_sentence("config.json"):
            raise OSError("no\nclass   found")


def test_many_missing_tensors_are_counted(folder) -> None:
    edit_weights(folder / UNET, lambda state: {"conv_out.bias": state["conv_out.bias"]})
    with pytest.raises(ValueError, match=r"missing: \d\d+ tensors, (\S+, ){7}\S+ and \d+ more"):
        load_pipeline(folder)


def test_unknown_names_are_refused(public_folder, tmp_path) -> None:
    known = (
        r"built-in name \(pocket\) or a folder of a CustomPipeline, DCIVTONPipeline, "
        "PaintByExamplePipeline or StableVITONPipeline"
    )
    with pytest.raises(ValueError, match=rf"{known}, got 'nonsense'"):
        load_pipeline("nonsense")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileNotFoundError, match="file is not a folder"):
        load_pipeline(file)
    with pytest.raises(ValueError, match="variant must be None for the built-in model pocket"):
        load_pipeline("pocket", variant="fp16")
    with pytest.raises(ValueError, match="holds a PaintByExamplePipeline, not a CustomPipeline"):
        CustomPipeline.from_pretrained(public_folder)
    with pytest.raises(TypeError, match=r"from_pretrained takes torch_dtype, .* got device_map"):
        PaintByExamplePipeline.from_pretrained(public_folder, device_map="auto")


@pytest.mark.parametrize("name", models.__all__)
def test_every_public_name_exists(name) -> None:
    assert getattr(models, name) is not None
    assert name in dir(models)


def test_other_names_do_not() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        models.nonsense  # noqa: B018
