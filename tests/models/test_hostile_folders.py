"""Folders that would take all memory, reach a hub, or hold weights that are no numbers."""

import json
import math
import shutil
import socket
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from i2am.models import load_pipeline, pocket_pipeline, pocket_weights
from i2am.models.building import build_empty, no_larger_than
from i2am.models.offline import no_hub
from i2am.models.weights import load_strictly, read_state_dict, read_weight_file

UNET = "unet/diffusion_pytorch_model.safetensors"
ENCODER = "image_encoder/model.safetensors"


@pytest.fixture
def folders(public_folder, custom, tmp_path) -> dict[str, Path]:
    """Copies to damage: of Paint-by-Example, and of the custom model."""
    custom.save_pretrained(tmp_path / "custom")
    shutil.copytree(public_folder, tmp_path / "paint-by-example")
    return {name: tmp_path / name for name in ("custom", "paint-by-example")}


def edit_json(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


# Sizes

HUGE = 10**12
SIZES = [
    ("custom", "image_encoder", {"hidden_size": 8000, "num_hidden_layers": 12}, "of more than"),
    ("custom", "image_encoder", {"num_hidden_layers": 10**6}, "has 1,000,000 layers, and its"),
    ("custom", "image_encoder", {"num_hidden_layers": HUGE}, "1,000,000,000,000 layers, and"),
    ("custom", "image_encoder", {"image_size": 10**9}, "of more than"),
    ("custom", "image_encoder", {"mlp_ratio": 10**9}, "of more than"),
    ("custom", "image_proj", {"tokens": 10**9}, "of more than"),
    ("custom", "image_proj", {"layers": 10**9}, "of more than"),
    ("custom", "image_proj", {"width": 10**5}, "of more than"),
    ("paint-by-example", "image_encoder", {"hidden_size": 8000}, "of more than"),
    ("paint-by-example", "image_encoder", {"hidden_size": 10**9}, "of more than"),
    ("paint-by-example", "image_encoder", {"num_hidden_layers": 10**6}, "has 1,000,000 layers"),
    ("paint-by-example", "image_encoder", {"image_size": 10**6}, "of more than"),
    ("paint-by-example", "unet", {"block_out_channels": [32000, 64000]}, "of more than"),
    ("paint-by-example", "unet", {"layers_per_block": 10**6}, "of more than"),
    ("paint-by-example", "unet", {"cross_attention_dim": HUGE}, "of more than"),
    ("paint-by-example", "unet", {"transformer_layers_per_block": 10**6}, "of more than"),
    ("paint-by-example", "unet", {"attention_head_dim": -4}, "must not be negative, got -4"),
    ("paint-by-example", "unet", {"norm_num_groups": -1}, "must not be negative, got -1"),
    ("paint-by-example", "unet", {"layers_per_block": 2.5}, r"must be int \| .*, got 2.5"),
    ("paint-by-example", "unet", {"layers_per_block": True}, r"must be int \| .*, got True"),
    ("paint-by-example", "unet", {"sample_size": "large"}, "must be int .*, got 'large'"),
    ("paint-by-example", "unet", {"sample_size": [[["large"]]]}, "must be int .*, got 'large'"),
    ("paint-by-example", "unet", {"block_out_channels": {"0": 32}}, r"must be .*, got {'0': 32}"),
    ("paint-by-example", "vae", {"layers_per_block": HUGE}, "of more than"),
    ("paint-by-example", "vae", {"latent_channels": HUGE}, "of more than"),
    ("paint-by-example", "scheduler", {"num_train_timesteps": 2 * 10**9}, "at most 1,000,000, got"),
    ("paint-by-example", "scheduler", {"num_train_timesteps": HUGE}, "at most 1,000,000, got"),
]

# in a process of its own, whose memory can be limited
REFUSED = """
import json, re, resource, sys
from i2am.models import load_pipeline
import i2am.models.custom, i2am.models.paint_by_example
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (512 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for folder, component, change, sentence in json.loads(sys.argv[1]):
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    file = f"{folder}/{component}/{name}"
    before = open(file).read()
    open(file, "w").write(json.dumps(json.loads(before) | change))
    try:
        load_pipeline(folder)
        said = "nothing"
    except ValueError as error:
        said = str(error)
    open(file, "w").write(before)
    if not re.search(sentence, said) or file not in said or len(said) > 600 or "\\n" in said:
        print(component, change, "->", said)
load_pipeline(sys.argv[2])
print("done")
"""


def test_networks_that_are_larger_than_their_weights(folders, fork) -> None:
    cases = [(str(folders[name]), *rest) for name, *rest in SIZES]
    process = fork(REFUSED, json.dumps(cases), folders["custom"])
    out, err = process.communicate()
    assert out == "done\n", err
    assert process.returncode == 0


def test_only_the_thread_that_loads_is_stopped() -> None:
    built: list[torch.nn.Module] = []
    thread = threading.Thread(target=lambda: built.append(torch.nn.Linear(2000, 2000)))
    with pytest.raises(ValueError, match=r"of more than 1,048,578 values, and .* hold 1$"):  # noqa: PT012
        with no_larger_than({"a": torch.ones(1)}):
            thread.start()
            thread.join()
            assert len(built) == 1
            torch.nn.Linear(2000, 2000)
    assert torch.nn.Linear(2000, 2000).weight.shape == (2000, 2000)


def test_what_is_caught_while_building_is_said_at_the_end() -> None:
    with pytest.raises(ValueError, match="of more than 1,002 tensors"):  # noqa: PT012
        with no_larger_than({"a": torch.ones(1)}):
            try:
                torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(600))
            except ValueError:
                pass


