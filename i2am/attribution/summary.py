"""What ``repr`` says of maps: axes, memory, and one line per layer."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from i2am.attribution.grid import Grid
from i2am.attribution.layers import tensors
from i2am.attribution.sources import sources
from i2am.attribution.sums import AttentionSite
from i2am.wording import counted

if TYPE_CHECKING:
    from i2am.attribution.maps import AttributionMaps


def summary(maps: "AttributionMaps") -> str:
    """A few lines about maps, for people."""
    sums = [held for layer in maps.layer_sums for held in tensors(layer).values()]
    nbytes = sum(held.nbytes for held in sums) + (maps.pairs.nbytes if maps.pairs else 0)
    head = (
        f"AttributionMaps: {counted(maps.n_samples, 'sample')}, "
        f"{counted(maps.time_groups, 'time group')}, {counted(len(maps.layers), 'layer')}, "
        f"{nbytes / 2**20:.1f} MiB, branch {maps.provenance.get('branch', 'unknown')}"
    )
    lines = [
        head,
        f"  directions: {', '.join(maps.directions)}",
        f"  votes: {', '.join(maps.votes)}; rows: {', '.join(maps.rows)}",
        *_sources(maps),
        *(f"  {line}" for line in _layers(maps)),
    ]
    if maps.pairs is not None:
        layers = counted(len(maps.pairs.layers), "layer")
        lines.append(f"  pairs: {maps.pairs.extent}, mean of {layers}")
    if note := maps.provenance.get("note"):
        lines.append(f"  note: {note}")
    return "\n".join(lines)


def _sources(maps: "AttributionMaps") -> Iterator[str]:
    """Of what the maps are, where that is not one reference of a picture."""
    references, words = (sources(maps.layer_sums, role) for role in ("reference", "text"))
    if len(references) > 1:
        yield f"  references: {', '.join(references)}"
    if words:
        yield f"  words: {', '.join(words)}"
    if maps.frames > 1:
        yield f"  frames: {maps.frames}"


def _layers(maps: "AttributionMaps") -> Iterator[str]:
    """A line per layer and reference, one for all words of a layer."""
    several = len(sources(maps.layer_sums, "reference")) > 1
    words = Counter(layer.site.layer for layer in maps.layer_sums if layer.site.role == "text")
    for site in (layer.site for layer in maps.layer_sums):
        if site.role == "text":
            if count := words.pop(site.layer, 0):
                yield _line(site, counted(count, "word"))
            continue
        grid = site.reference_grid
        tokens = counted(site.reference_tokens, "token") if grid is None else _by(grid)
        yield _line(site, f"{tokens} of {site.source}" if several else tokens)


def _line(site: AttentionSite, of: str) -> str:
    merged = f", mean of {counted(len(site.merged), 'layer')}" if site.merged else ""
    frames = f"{site.frames} frames of " if site.frames > 1 else ""
    return (
        f"{site.layer}: {frames}{_by(site.generated_grid)} from {of}, "
        f"{counted(site.heads, 'head')}{merged}{'' if site.informative else ', informative=False'}"
    )


def _by(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"
