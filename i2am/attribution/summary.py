"""What ``repr`` says of maps: axes, memory, and one line per layer."""

from typing import TYPE_CHECKING

from i2am.attribution.grid import Grid
from i2am.attribution.layers import tensors
from i2am.attribution.sums import AttentionSite
from i2am.wording import counted

if TYPE_CHECKING:
    from i2am.attribution.maps import AttributionMaps


def summary(maps: "AttributionMaps") -> str:
    """A few lines about maps, for people."""
    sums = [held for layer in maps.layer_sums for held in tensors(layer).values()]
    nbytes = sum(held.nbytes for held in sums) + (maps.joint.nbytes if maps.joint else 0)
    head = (
        f"AttributionMaps: {counted(maps.n_samples, 'sample')}, "
        f"{counted(maps.time_groups, 'time group')}, {counted(len(maps.layers), 'layer')}, "
        f"{nbytes / 2**20:.1f} MiB, guidance {maps.provenance.get('branch', 'unknown')}"
    )
    lines = [
        head,
        f"  directions: {', '.join(maps.directions)}",
        f"  votes: {', '.join(maps.votes)}; rows: {', '.join(maps.rows)}",
        *(f"  {_line(layer.site)}" for layer in maps.layer_sums),
    ]
    if maps.joint is not None:
        layers = counted(len(maps.joint.layers), "layer")
        lines.append(f"  joint: {maps.joint.extent}, mean of {layers}")
    if note := maps.provenance.get("note"):
        lines.append(f"  note: {note}")
    return "\n".join(lines)


def _line(site: AttentionSite) -> str:
    if site.reference_grid is None:
        reference = counted(site.reference_tokens, "token")
    else:
        reference = _by(site.reference_grid)
    merged = f", mean of {counted(len(site.merged), 'layer')}" if site.merged else ""
    return (
        f"{site.layer}: {_by(site.generated_grid)} from {reference}, "
        f"{counted(site.heads, 'head')}{merged}{'' if site.informative else ', informative=False'}"
    )


def _by(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"
