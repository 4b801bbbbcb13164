"""Whole checkpoints become folders that load, or nothing appears and one sentence says why."""

import errno
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from i2am.files import OutputRefused, folders
from i2am.files.atomic import is_temporary
from i2am.models import load_pipeline
from i2am.models.conversion import SYSTEMS, Target, convert, convert_tensors, converting
from i2am.models.conversion.writing import Entry, write_safetensors

CLASSES = {
    "paint-by-example": "PaintByExamplePipeline",
    "dci-vton": "DCIVTONPipeline",
    "stableviton": "StableVITONPipeline",
    "custom": "CustomPipeline",
}
GRIDS = {"custom": [999, 980, 960, 20]}  # the first three timesteps of 50 and the last
PBE = "paint-by-example"


@pytest.fixture(scope="module")
def tensors(tiny_checkpoint):
    """The tensors of a tiny checkpoint; a new dict of the same tensors every time."""
    load = functools.cache(lambda system: torch.load(tiny_checkpoint(system))["state_dict"])
    return lambda system: dict(load(system))


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory):
    """A system's tiny checkpoint as a folder, made once."""

    @functools.cache
    def folder(system):
        out = tmp_path_factory.mktemp("converted") / system
        convert(tiny_checkpoint(system), out, system=system)
        return out

    return folder


def assert_weights(module, expected):
    state = module.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("system", SYSTEMS)
def test_folder_loads_as_what_it_is(system, converted, tensors):
    pipe = load_pipeline(converted(system))
    assert type(pipe).__name__ == CLASSES[system]
    for name, weights in convert_tensors(system, tensors(system)).items():
        assert_weights(getattr(pipe, name), weights)
    pipe.scheduler.set_timesteps(50)
    grid = pipe.scheduler.timesteps.tolist()
    assert [*grid[:3], grid[-1]] == GRIDS.get(system, [981, 961, 941, 1])
    if system == "custom":
        assert (pipe.reference_size, pipe.reference_grid) == ((56, 42), (4, 3))
        assert pipe.trained


def test_a_saved_pipeline_has_the_same_files(converted, tmp_path):
    """Nothing that save_pretrained would write is forgotten, but the index of shards."""
    load_pipeline(converted(PBE)).save_pretrained(tmp_path)
    ours = {p.relative_to(converted(PBE)) for p in converted(PBE).rglob("*")}
    theirs = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")}
    assert {str(path) for path in ours ^ theirs} == {"run.json"}


