"""Maps on disk: one safetensors file, complete or absent, the same bytes for the same content."""

import json
import os
import secrets
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2am.attribution.joint import JointMaps
from i2am.attribution.layers import SUMS, tensors
from i2am.attribution.maps import AttributionMaps
from i2am.attribution.sums import AttentionSite, LayerSums

SCHEMA = 1
"""Version of the file layout of maps without joint maps."""

JOINT_SCHEMA = 2
"""That of maps with joint maps: what cannot read these says so, and does not leave them out."""

JOINT_SUMS = ("g2r", "r2g")
JOINT_FACTS = ("generated_grid", "reference_grid", "time_groups", "heads", "layers")


def save_maps(maps: AttributionMaps, path: str | Path) -> None:
    """Writes maps to one ``.safetensors`` file that any safetensors reader opens.

    Tensors are named ``<layer number>.<field>``, those of joint maps ``joint.<field>``. A single
    metadata entry, ``i2am``, holds canonical JSON: schema, sites, votes, rows, provenance, the
    grids of joint maps, and dtype, shape and CRC-32 of each tensor. Time and machine are not among
    them, so equal maps give equal bytes, and the file is complete or not there at all. Maps without
    joint maps give files of schema 1.

    Args:
        maps: What to write; moved to the CPU.
        path: Target file; an existing one is replaced.

    Raises:
        ValueError: If the provenance holds something that JSON cannot.
        OSError: If the file cannot be written; nothing is left behind then.
    """
    from safetensors.torch import save

    held = {
        f"{number:03d}.{name}": sums
        for number, layer in enumerate(maps.layer_sums)
        for name, sums in tensors(layer).items()
    }
    joint: dict[str, Any] = {}
    if maps.joint is not None:
        held |= {f"joint.{name}": getattr(maps.joint, name) for name in JOINT_SUMS}
        joint["joint"] = {name: getattr(maps.joint, name) for name in JOINT_FACTS}
    # copies, because tensors of a safetensors file must not share memory
    content = {
        name: sums.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, sums in held.items()
    }
    document: dict[str, Any] = {
        "schema": JOINT_SCHEMA if joint else SCHEMA,
        "sites": [asdict(layer.site) for layer in maps.layer_sums],
        "votes": maps.votes,
        "rows": maps.rows,
        "provenance": maps.provenance,
        "tensors": {name: _summary(sums) for name, sums in content.items()},
        **joint,
    }
    try:
        # through JSON once, because integer keys sort differently after they have become strings
        document = json.loads(json.dumps(document, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance must hold JSON values only: {error}") from error
    # of the description itself: a damaged layer name has no tensor to give it away
    document["checksum"] = zlib.crc32(_canonical(document))
    write_atomically(path, save(content, metadata={"i2am": _canonical(document).decode()}))


def load_maps(path: str | Path) -> AttributionMaps:
    """Reads a file that :func:`save_maps` wrote, onto the CPU.

    Args:
        path: The file.

    Returns:
        The same maps, bit for bit; tuples in the provenance have become lists.

    Raises:
        ValueError: If the file is truncated, damaged, not an i2am file, or written by a newer i2am.
        OSError: If it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = Path(path).read_bytes()
    try:
        content = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    try:
        document = json.loads(header["__metadata__"]["i2am"])
        schema = document["schema"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is a safetensors file, but not one of i2am maps") from error
    if schema not in (SCHEMA, JOINT_SCHEMA):
        raise ValueError(
            f"{path} has schema {schema}, and this i2am reads schemas {SCHEMA} and {JOINT_SCHEMA}; "
            "read it with the version of i2am that wrote it"
        )
    if document.pop("checksum", None) != zlib.crc32(_canonical(document)):
        raise ValueError(f"{path} is damaged: its description does not match its checksum")
    if document["tensors"] != {name: _summary(sums) for name, sums in content.items()}:
        raise ValueError(f"{path} is damaged: a tensor does not match its checksum")
    layers = [
        LayerSums(_site(site), **{name: content.get(f"{number:03d}.{name}") for name in SUMS})
        for number, site in enumerate(document["sites"])
    ]
    return AttributionMaps(
        layers,
        votes=document["votes"],
        rows=document["rows"],
        provenance=document["provenance"],
        joint=_joint(document.get("joint"), content),
    )


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file so that it is complete or unchanged, whatever happens, power loss included.

    The bytes go to a temporary file in the same folder, are flushed to disk, and take the final
    name by renaming. Permissions follow the umask, as for any new file.

    Args:
        path: Target file in an existing folder; an existing file is replaced.
        data: The whole content.

    Raises:
        OSError: If any step fails; the temporary file is removed then.
    """
    path = Path(path)
    temporary = path.with_name(f".i2am-{secrets.token_hex(8)}.tmp")
    file = open(temporary, "xb")
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # BaseException: Ctrl-C must not leave a temporary file either
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _summary(sums: Tensor) -> dict[str, Any]:
    return {
        "crc32": zlib.crc32(sums.numpy().data),
        "dtype": str(sums.dtype),
        "shape": list(sums.shape),
    }


def _joint(facts: dict[str, Any] | None, content: dict[str, Tensor]) -> JointMaps | None:
    if facts is None:
        return None
    facts = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}
    return JointMaps(g2r=content["joint.g2r"], r2g=content["joint.r2g"], **facts)


def _site(fields: dict[str, Any]) -> AttentionSite:
    grids = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return AttentionSite(**{**fields, **grids})
