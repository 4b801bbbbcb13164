"""Checkpoint files of every age and kind are read, and nothing in them is executed."""

import os
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from i2am.models.conversion import read_checkpoint

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
OLD = {"_use_new_zipfile_serialization": False}
FORMATS = {"zip": {}, "legacy": OLD}


class Attack:
    """Runs a shell command when it is unpickled by a reader that executes what it reads."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def assert_tensors(result):
    assert set(result) == set(TENSORS)
    assert all(torch.equal(result[name], TENSORS[name]) for name in TENSORS)


@pytest.fixture
def framework(monkeypatch):
    """Makes a class that is to be found in a module of a training framework."""

    def make(module, name="ModelCheckpoint"):
        made = type(name, (), {"__module__": module})
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        setattr(sys.modules[module], name, made)
        return made

    return make


@pytest.fixture
def forget(monkeypatch):
    """The framework is not installed where the file is read."""

    def forget_modules(*names):
        for name in list(sys.modules):
            if name.startswith(names):
                monkeypatch.delitem(sys.modules, name)

    return forget_modules


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "wrap", [dict, lambda x: {"state_dict": x, "epoch": 3}], ids=["flat", "lit"]
)
def test_torch_files(tmp_path, options, wrap):
    torch.save(wrap(TENSORS), tmp_path / "x.ckpt", **options)
    assert_tensors(read_checkpoint(tmp_path / "x.ckpt"))


def test_safetensors_files(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    assert_tensors(read_checkpoint(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "module",
    [
        "pytorch_lightning.callbacks.model_checkpoint",
        "lightning.pytorch.callbacks",
        "omegaconf.base",
    ],
)
def test_classes_of_frameworks_become_objects_without_content(tmp_path, framework, forget, module):
    allowed = set(torch.serialization.get_safe_globals())
    made = framework(module)
    callback = made()
    callback.trace = "state"
    content = {
        "state_dict": TENSORS,
        "callbacks": {made: {"best": 0.5}},  # old versions: the class itself is the key
        "hyper_parameters": [callback],
    }
    torch.save(content, tmp_path / "x.ckpt")
    forget(module.split(".")[0])
    assert_tensors(read_checkpoint(tmp_path / "x.ckpt"))
    assert not any(name.startswith(module.split(".")[0]) for name in sys.modules)
    # and the leave to read them ended there
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_named_alike_is_not_of_the_framework(tmp_path, framework, forget):
    made = framework("lightning_rod")
    torch.save({"state_dict": TENSORS, "x": made()}, tmp_path / "x.ckpt")
    forget("lightning_rod")
    with pytest.raises(ValueError, match=r"refused, .* names lightning_rod\.ModelCheckpoint"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_malicious_file_is_refused_by_name_and_not_executed(tmp_path, options):
    trace = tmp_path / "executed"
    torch.save({"state_dict": TENSORS, "x": Attack(trace)}, tmp_path / "x.ckpt", **options)
    with pytest.raises(ValueError, match="is refused, and nothing in it was executed") as refusal:
        read_checkpoint(tmp_path / "x.ckpt")
    assert f"names {os.system.__module__}.system" in str(refusal.value)
    assert "weights_only" not in str(refusal.value)  # torch's advice to execute it after all
    assert not trace.exists()
    # the attack is one
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert trace.exists()


def test_malicious_plain_pickle_is_not_executed(tmp_path):
    trace = tmp_path / "executed"
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Attack(trace), protocol=2))
    with pytest.raises(ValueError, match=r"names \S+\.system"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert not trace.exists()


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_truncated_anywhere(tmp_path, options):
    torch.save({"state_dict": TENSORS}, tmp_path / "whole.ckpt", **options)
    data = (tmp_path / "whole.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    for length in [0, 1, 3, 4, *range(5, len(data) - 1, len(data) // 40), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"truncated|damaged") as refusal:
            read_checkpoint(cut)
        assert str(refusal.value).startswith(f"checkpoint {cut} is ")


def test_truncated_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "x.safetensors").write_bytes(data[:length])
        with pytest.raises(ValueError, match="is truncated or no safetensors file"):
            read_checkpoint(tmp_path / "x.safetensors")


CONTENTS = {
    "nothing": ({}, "must hold tensors by name, got nothing"),
    "list": ([torch.ones(1)], "must hold tensors by name, got a list"),
    "number": ({"state_dict": {"a": 3}}, "and nothing else, 'a' is a int"),
    "nested": ({"a": {"b": torch.ones(1)}}, "'a' is a dict"),
    "keys": ({3: torch.ones(1)}, "and nothing else, 3 is a Tensor"),
    "sparse": ({"a": torch.eye(2).to_sparse()}, "'a' is a Tensor"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_content_that_is_no_checkpoint(tmp_path, case):
    content, sentence = CONTENTS[case]
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=sentence):
        read_checkpoint(tmp_path / "x.ckpt")


def test_no_checkpoint_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint \S+no\.ckpt does not exist"):
        read_checkpoint(tmp_path / "no.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint \S+ is not a file"):
        read_checkpoint(tmp_path)
    (tmp_path / "x.ckpt").write_text("hello, I am no checkpoint")
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        read_checkpoint(tmp_path / "x.ckpt")
