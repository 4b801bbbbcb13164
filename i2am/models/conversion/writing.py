"""safetensors files written one tensor after the other: no more than one is held in memory."""

import ctypes
import hashlib
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2am.files.container import header_of
from i2am.models.conversion.rules import Target
from i2am.models.weights import check_finite, is_finite

CHUNK = 1 << 22
MADV_PAGEOUT = 21  # of Linux; Python's mmap has no name for it
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What may be written."""

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Entry:
    """One tensor of the new file.

    Args:
        target: Its name, and which part of the source it is.
        source: A tensor of the checkpoint.
        dtype: Floating dtype to write.
    """

    target: Target
    source: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target.shape_of(tuple(self.source.shape))

    @property
    def size(self) -> int:
        """Bytes in the new file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    path: Path, entries: Sequence[Entry], *, progress: Progress
) -> dict[str, Any]:
    """Writes a new safetensors file: a header of names and places, then tensor after tensor.

    The same tensors give the same bytes, whatever their order.

    Args:
        path: A file that does not exist.
        entries: Its tensors.
        progress: Called with numbers of bytes as they are written.

    Returns:
        Its "sha256" and size in "bytes".

    Raises:
        ValueError: Weights are NaN or infinite, or are beyond the range of the dtype to write. The
            sentence names the tensors; the file remains, and must not be used.
        OSError: The file cannot be written; a part of it may remain.
    """
    digest, size = hashlib.sha256(), 0
    not_finite: dict[str, Entry] = {}
    with path.open("xb", buffering=0) as file:

        def put(data: memoryview) -> None:
            nonlocal size
            digest.update(data)
            size += len(data)
            while data:  # an unbuffered write may take less than it is given
                data = data[file.write(data) :]

        by_name = {entry.target.key: entry for entry in entries}
        facts = [(name, entry.dtype, entry.shape) for name, entry in by_name.items()]
        names, header = header_of(facts, {"format": "pt"})
        put(memoryview(header))
        for entry in (by_name[name] for name in names):
            for piece in _pieces(entry):
                if not is_finite(piece):
                    not_finite[entry.target.key] = entry
                data = piece.view(torch.uint8).numpy().data
                put(data)
                progress(len(data))
    check_finite(
        (
            (f"{at.target.component}.{at.target.key}", at.target.of(at.source), at.dtype)
            for at in not_finite.values()
        ),
        what="the checkpoint",
    )
    return {"sha256": digest.hexdigest(), "bytes": size}


def _pieces(entry: Entry) -> Iterator[Tensor]:
    """The values of a tensor in its new dtype, some rows at a time: no second copy of all of it."""
    values = entry.target.of(entry.source)
    rows = torch.atleast_1d(values)
    at_once = max(CHUNK // max(rows[:1].numel() * entry.dtype.itemsize, 1), 1)
    for some in rows.split(at_once):
        yield some.to(entry.dtype).contiguous().view(-1)
        _let_go(values, until=some)


def _let_go(tensor: Tensor, until: Tensor) -> None:
    """Takes what was read through a mapped file out of memory again, up to some rows.

    The system would do so when memory runs short; until then every page that was read counts as
    ours. Nothing is lost: the pages come back when they are used again.
    """
    if sys.platform != "linux":
        return
    # from the tensor's beginning: the system keeps groups of pages that a range cuts
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = until.data_ptr() + until.nbytes - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_PAGEOUT)
