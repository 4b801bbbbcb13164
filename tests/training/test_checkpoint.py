"""Checkpoints: back to the bit, never a damaged one, whole ones whenever the writer is killed."""

import errno
import os
import re
import time
from pathlib import Path

import pytest
import torch

from i2am.files import write
from i2am.files.container import pack
from i2am.training.checkpoint import Checkpoint, last_checkpoint, save_checkpoint


def _checkpoint(step: int) -> Checkpoint:
    weight = torch.nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(step)))
    optimiser = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimiser.step()
    # a transposed tensor is not contiguous, which safetensors refuses
    tensors = {"model": {"weight": weight, "turned": weight.T}, "ema": {"weight": weight * 2}}
    return Checkpoint(step, tensors, optimiser.state_dict(), {"scaler": {"scale": 2.0}})


def _assert_same(found: Checkpoint, wanted: Checkpoint) -> None:
    assert found.step == wanted.step
    assert found.notes == wanted.notes
    assert found.tensors.keys() == wanted.tensors.keys()
    for file, tensors in wanted.tensors.items():
        assert found.tensors[file].keys() == tensors.keys()
        for name, values in tensors.items():
            assert torch.equal(found.tensors[file][name], values)
    assert found.optimiser["param_groups"] == wanted.optimiser["param_groups"]
    for name, values in wanted.optimiser["state"][0].items():
        assert torch.equal(found.optimiser["state"][0][name], values)


def test_back_to_the_bit(tmp_path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    save_checkpoint(tmp_path, _checkpoint(20), keep=2)
    found = last_checkpoint(tmp_path)
    assert found is not None
    _assert_same(found, _checkpoint(20))


def test_the_last_ones_are_kept(tmp_path) -> None:
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, _checkpoint(step), keep=2)
    assert sorted(os.listdir(tmp_path)) == [f"checkpoint-000000{n}.safetensors" for n in (15, 20)]
    # the same step again replaces it
    save_checkpoint(tmp_path, _checkpoint(20), keep=2)
    assert sorted(os.listdir(tmp_path)) == [f"checkpoint-000000{n}.safetensors" for n in (15, 20)]


def _flip_a_tensor(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _flip_the_description(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"scale", b"scape", 1))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _maps(path: Path) -> None:
    write(path, pack({}, {"schema": 1, "sites": []}))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _pickle(path: Path) -> None:
    torch.save({"state": print}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip_a_tensor, "is damaged: the tensor .* does not match its checksum"),
        (_flip_the_description, "is damaged: its description does not match"),
        (_cut, "is truncated or damaged"),
        (_maps, "is damaged: it has no step"),
        (_pipe, "must be a regular file"),
        (_pickle, "is truncated or not a safetensors file"),
    ],
)
def test_a_damaged_one_is_passed_over(tmp_path, caplog, damage, message) -> None:
    for step in (5, 10):
        save_checkpoint(tmp_path, _checkpoint(step), keep=2)
    damage(tmp_path / "checkpoint-00000010.safetensors")
    found = last_checkpoint(tmp_path)
    assert found is not None
    _assert_same(found, _checkpoint(5))
    assert re.search(rf"checkpoint-00000010\.safetensors {message}", caplog.text)
    # and a new one can be written in its place
    save_checkpoint(tmp_path, _checkpoint(10), keep=2)
    assert last_checkpoint(tmp_path).step == 10


def test_a_failed_write_leaves_the_earlier_ones(tmp_path, monkeypatch) -> None:
    save_checkpoint(tmp_path, _checkpoint(5), keep=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, _checkpoint(10), keep=1)
    assert os.listdir(tmp_path) == ["checkpoint-00000005.safetensors"]


WRITER = """
import sys, torch
from pathlib import Path
from i2am.training.checkpoint import Checkpoint, save_checkpoint
folder = Path(sys.argv[1])
print("ready", flush=True)
for step in range(int(sys.argv[2]), 10**6):
    tensors = {"model": {"weight": torch.full((50_000,), float(step))}}
    checkpoint = Checkpoint(step, tensors, {"state": {}, "param_groups": []}, {})
    save_checkpoint(folder, checkpoint, keep=2)
    print(step, flush=True)
"""


def test_killed_at_any_moment_a_whole_one_is_left(fork, tmp_path) -> None:
    step = 0
    for wait in (0.05, 0.11, 0.16, 0.23):
        writer = fork(WRITER, tmp_path, step)
        assert writer.stdout.readline() == "ready\n"
        first = int(writer.stdout.readline())
        time.sleep(wait)
        writer.kill()
        printed = [first, *map(int, writer.communicate()[0].split())]
        found = last_checkpoint(tmp_path)
        # what was reported as written is there; what was being written may be
        assert found.step in (printed[-1], printed[-1] + 1)
        assert torch.equal(
            found.tensors["model"]["weight"], torch.full((50_000,), float(found.step))
        )
        step = found.step + 1
