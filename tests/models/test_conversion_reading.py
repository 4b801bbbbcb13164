"""Checkpoint files of every age and kind are read, and nothing in them is executed."""

import argparse
import collections
import datetime
import enum
import functools
import gzip
import io
import os
import pathlib
import pickle
import sys
import time
import timeit
import types
import typing
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from i2am.models.conversion import read_checkpoint
from i2am.models.conversion.pickles import Name, read_pickle

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
            if path not in sys.modules:
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


# What stands beside the tensors


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "module",
    ["pytorch_lightning.callbacks.model_checkpoint", "lightning.pytorch.callbacks", "my_training"],
)
def test_classes_are_neither_imported_nor_kept(tmp_path, framework, forget, module, options):
    allowed = set(torch.serialization.get_safe_globals())
    made = framework(module)
    callback = made()
    callback.trace = "state"
    content = {
        "state_dict": TENSORS,
        "callbacks": {made: {"best": 0.5}},  # old versions: the class itself is the key
        "hyper_parameters": [callback],
    }
    torch.save(content, tmp_path / "x.ckpt", **options)
    forget(module.split(".")[0])
    assert_tensors(read_checkpoint(tmp_path / "x.ckpt"))
    assert not any(name.startswith(module.split(".")[0]) for name in sys.modules)
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_configuration_of_omegaconf(tmp_path, framework, forget):
    """As save_hyperparameters() leaves it: its objects name types, and a filled defaultdict."""

    def made(module, name, **attributes):
        thing = framework(f"omegaconf.{module}", name)()
        vars(thing).update(attributes)
        return thing

    metadata = made(
        *("base", "ContainerMetadata"),
        ref_type=typing.Any,
        object_type=dict,
        element_type=list,
        resolver_cache=collections.defaultdict(dict, {"now": {"%Y": 2023}}),
    )
    rate = made("nodes", "AnyNode", _val=1e-4, _metadata=made("base", "Metadata", ref_type=int))
    options = made("dictconfig", "DictConfig", _metadata=metadata, _content={"lr": rate})
    torch.save({"state_dict": TENSORS, "hyper_parameters": options}, tmp_path / "x.ckpt")
    forget("omegaconf")
    assert_tensors(read_checkpoint(tmp_path / "x.ckpt"))


class Level(enum.Enum):
    LOW = 0


class Outer:
    class Inner:
        """A name under a name, which older pickles ask getattr for."""

        def __init__(self, **options):
            self.options = options

        def __getnewargs_ex__(self):
            return (), self.options

        def __new__(cls, **options):
            return super().__new__(cls)


class Options(dict):
    """As configuration packages have it: a dictionary whose keys are attributes too."""


BESIDE = {
    "numpy-scalar": np.float64(0.5),
    "numpy-array": np.arange(3),
    "numpy-generator": np.random.default_rng(0),
    "path": pathlib.PurePosixPath("/data/viton"),
    "namespace": argparse.Namespace(lr=1e-4, batch=[8]),
    "simple-namespace": types.SimpleNamespace(lr=1e-4),
    "enumeration": Level.LOW,
    "nested-class": Outer.Inner,
    "nested-object": Outer.Inner(a=1),
    "date": datetime.datetime(2023, 1, 1),
    "deque": collections.deque([1, 2, 3], maxlen=2),
    "counter": collections.Counter("aab"),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "dictionary": Options(lr=1),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "bytes": b"abc",
    "complex": 1j,
    "slice": slice(1, 2),
    "range": range(3),
    "function": os.path.join,
    "partial": functools.partial(int, base=2),
    "exception": ValueError("x"),
    "long": 1 << 3000,
    "dtype": torch.float16,
    "size": torch.Size([1, 2]),
    "device": torch.device("cuda:0"),
    "sparse": torch.eye(2).to_sparse(),
    "module": torch.nn.Linear(2, 2),
    "optimizer": {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(2)}}},
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("beside", BESIDE)
def test_objects_beside_the_tensors_are_left_out(tmp_path, beside, protocol):
    content = {"x": BESIDE[beside], "state_dict": TENSORS, "y": [BESIDE[beside]]}
    torch.save(content, tmp_path / "x.ckpt", pickle_protocol=protocol)
    assert_tensors(read_checkpoint(tmp_path / "x.ckpt"))