def test_stored_values_count_not_repeated_ones() -> None:
    one = torch.zeros(1)
    state = {f"{number}": one.expand(4000, 1000) for number in range(100)}
    with pytest.raises(ValueError, match=r"values, and its weight files hold 1$"):
        build_empty(lambda: torch.nn.Linear(4000, 1000), state)


def test_networks_are_empty_but_for_buffers() -> None:
    def build():
        network = torch.nn.BatchNorm1d(4)
        network.register_buffer("places", torch.arange(3), persistent=False)
        return network

    network = build_empty(build, torch.nn.BatchNorm1d(4).state_dict())
    assert network.weight.is_meta
    assert network.places.tolist() == [0, 1, 2]
    values = torch.nn.BatchNorm1d(4).state_dict() | {"weight": torch.arange(4.0).double()}
    load_strictly(network, values, what="norm", dtype=torch.bfloat16)
    assert network.weight.tolist() == [0, 1, 2, 3]
    assert network.weight.dtype == torch.bfloat16
    assert network.weight.requires_grad
    assert network.weight.data_ptr() != values["weight"].data_ptr()


# Weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "file", "tensor"),
    [
        ("paint-by-example", UNET, "conv_out.weight"),
        ("paint-by-example", ENCODER, "proj_out.weight"),
        ("paint-by-example", "vae/diffusion_pytorch_model.safetensors", "quant_conv.weight"),
        ("custom", ENCODER, "layernorm.weight"),
        ("custom", "image_proj/diffusion_pytorch_model.safetensors", "proj.weight"),
    ],
)
def test_weights_that_are_no_numbers(folders, name, file, tensor, value) -> None:
    file = folders[name] / file
    state = {key: values.clone() for key, values in load_file(file).items()}
    state[tensor].view(-1)[1:3] = value
    save_file(state, file)
    message = (
        rf"^weights of {file} are NaN or infinite: 1 tensor, {tensor} "
        rf"\(2 of {state[tensor].numel()}\)$"
    )
    with pytest.raises(ValueError, match=message):
        load_pipeline(folders[name])


def test_weights_beyond_the_wanted_dtype(folders) -> None:
    file = folders["custom"] / UNET
    state = {key: values.clone() for key, values in load_file(file).items()}
    state["conv_out.bias"][:2] = 70_000
    save_file(state, file)
    load_pipeline(folders["custom"])
    load_pipeline(folders["custom"], torch_dtype=torch.bfloat16)
    message = (
        rf"^weights are beyond the range of torch\.float16, choose another dtype for {file}: "
        r"1 tensor, conv_out\.bias \(2 of 4, up to 70000\)$"
    )
    with pytest.raises(ValueError, match=message):
        load_pipeline(folders["custom"], torch_dtype=torch.float16)


