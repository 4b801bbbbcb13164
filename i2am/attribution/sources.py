"""Which layers a reading is of: those of one source, or of all references together."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from i2am.attribution.presets import Preset
from i2am.attribution.sums import LayerSums, Measure


def default_measure(layers: Sequence[LayerSums], preset: Preset) -> Measure:
    """How R2G of some layers is read by default; the published code knows the spread."""
    shared = all(layer.site.measure == "share" for layer in layers)
    return "share" if shared and not preset.clamp_after_grid_resize else "spread"


def sources(layers: Sequence[LayerSums], role: str | None = None) -> tuple[str, ...]:
    """Names of the sources of a role, default of all: references, then words."""
    found = {layer.site.source: layer.site.role for layer in layers}
    return tuple(
        name
        for each in ("reference", "text")
        for name, of in found.items()
        if of == each and role in (None, of)
    )


def of_source(layers: Sequence[LayerSums], source: str) -> list[LayerSums]:
    """The layers of a source.

    Raises:
        ValueError: There is none.
    """
    found = [layer for layer in layers if layer.site.source == source]
    if not found:
        raise ValueError(
            f"source must be a recorded one, got {source!r}; recorded: {', '.join(sources(layers))}"
        )
    return found


def spread_of(
    layers: Sequence[LayerSums], source: str | None, *, masked: bool = False
) -> list[LayerSums]:
    """The layers that R2G reads: those of a source, or of all references together.

    Args:
        layers: All layers.
        source: Its name, None for all references.
        masked: Whether the votes of a mask are read, which belongs to one reference.

    Raises:
        ValueError: The source was not recorded, no reference was, or it has to be named.
    """
    if source is not None:
        found = of_source(layers, source)
        if masked and found[0].site.role != "reference":
            raise ValueError(f"votes='mask' is of a reference, got source={source!r}, a word")
        return found
    references = [layer for layer in layers if layer.site.role == "reference"]
    if not references:
        raise ValueError(
            "source must name what was recorded, which was no reference; recorded: "
            f"{', '.join(sources(layers))}"
        )
    return combined(references)


def received_of(layers: Sequence[LayerSums], source: str | None) -> list[LayerSums]:
    """The layers that G2R reads: those of one reference.

    Raises:
        ValueError: The source was not recorded or is a word, or it has to be named.
    """
    if source is not None:
        found = of_source(layers, source)
        if found[0].site.role != "reference":
            raise ValueError(f"words have no place to look at, got source={source!r}")
        return found
    names = sources(layers, "reference")
    if len(names) != 1:
        raise ValueError(
            "source must name one reference where there is not exactly one; recorded: "
            f"{', '.join(names or sources(layers))}"
        )
    return of_source(layers, names[0])


def combined(references: Sequence[LayerSums]) -> list[LayerSums]:
    """Every layer with the tokens of all references as one source; as they are where it has one.

    Shares add up, and votes of all tokens alike are the mean by the number of tokens.
    """
    layers: dict[str, list[LayerSums]] = {}
    for layer in references:
        layers.setdefault(layer.site.layer, []).append(layer)
    return [each[0] if len(each) == 1 else _together(each) for each in layers.values()]


def _together(layers: Sequence[LayerSums]) -> LayerSums:
    tokens = [layer.site.reference_tokens for layer in layers]
    spreads = [
        layer.reference_to_generated * (count / sum(tokens))
        for layer, count in zip(layers, tokens, strict=True)
        if layer.reference_to_generated is not None
    ]
    # what is multiplied differently is multiplied before it is added
    multipliers = [layer.multiplier for layer in layers]
    alike = all(_same(multiplier, multipliers[0]) for multiplier in multipliers)
    if not alike:
        raise ValueError(
            "source must name one reference where their branches are multiplied differently; "
            f"recorded: {', '.join(layer.site.source for layer in layers)}"
        )
    return replace(
        layers[0],
        site=replace(
            layers[0].site,
            source=", ".join(layer.site.source for layer in layers),
            reference_grid=None,
            reference_tokens=sum(tokens),
            informative=any(layer.site.informative for layer in layers),
        ),
        reference_to_generated=torch.stack(spreads).sum(0) if len(spreads) == len(layers) else None,
        generated_to_reference=None,
        generated_to_reference_conditional=None,
        reference_to_generated_by_key=None,
        attention_share=_total(layer.attention_share for layer in layers),
        attention_norm=_total(layer.attention_norm for layer in layers),
    )


def _total(sums: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of what every layer has, ``None`` where one lacks it."""
    every = list(sums)
    known = [each for each in every if each is not None]
    return torch.stack(known).sum(0) if len(known) == len(every) else None


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