@pytest.mark.parametrize(
    "kind",
    [collections.OrderedDict, functools.partial(collections.defaultdict, list)],
    ids=["OrderedDict", "defaultdict"],
)
def test_dictionaries_of_tensors(tmp_path, kind):
    state = kind()
    state.update(TENSORS)
    if isinstance(state, collections.OrderedDict):
        state._metadata = {"": {"version": 1}}  # as state_dict() of a module has it
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    assert_tensors(read_checkpoint(tmp_path / "x.ckpt"))


# Attacks


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


class Called:
    """Unpickling it calls a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ways to leave a trace that no list of dangerous names knows
ATTACKS = {
    "method": lambda trace: Called(pathlib.Path.touch, trace),
    "code": lambda trace: Called(timeit.timeit, f"open({str(trace)!r}, 'w')", "pass", time.time, 1),
    "open": lambda trace: Called(open, str(trace), "w"),
    "torch": lambda trace: Called(torch.save, 1, str(trace)),
    "numpy": lambda trace: Called(np.savetxt, str(trace), [1]),
    "map": lambda trace: Called(list, Called(map, pathlib.Path.touch, [trace])),
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_calls_of_unknown_functions_do_nothing(tmp_path, attack, options):
    trace = tmp_path / "executed"
    content = {"state_dict": TENSORS, "x": ATTACKS[attack](trace)}
    torch.save(content, tmp_path / "x.ckpt", **options)
    assert_tensors(read_checkpoint(tmp_path / "x.ckpt"))
    assert not trace.exists()
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("os", "system"), ("posix", "popen"), ("subprocess", "Popen"), ("runpy", "run_path")),
        *(("builtins", "eval"), ("__builtin__", "execfile")),
    ],
)
def test_functions_that_run_commands_are_refused(module, name, tmp_path):
    # MARK, STRING, TUPLE and REDUCE of protocol 0 behind a header
    data = f"\x80\x02c{module}\n{name}\n(S'true'\ntR.".encode("latin-1")
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"beside tensors it names {module}\.{name}$"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "named",
    [
        *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
        *("collections OrderedDict", "torch FloatStorage", "torch float16", "torch Tensor"),
        *("some.where Thing", "builtins getattr", "torch hub.load", "i2am convert"),
    ],
)
def test_a_pickle_changes_nothing_that_it_names(named):
    """BUILD sets attributes: of a function, its defaults for everybody in the process."""
    module, name = named.split()
    stream = io.BytesIO()
    pickler = pickle._Pickler(stream, protocol=2)
    pickler.write(pickle.PROTO + b"\x02" + f"c{module}\n{name}\n".encode())
    pickler.save((None, {"__defaults__": (1,), "__new__": 1, "harm": 1}))
    pickler.write(pickle.BUILD + pickle.STOP)
    before = set(sys.modules)
    found, _ = read_pickle(io.BytesIO(stream.getvalue()))
    assert isinstance(found, torch.dtype) or found == Name(f"{module}.{name}")
    assert not hasattr(found, "harm")
    assert set(sys.modules) == before


# Tensors


def halves():
    return torch.arange(12.0).reshape(3, 4)


def attributed():
    tensor = torch.nn.Parameter(torch.arange(3.0))
    tensor.is_bias = True
    return tensor


KINDS = {
    "transposed": lambda: halves().T,
    "cut": lambda: halves()[1:, ::2],
    "expanded": lambda: torch.zeros(1).expand(4, 3),
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.ones(0, 3),
    "half": lambda: halves().half(),
    "brain": lambda: halves().bfloat16(),
    "double": lambda: halves().double(),
    "integers": lambda: torch.arange(5),
    "booleans": lambda: torch.tensor([True, False]),
    "complex": lambda: torch.tensor([1 + 2j]),
    "eight-bit": lambda: halves().to(torch.float8_e4m3fn),
    "unsigned": lambda: torch.arange(5).to(torch.uint16),
    "parameter": lambda: torch.nn.Parameter(halves()),
    "attributes": attributed,
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors(tmp_path, kind, options):
    wanted = KINDS[kind]()
    torch.save({"before": torch.ones(1), "x": wanted}, tmp_path / "x.ckpt", **options)
    found = read_checkpoint(tmp_path / "x.ckpt")["x"]
    assert found.dtype == wanted.dtype
    assert found.stride() == wanted.stride()
    # not all dtypes can be compared
    assert found.tolist() == wanted.tolist()
    assert not found.requires_grad
    assert type(found) is torch.Tensor


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_tensors_that_share_a_storage(tmp_path, options):
    row = torch.arange(6.0)
    torch.save({"a": row, "b": row[2:4]}, tmp_path / "x.ckpt", **options)
    read = read_checkpoint(tmp_path / "x.ckpt")
    assert read["b"].tolist() == [2, 3]
    read["a"][2] = 7
    assert read["b"].tolist() == [7, 3]
    assert read_checkpoint(tmp_path / "x.ckpt")["a"].tolist() == row.tolist()  # the file's are kept


def packed_again(source, target, method, replaced=()):
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(target, "w", method) as write:
        for name in read.namelist():
            write.writestr(name, dict(replaced).get(name.split("/", 1)[1], read.read(name)))


@pytest.mark.parametrize(
    "method",
    [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED],
    ids=["stored", "deflated"],
)
def test_archives_that_were_packed_again(tmp_path, method):
    torch.save({"state_dict": TENSORS}, tmp_path / "x.ckpt")
    packed_again(tmp_path / "x.ckpt", tmp_path / "again.ckpt", method)
    assert_tensors(read_checkpoint(tmp_path / "again.ckpt"))


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((5,), (1,), 0), ((2,), (4,), 0), ((2,), (1,), 3), ((2,), (-1,), 1), ((2,), (1,), -1)],
    ids=["size", "stride", "offset", "backwards", "before"],
)
def test_tensors_that_reach_beyond_their_storage(tmp_path, size, stride, offset):
    lie = Called(
        torch._utils._rebuild_tensor_v2,
        torch.TypedStorage(
            wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True
        ),
        *(offset, size, stride, False, collections.OrderedDict()),
    )
    torch.save({"a": torch.ones(64), "b": lie, "c": torch.ones(64)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"is damaged .* a tensor of \[\d\] reaches beyond"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_bytes_in_another_order(tmp_path):
    torch.save(TENSORS, tmp_path / "x.ckpt")
    other = {"little": b"big", "big": b"little"}[sys.byteorder]
    packed_again(
        tmp_path / "x.ckpt", tmp_path / "y.ckpt", zipfile.ZIP_STORED, {"byteorder": other}.items()
    )
    with pytest.raises(ValueError, match=rf"numbers in {other.decode()}-endian order, here it is"):
        read_checkpoint(tmp_path / "y.ckpt")


# Files that are no checkpoint, or not that which their name says


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_truncated_anywhere(tmp_path, options):
    torch.save({"state_dict": TENSORS}, tmp_path / "whole.ckpt", **options)
    data = (tmp_path / "whole.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    for length in [0, 1, 3, 4, *range(5, len(data) - 1, len(data) // 40), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"truncated|damaged|empty|text") as refusal:
            read_checkpoint(cut)
        assert str(refusal.value).startswith(f"checkpoint {cut} is ")


def test_safetensors_files_whose_length_looks_like_another_format(tmp_path):
    """The first bytes are the length of the header, a multiple of 8: here those of a pickle."""
    for letters in range(1, 300):
        tensors = {"a" * letters: torch.ones(1)}
        save_file(tensors, tmp_path / "x.safetensors")
        if (tmp_path / "x.safetensors").read_bytes()[0] == pickle.PROTO[0]:
            break
    assert set(read_checkpoint(tmp_path / "x.safetensors")) == set(tensors)
    assert letters < 299


def test_truncated_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    for length in range(1, len(data), 7):
        (tmp_path / "x.safetensors").write_bytes(data[:length])
        # the format shows in the ninth byte
        sentence = "is truncated or no safetensors file" if length > 8 else "is text|is truncated"
        with pytest.raises(ValueError, match=sentence):
            read_checkpoint(tmp_path / "x.safetensors")


CONTENTS = {
    "nothing": ({}, "must hold tensors by name, got nothing"),
    "list": ([torch.ones(1)], "must hold tensors by name, got a list"),
    "number": ({"state_dict": {"a": 3}}, "and nothing else, 'a' is a int"),
    "nested": ({"a": {"b": torch.ones(1)}}, "'a' is a dict"),
    "keys": ({3: torch.ones(1)}, "and nothing else, a name is an object of int"),
    "sparse": ({"a": torch.eye(2).to_sparse()}, "'a' is an object of torch._utils._rebuild_sp"),
    "conjugated": ({"a": torch.tensor([1j]).conj()}, "'a' is an object of a conjugated or negated"),
    "negated": (
        {"a": torch.tensor([1j]).conj().imag},
        "'a' is an object of a conjugated or negated",
    ),
    "module": (torch.nn.ReLU(), r"by name, got an object of torch\.nn\.modules\.activation\.ReLU"),
    "object": ({"state_dict": Options(a=1)}, r"'state_dict' is an object of \S+\.Options"),
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


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return stream.getvalue()


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 7703807346\n"
NO_CHECKPOINTS = {
    "pointer": (POINTER.encode(), "is a Git LFS pointer, a short text in place of the weights"),
    "page": (b"\n<!DOCTYPE html>\n<title>Quota</title>", r"is a web page \(HTML\) and no weights"),
    "page-of-xhtml": (b'<?xml version="1.0"?><html>' + b" " * 600, "is a web page"),
    "text": (b"hello, I am no checkpoint", "is text and no weights; it begins with 'hello, I am"),
    "answer": (b'{"error": "Not found"}', 'is text and no weights; it begins with \'{"error"'),
    "other-text": ("Gewichte für ".encode() * 60, "is text and no weights; .* 'Gewichte für "),
    "empty": (b"", "is empty$"),
    "gzip": (gzip.compress(b"weights"), "is a gzip archive, which has to be unpacked"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "is a GGUF file and no weights"),
    "noise": (bytes(range(255, 128, -1)), "is truncated, damaged or no weight file"),
    "pickle": (pickle.dumps({"a": 1}, 2), "is a pickle but no checkpoint of torch"),
    "zip": (zipped(model__ckpt=b"x"), "is a zip archive but .*, it holds model/ckpt$"),
}


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
@pytest.mark.parametrize("case", NO_CHECKPOINTS)
def test_files_that_are_no_checkpoints(tmp_path, case, name):
    data, sentence = NO_CHECKPOINTS[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=sentence) as refusal:
        read_checkpoint(tmp_path / name)
    assert str(refusal.value).startswith(f"checkpoint {tmp_path / name} is ")
    assert "\n" not in str(refusal.value)


def test_torchscript(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="is a TorchScript program and no checkpoint of tensors"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("write", "name", "kind"),
    [
        (save_file, "x.ckpt", "a safetensors file"),
        (torch.save, "x.safetensors", "a file of torch, a pickle"),
        (functools.partial(torch.save, **OLD), "x.safetensors", "a file of torch, a pickle"),
    ],
    ids=["safetensors", "zip", "legacy"],
)
def test_the_content_counts_not_the_name(tmp_path, write, name, kind, caplog):
    write(TENSORS, tmp_path / "right")
    (tmp_path / "right").rename(tmp_path / name)
    assert_tensors(read_checkpoint(tmp_path / name))
    assert caplog.messages == [f"checkpoint {tmp_path / name} is {kind}, and is read as one"]