def test_pocket_weights_that_are_no_numbers(tmp_path) -> None:
    weights = pocket_weights()
    assert weights is not None
    state = {key: values.clone() for key, values in load_file(weights).items()}
    state["vae.quant_conv.weight"][0] = math.nan
    save_file(state, tmp_path / "pocket.safetensors")
    with pytest.raises(ValueError, match=r"are NaN or infinite: 1 tensor, vae\.quant_conv\.weight"):
        pocket_pipeline(weights=tmp_path / "pocket.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_that_are_no_numbers(tmp_path, dtype) -> None:
    values = torch.tensor([1.0, math.nan, 2.0])
    save_file({"a": values.to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"1 tensor, a \(1 of 3\)"):
        read_weight_file(tmp_path / "x.safetensors")


def test_damaged_files_of_torch(folders) -> None:
    """transformers and diffusers would read them without comparing checksums."""
    for file in (folders["custom"] / UNET, folders["custom"] / ENCODER):
        name = "diffusion_pytorch_model.bin" if "unet" in file.parts else "pytorch_model.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    load_pipeline(folders["custom"])
    for file in folders["custom"].glob("*/*.bin"):
        whole = file.read_bytes()
        with zipfile.ZipFile(file) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
        damaged = bytearray(whole)
        damaged[largest.header_offset + 200] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{file.name} is damaged .* checksum is another one"):
            load_pipeline(folders["custom"])
        file.write_bytes(whole)


def test_loaded_weights_do_not_depend_on_the_files(folders, custom) -> None:
    loaded = load_pipeline(folders["custom"])
    for file in folders["custom"].glob("*/*.safetensors"):
        data = file.read_bytes()
        with file.open("r+b") as opened:  # the same file, not a new one
            opened.write(data[: len(data) // 2] + bytes(len(data) // 2))
    for name in ("vae", "unet", "image_encoder", "image_proj"):
        for key, values in custom.components[name].state_dict().items():
            assert torch.equal(loaded.components[name].state_dict()[key], values)


def test_one_file_beside_an_index_of_others(folders) -> None:
    index = folders["custom"] / f"{UNET}.index.json"
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"holds diffusion_\S+ and an index of others, diffusion_"):
        load_pipeline(folders["custom"])


def test_one_tensor_in_two_shards(custom, tmp_path) -> None:
    custom.unet.save_pretrained(tmp_path, max_shard_size="40KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    save_file({**load_file(second), **load_file(first)}, second)
    with pytest.raises(ValueError, match=rf"{second} holds tensors that another shard has: \d+ t"):
        read_state_dict(tmp_path)


def test_whole_numbers_in_place_of_weights(folders) -> None:
    file = folders["custom"] / UNET
    state = {key: values.clone() for key, values in load_file(file).items()}
    state["conv_out.bias"] = state["conv_out.bias"].to(torch.int8)
    save_file(state, file)
    with pytest.raises(ValueError, match=r"misshapen: 1 tensor, conv_out.bias \(torch.int8 for "):
        load_pipeline(folders["custom"])


# Hubs

KERNEL = "kernels-community/flash-attn"
HOSTILE = {
    "kernel": ("image_encoder/config.json", {"_attn_implementation": KERNEL}),
    "kernel by its public name": ("image_encoder/config.json", {"attn_implementation": KERNEL}),
    "unknown attention": ("image_encoder/config.json", {"_attn_implementation": "nonsense"}),
    "kernel inside": (
        "image_encoder/config.json",
        {
            "text_config": {"_attn_implementation": KERNEL},
            "sub_configs": {"vision_config": {"attn_implementation": KERNEL}},
        },
    ),
    "experts": ("image_encoder/config.json", {"_experts_implementation": KERNEL}),
    "another model": ("image_encoder/config.json", {"_name_or_path": "someone/else"}),
    "code": (
        "image_encoder/config.json",
        {"auto_map": {"AutoModel": "someone/else--modeling.Model"}, "trust_remote_code": True},
    ),
    "quantised": (
        "image_encoder/config.json",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ),
    "fused": ("image_encoder/config.json", {"fusion_config": {"patch_embeddings": True}}),
    "another file": ("image_encoder/config.json", {"transformers_weights": "../secret.bin"}),
    "other configurations": (
        "image_encoder/config.json",
        {"configuration_files": ["config.99.0.0.json", "config.1.0.0.json"]},
    ),
    "quantised unet": (
        "unet/config.json",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ),
    "another unet": (
        "unet/config.json",
        {"_class_name": "FluxTransformer2DModel", "_name_or_path": "someone/else"},
    ),
    "code of a unet": ("unet/config.json", {"auto_map": {"AutoModel": "someone/else--x.Y"}}),
    "another scheduler": (
        "scheduler/scheduler_config.json",
        {"_class_name": "PNDMScheduler", "_name_or_path": "someone/else"},
    ),
    "other components": (
        "model_index.json",
        {
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": ["someone/else", "Model"],
            "_name_or_path": "someone/else",
        },
    ),
    "another library": ("model_index.json", {"unet": ["someone", "UNet2DConditionModel"]}),
}


@pytest.fixture
def no_network(monkeypatch) -> list:
    """A network that is not there; lists who asked for it."""
    asked: list = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return asked


@pytest.mark.parametrize("name", ["custom", "paint-by-example"])
@pytest.mark.parametrize("case", HOSTILE)
def test_folders_that_name_what_is_on_a_hub(folders, no_network, name, case) -> None:
    folder = folders[name]
    wanted = load_pipeline(folder)
    file, change = HOSTILE[case]
    edit_json(folder / file, **change)
    loaded = load_pipeline(folder)
    assert not no_network
    assert loaded.image_encoder.config._attn_implementation == "sdpa"
    for part in ("vae", "unet", "image_encoder"):
        for key, values in wanted.components[part].state_dict().items():
            assert torch.equal(loaded.components[part].state_dict()[key], values)


def test_an_adapter_beside_the_weights_is_not_followed(folders, no_network) -> None:
    elsewhere = {"base_model_name_or_path": "someone/else", "peft_type": "LORA"}
    for part in ("image_encoder", "unet"):
        file = folders["custom"] / part / "adapter_config.json"
        file.write_text(json.dumps(elsewhere))
    load_pipeline(folders["custom"])
    assert not no_network


def test_no_hub_is_asked_while_a_folder_is_loaded(folders, no_network, monkeypatch) -> None:
    said = []

    class Asking(DDIMScheduler):
        @classmethod
        def from_config(cls, *arguments, **options):
            with pytest.raises(Exception, match="offline") as refusal:
                huggingface_hub.HfApi().model_info("someone/else")
            said.append(type(refusal.value).__name__)
            return DDIMScheduler.from_config(*arguments, **options)

    monkeypatch.setattr("i2am.models.schedulers.Asking", Asking, raising=False)
    edit_json(folders["custom"] / "model_index.json", scheduler=["diffusers", "Asking"])
    load_pipeline(folders["custom"])
    assert said == ["OfflineModeIsEnabled"]
    assert not no_network
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    with pytest.raises(FileNotFoundError):
        load_pipeline(folders["custom"], variant="none")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_the_last_block_allows_hubs_again(monkeypatch) -> None:
    for before in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", before)
        first, second = no_hub(), no_hub()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert huggingface_hub.is_offline_mode()
        second.__exit__(None, None, None)
        assert huggingface_hub.is_offline_mode() is before


def test_networks_are_those_that_diffusers_loads(folders) -> None:
    ours = load_pipeline(folders["paint-by-example"], torch_dtype=torch.bfloat16).unet
    theirs = UNet2DConditionModel.from_pretrained(
        folders["paint-by-example"] / "unet", torch_dtype=torch.bfloat16
    )
    assert {name: theirs.config[name] for name in ours.config} == dict(ours.config)
    assert {name for name in theirs.config if not name.startswith("_")} <= set(ours.config)
    assert not ours.training
    for name, values in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], values)
        assert ours.state_dict()[name].dtype == values.dtype
