"""Maps on disk: one safetensors file, complete or absent, the same bytes for the same content."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from i2am.attribution.layers import SUMS, tensors
from i2am.attribution.maps import AttributionMaps
from i2am.attribution.pairs import PairMaps
from i2am.attribution.sums import AttentionSite, LayerSums
from i2am.files import open_regular, require, write

SCHEMA = 3
"""Version of the file layout that is written: with attention shares, counted calls, multipliers and
several sources."""

READABLE = (1, 2, 3)
"""Versions that are read: 1 has neither pair maps nor shares, 2 no shares."""

PAIR_SUMS = ("g2r", "r2g")
_FIELDS: dict[str, type | list[type]] = {
    "sites": list,
    "votes": [str],
    "rows": [str],
    "provenance": dict,
}
_SITE = {"layer": str, "heads": int, "reference_tokens": int, "informative": bool}
PAIR_FACTS = ("generated_grid", "reference_grid", "time_groups", "heads", "layers")


def save_maps(maps: AttributionMaps, path: str | Path) -> None:
    """Writes maps to one ``.safetensors`` file that any safetensors reader opens.

    Tensors are named ``<layer number>.<field>``, those of pair maps ``pairs.<field>``. The
    document, see `i2am.files.container`, holds schema, sites, votes, rows, provenance and the grids
    of pair maps. Time and machine are not among them, so equal maps give equal bytes, and the file
    is complete or not there at all.

    Args:
        maps: What to write; moved to the CPU.
        path: Target file; an existing one is replaced.

    Raises:
        ValueError: If the provenance holds something that JSON cannot.
        OSError: If the file cannot be written; nothing is left behind then.
    """
    from i2am.files.container import pack

    content = {
        f"{number:03d}.{name}": sums
        for number, layer in enumerate(maps.layer_sums)
        for name, sums in tensors(layer).items()
    }
    content |= {
        f"{number:03d}.multiplier": layer.multiplier
        for number, layer in enumerate(maps.layer_sums)
        if layer.multiplier is not None
    }
    pairs: dict[str, Any] = {}
    if maps.pairs is not None:
        content |= {f"pairs.{name}": getattr(maps.pairs, name) for name in PAIR_SUMS}
        pairs["pairs"] = {name: getattr(maps.pairs, name) for name in PAIR_FACTS}
    document = {
        "schema": SCHEMA,
        "sites": [asdict(layer.site) for layer in maps.layer_sums],
        "votes": maps.votes,
        "rows": maps.rows,
        "provenance": maps.provenance,
        **pairs,
    }
    try:
        pieces = [*pack(content, document)]
    except ValueError as error:
        raise ValueError(f"provenance must hold JSON values only: {error}") from error
    write(path, pieces)


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
    from i2am.files.container import read_container

    with open_regular(path) as file:
        container = read_container(file, path)
        document = container.document
        require(document, str(path), {"schema": int})
        if document["schema"] not in READABLE:
            raise ValueError(
                f"{path} has schema {document['schema']}, and this i2am reads schemas 1 to "
                f"{SCHEMA}; read it with the version of i2am that wrote it"
            )
        require(document, str(path), _FIELDS)
        content = container.load_all(file)
    try:
        document, content = _renamed(document, content)
        layers = [
            LayerSums(
                _site(site),
                **{name: content.get(f"{number:03d}.{name}") for name in (*SUMS, "multiplier")},
            )
            for number, site in enumerate(document["sites"])
        ]
        return AttributionMaps(
            layers,
            votes=document["votes"],
            rows=document["rows"],
            provenance=document["provenance"],
            pairs=_pairs(document.get("pairs"), content),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _renamed(
    document: dict[str, Any], content: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What earlier schemas say, in the words of this one."""
    if document["schema"] == SCHEMA:
        return document, content
    sites = [
        {"informative" if name == "causal" else name: value for name, value in site.items()}
        | {"tags": [*tags_by_path(str(site["layer"]), *site.get("merged", []))]}
        for site in document["sites"]
    ]
    said = {
        "branch" if name == "guidance" else name: value
        for name, value in document["provenance"].items()
    }
    content = {name.replace("joint.", "pairs."): held for name, held in content.items()}
    today = {"sites": sites, "provenance": said, "pairs": document.get("joint")}
    return document | today, content


def tags_by_path(*layers: str) -> tuple[str, ...]:
    """What layouts call layers, by the paths that are all that earlier schemas know of them."""
    blocks = [
        re.match(r"warp_blocks\.(\d+)\.|(.+\.)?mid(dle)?_block(\.|$)", layer) for layer in layers
    ]
    return tuple(sorted({f"warp:{block[1]}" if block[1] else "mid" for block in blocks if block}))


def _pairs(facts: dict[str, Any] | None, content: dict[str, Tensor]) -> PairMaps | None:
    if facts is None:
        return None
    facts = {name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}
    return PairMaps(g2r=content["pairs.g2r"], r2g=content["pairs.r2g"], **facts)


def _site(fields: Any) -> AttentionSite:
    require(fields, "a site", _SITE)
    grids = {name: fields[name] for name in ("generated_grid", "reference_grid")}
    for name, grid in grids.items():
        if grid is None and name == "reference_grid":
            continue
        if not isinstance(grid, list) or [*map(type, grid)] != [int, int]:
            raise ValueError(f"{name} must be a height and a width, got {grid!r}")
        grids[name] = tuple(grid)
    names = {name: fields.get(name, []) for name in ("merged", "tags")}
    require(names, "a site", {"merged": [str], "tags": [str]})
    require({"alone": fields.get("alone", False)}, "a site", {"alone": bool})
    frames, role = fields.get("frames", 1), fields.get("role", "reference")
    if type(frames) is not int or frames < 1 or role not in ("reference", "text"):
        raise ValueError(f"a site must have frames and a role, got {frames!r} and {role!r}")
    if fields.get("measure", "spread") not in ("share", "spread"):
        raise ValueError(f"measure must be share or spread, got {fields['measure']!r}")
    if not isinstance(fields.get("source", "reference"), str):
        raise ValueError(f"source must be a name, got {fields['source']!r}")
    grids |= {name: tuple(given) for name, given in names.items()}
    return AttentionSite(**{**fields, **grids})