@pytest.mark.parametrize("system", [PBE, "custom"])
def test_manifest_has_the_hashes(system, converted, tiny_checkpoint):
    folder, file = converted(system), tiny_checkpoint(system)
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["system"] == system
    assert manifest["sources"]["checkpoint"] == {
        "name": file.name,
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert len(manifest["dropped"]) == (12 if system == PBE else 0)
    files = {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "run.json"
    }
    assert set(manifest["files"]) == set(files)
    for name, entry in manifest["files"].items():
        assert entry == {"sha256": files[name], "bytes": (folder / name).stat().st_size}


@pytest.mark.parametrize("write", [torch.save, save_file], ids=["flat", "safetensors"])
def test_other_files_give_the_same_folder(write, tensors, converted, tmp_path):
    source = tmp_path / ("x.safetensors" if write is save_file else "x.ckpt")
    write(tensors("custom"), source)
    convert(source, tmp_path / "out", system="custom")
    for file in converted("custom").rglob("*.safetensors"):
        same = tmp_path / "out" / file.relative_to(converted("custom"))
        assert same.read_bytes() == file.read_bytes()


def test_dtype(tiny_checkpoint, converted, tmp_path):
    convert(tiny_checkpoint("custom"), tmp_path / "out", system="custom", dtype=torch.bfloat16)
    for file in converted("custom").rglob("*.safetensors"):
        with (
            safe_open(file, "pt") as full,
            safe_open(tmp_path / "out" / file.relative_to(converted("custom")), "pt") as half,
        ):
            for name in full.keys():
                assert torch.equal(half.get_tensor(name), full.get_tensor(name).bfloat16())
    pipe = load_pipeline(tmp_path / "out", torch_dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.image_encoder.dtype == torch.bfloat16


def test_mixed_dtypes_and_strides_are_kept(tensors, tmp_path):
    state = tensors(PBE)
    # half-precision tensors of odd sizes in front of wider ones, and one that is no row after row
    state = {"proj_out.bias": state.pop("proj_out.bias").half()} | state
    wide = "model.diffusion_model.time_embed.0.weight"
    state[wide] = state[wide].T.contiguous().T.double()
    torch.save(state, tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", tmp_path / "out", system=PBE)
    with safe_open(tmp_path / "out/image_encoder/model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("proj_out.bias"), state["proj_out.bias"])
        key = "model.pre_layrnorm.weight"
        source = state["cond_stage_model.transformer.vision_model.pre_layrnorm.weight"]
        assert torch.equal(file.get_tensor(key), source)
    with safe_open(tmp_path / "out/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("time_embedding.linear_1.weight"), state[wide])


@pytest.mark.parametrize("system", ["custom", "stableviton"])
def test_vae_of_its_own_file(system, tiny_checkpoint, tensors, tmp_path):
    vae = {
        key.removeprefix("first_stage_model."): x + 1
        for key, x in tensors(PBE).items()
        if key.startswith("first_stage_model.")
    }
    torch.save({"state_dict": {**vae, "loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    result = convert(
        tiny_checkpoint(system), tmp_path / "out", system=system, vae=tmp_path / "vae.ckpt"
    )
    assert_weights(load_pipeline(tmp_path / "out").vae, convert_tensors("vae", vae)["vae"])
    beginnings = ("encoder.", "decoder.", "first_stage_model.")
    own = [key for key in tensors(system) if key.startswith(beginnings)]
    assert set(own) | {"loss.logvar"} <= set(result.dropped)
    assert set(result.sources) == {"checkpoint", "vae"}


# Refusals


def without(*keys):
    return lambda state: {key: x for key, x in state.items() if key not in keys}


def changed(**tensors):
    return lambda state: {**state, **{key.replace("__", "."): x for key, x in tensors.items()}}


REFUSED = {
    "missing": (
        without("model.diffusion_model.out.2.bias", "learnable_vector"),
        r"missing: 2 tensors, image_encoder\.uncond_vector, unet\.conv_out\.bias$",
    ),
    "component": (
        lambda state: {k: x for k, x in state.items() if not k.startswith("first_stage_model.")},
        r"missing: 248 tensors, vae\.decoder\S+, .* and 240 more$",
    ),
    "unexpected": (
        changed(lvlb_weights=torch.ones(())),
        r"unexpected: 1 tensor, lvlb_weights$",
    ),
    "averaged": (
        changed(model_ema__decay=torch.ones(()), model_ema__outbias=torch.ones(4)),
        r"holds 2 averaged weights beside .*, such as model_ema\.decay; drop=\['model_ema\.'\] ",
    ),
    "wrapped": (
        lambda state: {f"module.{key}": x for key, x in without("learnable_vector")(state).items()},
        r"read without what wrappers add \(1033 tensors, module\.\S+ and 1032 more\), do not fit; "
        r"missing: 1 tensor, image_encoder\.uncond_vector$",
    ),
    "wrapped-twice": (
        changed(_orig_mod__proj_out__bias=torch.ones(24)),
        r"unexpected: 1 tensor, _orig_mod\.proj_out\.bias \(a second proj_out\.bias\)$",
    ),
    "unexpected-block": (
        changed(model__diffusion_model__input_blocks__12__0__op__weight=torch.ones(1)),
        r"unexpected: 1 tensor, unet\.down_blocks\.3\.downsamplers\.0\.conv\.weight$",
    ),
    "twice": (
        changed(cond_stage_model__transformer__pre_layrnorm__bias=torch.ones(64)),
        r"unexpected: 1 tensor, cond_stage_model\.\S+ \(a second model\.pre_layrnorm\.bias\)$",
    ),
    "misshapen": (
        changed(proj_out__bias=torch.ones(25)),
        r"misshapen: 1 tensor, image_encoder\.proj_out\.bias \(\[25\] for \[24\]\)$",
    ),
    "misshapen-thirds": (
        changed(cond_stage_model__mapper__resblocks__0__attn__c_qkv__bias=torch.ones(193)),
        r"misshapen: 3 tensors, \S+to_k\.bias \(\[193\] in 3 parts for \[64\]\), ",
    ),
    "convolution-for-linear": (
        changed(first_stage_model__encoder__mid__attn_1__q__weight=torch.ones(128, 128, 3, 3)),
        r"misshapen: 1 tensor, vae\.\S+to_q\.weight \(\[128, 128, 3, 3\] for \[128, 128\]\)$",
    ),
    "integers": (
        changed(proj_out__bias=torch.ones(24, dtype=torch.int64)),
        r"misshapen: 1 tensor, image_encoder\.proj_out\.bias \(torch\.int64 \[24\] for \[24\]\)$",
    ),
    "channels": (
        changed(model__diffusion_model__input_blocks__0__0__weight=torch.ones(32, 4, 3, 3)),
        r"unet\.conv_in\.weight \(\[32, 4, 3, 3\] for \[32, 9, 3, 3\]\)$",
    ),
    "sizes": (
        changed(
            model__diffusion_model__input_blocks__1__0__in_layers__2__weight=torch.ones(33, 3, 3, 3)
        ),
        "the sizes of the tensors make no PaintByExamplePipeline: ValueError ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_listed_and_nothing_is_written(case, tensors, tmp_path):
    change, sentence = REFUSED[case]
    # values do not matter here
    empty = {key: x.new_zeros(1).expand(x.shape) for key, x in tensors(PBE).items()}
    torch.save(change(empty), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=sentence) as refusal:
        convert(tmp_path / "x.ckpt", tmp_path / "out", system=PBE)
    assert "\n" not in str(refusal.value)
    assert names(tmp_path) == ["x.ckpt"]


def test_strays_may_be_dropped_on_request(tensors, tmp_path):
    stray = {"model_ema.decay": torch.ones(()), "model_ema.num": torch.ones((), dtype=torch.int32)}
    torch.save(tensors("custom") | stray, tmp_path / "x.ckpt")
    result = convert(tmp_path / "x.ckpt", tmp_path / "out", system="custom", drop=["model_ema."])
    assert result.dropped == ("model_ema.decay", "model_ema.num")
    with pytest.raises(ValueError, match=r"missing: 44 tensors, image_proj\."):
        convert(
            tmp_path / "x.ckpt",
            tmp_path / "no",
            system="custom",
            drop=["model_ema.", "mlp.", "diffusion.uncond"],
        )


@pytest.mark.parametrize(
    "wrap",
    [
        "module._orig_mod.{}".format,
        # a network that was compiled inside of what was trained
        lambda key: key.replace("model.diffusion_model.", "model.diffusion_model._orig_mod."),
    ],
    ids=["whole", "inside"],
)
def test_names_of_wrapped_models_are_read_as_the_models(wrap, tensors, converted, tmp_path):
    state = {wrap(key): x for key, x in tensors(PBE).items()}
    assert set(state) != set(tensors(PBE))
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", tmp_path / "out", system=PBE)
    for file in converted(PBE).rglob("*.safetensors"):
        same = tmp_path / "out" / file.relative_to(converted(PBE))
        assert same.read_bytes() == file.read_bytes()


def damaged(values):
    """The change of a state that writes values over the beginning of a tensor."""

    def change(state):
        key = "model.diffusion_model.out.2.weight"
        changed = state[key].clone()
        changed.view(-1)[: len(values)] = torch.tensor(values)
        return {**state, key: changed}

    return change


@pytest.mark.parametrize(
    ("values", "dtype", "sentence"),
    [
        (
            [7e4, -1e5, 65504.0],
            torch.float16,
            r"^weights are beyond the range of torch\.float16, choose another dtype for the "
            r"checkpoint: 1 tensor, "
            r"unet\.conv_out\.weight \(2 of 1152, up to 100000\)$",
        ),
        (
            [torch.nan, torch.inf, 1.0],
            None,
            r"^weights of the checkpoint are NaN or infinite: 1 tensor, unet\.conv_out\.weight "
            r"\(2 of 1152\)$",
        ),
    ],
    ids=["half", "as-it-is"],
)
def test_weights_that_would_not_be_finite_are_refused(values, dtype, sentence, tensors, tmp_path):
    torch.save(damaged(values)(tensors(PBE)), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "x.ckpt", tmp_path / "out", system=PBE, dtype=dtype)
    assert names(tmp_path) == ["x.ckpt"]


def entries(dtype, **tensors):
    return [Entry(Target("unet", name, 0, 1), values, dtype) for name, values in tensors.items()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_number_of_a_dtype(dtype, tmp_path):
    largest = torch.finfo(dtype).max
    ends = torch.tensor([largest, -largest], dtype=torch.float64)
    done = entries(dtype, a=ends, b=torch.ones(0))
    write_safetensors(tmp_path / "done", done, progress=lambda size: None)
    assert load_file(tmp_path / "done")["a"].tolist() == [largest, -largest]
    sentence = (
        rf"the range of {dtype}, choose .* the checkpoint: 1 tensor, unet\.a \(2 of 2, up to "
    )
    beyond = entries(dtype, a=ends * 1.01)
    with pytest.raises(ValueError, match=sentence):
        write_safetensors(tmp_path / "beyond", beyond, progress=lambda size: None)


def test_tensors_that_are_not_finite_are_counted(tmp_path):
    """Of a file of several: every one is named once, whatever the number of its pieces."""
    large = torch.zeros(3 << 21)
    large[:: 1 << 21] = torch.inf
    several = entries(
        torch.float16,
        a=large,
        b=torch.tensor([1e6]),
        c=torch.ones(2),
        d=torch.full((2, 2), -7e4),
    )
    sentence = (
        r"^weights of the checkpoint are NaN or infinite: 1 tensor, unet\.a \(3 of 6291456\); "
        r"weights are beyond the range of torch\.float16, choose another dtype for the checkpoint: "
        r"2 tensors, "
        r"unet\.b \(1 of 1, up to 1e\+06\), unet\.d \(4 of 4, up to 70000\)$"
    )
    with pytest.raises(ValueError, match=sentence):
        write_safetensors(tmp_path / "x.safetensors", several, progress=lambda size: None)


def test_of_another_system(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"stableviton checkpoint .* do not fit; missing: "):
        convert(tiny_checkpoint(PBE), tmp_path / "out", system="stableviton")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"system": "sd"}, r"system must be one of paint-by-example, .*, got 'sd'"),
        ({"dtype": torch.int8}, r"dtype must be one of torch\.float64, .*, got torch\.int8"),
    ],
    ids=["system", "dtype"],
)
def test_options(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        convert(tmp_path / "no.ckpt", tmp_path / "out", **{"system": PBE, **options})


def test_folder_in_use(tiny_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputRefused, match="output folder"):
            convert(
                tiny_checkpoint("custom"), tmp_path / "out", system="custom", overwrite=overwrite
            )
    assert names(tmp_path / "out") == ["mine.txt"]


def test_overwrite(tiny_checkpoint, converted, tmp_path):
    shutil.copytree(converted(PBE), tmp_path / "out")
    with pytest.raises(OutputRefused, match="is not empty"):
        convert(tiny_checkpoint("custom"), tmp_path / "out", system="custom")
    convert(tiny_checkpoint("custom"), tmp_path / "out", system="custom", overwrite=True)
    assert names(tmp_path / "out") == names(converted("custom"))
    assert names(tmp_path) == ["out"]


def test_no_room(tiny_checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(OSError, match=r"[\d,]+ bytes are needed, 1,000,000 are free") as error:
        convert(tiny_checkpoint("custom"), tmp_path / "out", system="custom")
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


# Interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "fault")], ids=repr)
@pytest.mark.parametrize("number", [1, 4], ids=["first-file", "last-file"])
def test_after_an_error_nothing_is_left(error, number, tiny_checkpoint, tmp_path, monkeypatch):
    calls = []
    write = converting.write_safetensors

    def failing(path, *arguments, **options):
        calls.append(path)
        result = write(path, *arguments, **options)
        if len(calls) == number:
            raise error
        return result

    monkeypatch.setattr(converting, "write_safetensors", failing)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        convert(tiny_checkpoint("custom"), tmp_path / "out", system="custom")
    assert names(tmp_path) == []


def kill_in(module, name, number, *arguments):
    """Converts in this process and kills it as `module.name` is called for the `number`-th time."""
    function, calls = getattr(module, name), []

    def killing(*given, **options):
        calls.append(given)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **options)

    setattr(module, name, killing)
    convert(*arguments, system="custom")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (converting, "write_safetensors", 1),
        (converting, "write_safetensors", 4),
        (converting, "_write_manifest", 1),
        (folders, "sync", 3),
        (folders, "_replace", 1),
    ],
    ids=["first-file", "last-file", "manifest", "sync", "rename"],
)
def test_killed_at_any_point_nothing_looks_finished(
    module, name, number, tiny_checkpoint, tmp_path
):
    source = tiny_checkpoint("custom")
    fork = multiprocessing.get_context("fork")
    arguments = (module, name, number, source, tmp_path / "out")
    process = fork.Process(target=kill_in, args=arguments)
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert is_temporary(left)
    # the same command goes through afterwards
    convert(source, tmp_path / "out", system="custom")
    assert load_pipeline(tmp_path / "out")


# Memory

MEASURE = """
import re, sys, torch
from i2am.models.conversion import convert

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

tiny, big, out, dtype = sys.argv[1:]
torch.set_num_threads(1)
convert(tiny, out + "-tiny", system="custom")  # imports what there is to import
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
convert(big, out, system="custom", dtype=getattr(torch, dtype))
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and returns pages to Linux")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_is_that_of_the_largest_tensor(
    dtype, tiny_checkpoint, tensors, published_keys, tmp_path
):
    """Resident memory grows by at most 1.3 x the largest tensor, mapped pages counted."""
    full = {
        key: torch.zeros(shape)
        for key, (shape, _) in published_keys("custom").items()
        if key.startswith("mlp.") and key != "mlp.proj.2.weight"
    }
    narrow = {key: x for key, x in tensors("custom").items() if key != "mlp.proj.2.weight"}
    head = {"mlp.proj.2.weight": torch.zeros(24, 1536)}
    torch.save({**narrow, **full, **head, "mlp.proj.2.bias": torch.zeros(24)}, tmp_path / "x.ckpt")
    largest = max(x.nbytes for x in full.values())
    total = sum(x.nbytes for x in full.values())
    assert (largest, total // largest) == (12288 * 1536 * 4, 6)
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-c", MEASURE),
            *map(str, (tiny_checkpoint("custom"), tmp_path / "x.ckpt", tmp_path / "out", dtype)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = int(done.stdout)
    assert grown <= 1.3 * largest, f"{grown / 1e6:.0f} MB for {largest / 1e6:.0f} MB"
