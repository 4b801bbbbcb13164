"""What is recorded of the paper's four systems, and what of it stays in memory.

    python benchmarks/systems.py

Prints a table in Markdown. Every number comes from the full-size networks, built without weights
and called once on torch's meta device: the layers that each pipeline's layout records, the tokens
of their calls, and the bytes that the recorder's own sums take for one sample.
"""

import os
from dataclasses import dataclass

import torch

from i2am.adapters.attention.tap import LayerCall, tap
from i2am.attribution import Accumulator
from i2am.attribution.layers import tensors
from i2am.attribution.sums import AttentionSite
from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout
from i2am.models.base import ReferencePipeline
from i2am.models.conversion import SYSTEMS
from i2am.models.conversion.describing import empty_pipeline

TIME_GROUPS = 5


@dataclass(frozen=True)
class RecordedLayer:
    """One layer at full size."""

    site: AttentionSite
    seqlen_q: int
    seqlen_k: int
    head_dim: int

    @property
    def materialised(self) -> int:
        """Bytes of its attention weights in fp32, of one sample and evaluation."""
        return 4 * self.site.heads * self.seqlen_q * self.seqlen_k


def recorded_layers(pipe: ReferencePipeline, layout: TokenLayout) -> list[RecordedLayer]:
    """The layers that `layout` records, in the order of their calls, at the configured size."""
    found: list[RecordedLayer] = []
    rows, columns = (side // pipe.vae_scale_factor for side in pipe.configured_size)

    def note(call: LayerCall) -> None:
        layer, query, key = call.layer.path, call.query, call.key
        attention = AttentionCall(layer, call.index, query.shape[2], key.shape[2])
        spans = layout.spans(attention, Frame((rows, columns)))
        if spans is None:
            return
        generated, (reference,) = spans.generated, spans.keys_of("reference")
        assert generated.place is not None
        site = AttentionSite(
            layer,
            heads=query.shape[1],
            generated_grid=generated.place,
            reference_grid=reference.place,
            reference_tokens=reference.count,
            informative=reference.count > 1,
        )
        found.append(RecordedLayer(site, query.shape[2], key.shape[2], query.shape[3]))

    tokens = pipe.image_proj.config.tokens if hasattr(pipe, "image_proj") else 1
    # an operator on meta tensors does nothing: tensors are handed over without one
    lent = tap(pipe.unet, layers=layout.matches, listen=note, graph=True)
    with torch.device("meta"), torch.no_grad(), lent:
        sample = torch.empty(1, pipe.unet.config.in_channels, rows, columns)
        context = torch.empty(1, tokens, pipe.unet.config.cross_attention_dim)
        options = {}
        if "hint_channels" in pipe.unet.config:
            options["hint"] = torch.empty(1, pipe.unet.config.hint_channels, rows, columns)
        pipe.unet(sample, torch.tensor(1), encoder_hidden_states=context, **options)
    return found


def kept_bytes(layers: list[RecordedLayer], *, sums: str = "native") -> int:
    """Bytes of all sums of one sample behind a recording with default options."""
    accumulator = Accumulator(time_groups=TIME_GROUPS, sums=sums)
    # resized sums begin with the second evaluation
    for _ in range(2 if sums == "resized" else 1):
        for layer in layers:
            # the width of a head makes no difference to what is kept
            query = torch.zeros(1, layer.site.heads, layer.seqlen_q, 1)
            key = torch.zeros(1, layer.site.heads, layer.seqlen_k, 1)
            beside = layer.seqlen_k - layer.site.reference_tokens
            accumulator.add(
                layer.site, query, key, group=0, reference=slice(beside, layer.seqlen_k)
            )
    return sum(values.nbytes for kept in accumulator.layers() for values in tensors(kept).values())


def table(layers_of: dict[str, list[RecordedLayer]]) -> str:
    """One row per system, in Markdown."""
    lines = [
        "| system | layers | generated grids | heads x width | reference grid | keys "
        '| stays per sample | added up (`sums="resized"`) | softmaxes in full, per step |',
        "| --- " * 9 + "|",
    ]
    for name, layers in layers_of.items():
        counts: dict[tuple[int, int], int] = {}
        for layer in layers:
            counts[layer.site.generated_grid] = counts.get(layer.site.generated_grid, 0) + 1
        grids = ", ".join(f"{n} of {_grid(g)}" for g, n in sorted(counts.items(), reverse=True))
        widths = sorted({layer.head_dim for layer in layers})
        (heads,) = {layer.site.heads for layer in layers}
        reference = {layer.site.reference_grid for layer in layers}
        keys = sorted({layer.seqlen_k for layer in layers})
        if reference == {None}:
            where = "none"
        elif all(layer.site.reference_grid == layer.site.generated_grid for layer in layers):
            where = "the generated one"
        else:
            where = ", ".join(_grid(grid) for grid in reference if grid is not None)
        cells = [
            name,
            str(len(layers)),
            grids,
            f"{heads} x {', '.join(map(str, widths))}",
            where,
            ", ".join(map(str, keys)),
            _size(kept_bytes(layers)),
            _size(kept_bytes(layers, sums="resized")),
            _size(2 * sum(layer.materialised for layer in layers)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _grid(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _size(count: int) -> str:
    unit, shift = ("GiB", 30) if count >= 1 << 30 else ("MiB", 20)
    return f"{count / (1 << shift):.2g} {unit}"


def systems() -> dict[str, list[RecordedLayer]]:
    """The recorded layers of every system, by its name."""
    found = {}
    for name in SYSTEMS:
        pipe = empty_pipeline(name, {})
        found[name] = recorded_layers(pipe, pipe.attribution_layout())
    return found


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(table(systems()))
