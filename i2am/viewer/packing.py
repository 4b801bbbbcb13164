"""Maps as bytes for a page: one byte per value, and the range of every map.

A stack of maps is written as fp32 lows, fp32 spans, then the codes, padded to a multiple of four:

    low   [slices, queries]
    span  [slices, queries]            value = low + span * code / levels of the slice
    code  [queries, cells, slices]     slices last: neighbours that resemble each other compress

The largest value of a map is the only one with the highest code, so that a peak stays a peak.
"""

import base64
import gzip
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FINE, MEDIUM, COARSE = 255, 63, 31
"""Codes above zero: of overall maps, of pair maps, and of their time groups and heads."""


def pack(maps: Tensor, levels: Sequence[int]) -> bytes:
    """One stack of maps.

    Args:
        maps: ``[slices, queries, height, width]``, any floating dtype.
        levels: The highest code of every slice, at most 255.

    Returns:
        The bytes described above.

    Raises:
        ValueError: `maps` has another number of axes or holds NaN or Inf.
    """
    if maps.ndim != 4:
        raise ValueError(f"maps must be [slices, queries, height, width], got {list(maps.shape)}")
    values = maps.detach().to("cpu", torch.float32).flatten(2)
    if not bool(values.isfinite().all()):
        raise ValueError("maps must be finite, got NaN or Inf")
    low = values.amin(2, keepdim=True)
    span = values.amax(2, keepdim=True) - low
    top = torch.tensor(list(levels), dtype=torch.float32)[:, None, None]
    codes = ((values - low) / span.where(span > 0, 1) * top).round()
    below = values < low + span
    codes = codes.where(~below, codes.minimum(top - 1)).to(torch.uint8)
    parts = [low.numpy().tobytes(), span.numpy().tobytes()]
    parts.append(codes.permute(1, 2, 0).contiguous().numpy().tobytes())
    blob = b"".join(parts)
    return blob + bytes(-len(blob) % 4)


def encode(data: bytes, *, compress: bool) -> dict[str, Any]:
    """Bytes as a JSON value: base64, of gzip unless `compress` is off.

    Browsers from before 2023 cannot inflate; pages without compression are for those.
    """
    if compress:
        # no name and no time: equal content gives equal pages
        data = gzip.compress(data, compresslevel=6, mtime=0)
    return {"gzip": compress, "base64": base64.b64encode(data).decode()}
