"""Checkpoints with random damage: right tensors or one sentence, nothing else."""

import functools
import logging
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from i2am.models.conversion import read_checkpoint

TENSORS = {
    "model.a": torch.arange(6.0).reshape(2, 3),
    "model.b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.arange(40.0).half()[3:30:2],
}


def deflated(tensors, file):
    torch.save(tensors, file)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


WRITERS = {
    "zip": torch.save,
    "deflated": deflated,
    "legacy": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "safetensors": lambda tensors, file: save_file(
        {name: values.contiguous() for name, values in tensors.items()}, file
    ),
}
# where a checksum stands for every byte that is used
CHECKED = ("zip", "deflated")


@functools.cache
def written(kind):
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[kind](TENSORS, Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


@st.composite
def damages(draw):
    """A function of the file's bytes: some cut, flipped, replaced, put in or taken out."""
    place = st.floats(0, 1, exclude_max=True)
    kinds = draw(st.lists(st.sampled_from(["cut", "flip", "set", "put", "take"]), min_size=1))
    steps = [(kind, draw(place), draw(st.binary(min_size=1, max_size=9))) for kind in kinds[:4]]

    def damage(data):
        for kind, where, values in steps:
            at = int(where * len(data))
            if kind == "cut":
                data = data[:at]
            elif kind == "flip" and data:
                data = data[:at] + bytes([data[at] ^ 1 << values[0] % 8]) + data[at + 1 :]
            elif kind == "set":
                data = data[:at] + values + data[at + len(values) :]
            elif kind == "put":
                data = data[:at] + values + data[at:]
            else:
                data = data[:at] + data[at + len(values) :]
        return data

    return damage


def check(kind, damage):
    whole = written(kind)
    data = damage(whole)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"x.{'safetensors' if kind == 'safetensors' else 'ckpt'}"
        file.write_bytes(data)
        try:
            found = read_checkpoint(file)
        except ValueError as error:
            sentence = str(error)
            assert sentence.startswith(f"checkpoint {file} ")
            assert "\n" not in sentence
            return
        values = {name: tensor.tolist() for name, tensor in found.items()}
    if kind in CHECKED:
        assert values == {name: tensor.tolist() for name, tensor in TENSORS.items()}
        assert all(found[name].dtype == TENSORS[name].dtype for name in TENSORS)
    else:
        # no checksums: what is read lies in the file at least
        assert sum(tensor.untyped_storage().nbytes() for tensor in found.values()) <= len(data)


@pytest.mark.parametrize("kind", WRITERS)
@settings(derandomize=True, max_examples=150)
@given(damage=damages())
def test_random_damage(kind, damage):
    logging.getLogger("i2am").disabled = True
    try:
        check(kind, damage)
    finally:
        logging.getLogger("i2am").disabled = False


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=10_000)
@given(damage=damages())
def test_much_random_damage(kind, damage):
    check(kind, damage)


def check_bits(kind, places):
    for at in places:
        for bit in range(8):
            check(kind, lambda data: data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])  # noqa: B023


@pytest.mark.parametrize("kind", CHECKED)
def test_every_bit_of_an_archive_s_end(kind):
    size = len(written(kind))
    check_bits(kind, range(size - 110, size))


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_every_bit(kind):
    check_bits(kind, range(len(written(kind))))
