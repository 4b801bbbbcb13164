"""What a page knows of one sample: pictures, maps, scores and words, as JSON values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from i2am.attribution.maps import AttributionMaps
from i2am.attribution.pictures import Which, cut_place, region_box, seen
from i2am.attribution.presets import Preset, get_preset
from i2am.attribution.shown import Shown
from i2am.attribution.sources import sources
from i2am.data.arrays import ImageInput, as_pil, masks
from i2am.data.shapes import cut_picture, require_shape
from i2am.plots.titles import head_titles, step_titles
from i2am.viewer.packing import encode, pack
from i2am.viewer.pictures import outline, picture
from i2am.viewer.stacks import Stack, overall_stacks, pair_stacks

if TYPE_CHECKING:
    from PIL.Image import Image

References = ImageInput | Mapping[str, ImageInput] | None
"""The picture of the reference, of several by the name of each, none for words alone."""
Score = Mapping[str, Any]
"""``{"value": float, "reason": None}``, or value None and the reason."""

SCORED = {
    "imacs_g": "r2g",
    "imacs_g_share": "share",
    "imacs_g_mask_votes": "r2g_mask",
    "imacs_r": "g2r_mask",
}
"""The map that each score of a picture is computed from, under the paper's preset."""


@dataclass(frozen=True)
class Source:
    """One of the sources of a sample, which a reader chooses from.

    Attributes:
        reference: Its picture; None for a word.
        mask: White on the object, for its outline and nothing else.
        name: What it is called; empty where there is no other.
        share: What its share goes to, in the title of that map.
        invert: Whether its R2G is drawn as ``1 - map``, where that is a spread.
    """

    reference: "Image | None"
    mask: "Image | None" = None
    name: str = ""
    share: str = "the object"
    invert: bool = False


@dataclass(frozen=True)
class Sample:
    """One generated image with its sources and maps, ready to be packed.

    Attributes:
        id: Names the sample in links; any text, different for every sample of a report.
        generated: The image.
        sources: What the maps are of, at least one; the scores are of the first.
        stacks: Their maps.
        times, heads, layers: Names of the slices "t0", "h0", "l0", ...
        mask: White on what was painted, for its outline and nothing else.
        scores: By name, as ``i2am record`` writes them; computed for whole maps.
        scored: Name of the map of each score that stands beside a picture; where another map is
            shown, the page says what the score is of.
        regions: Declared regions, by their number in "region N": name, box and true place.
        facts: What made the image, in words: model, steps, ...
        notes: Sentences a reader must know.
        normalizations: How often the preset normalizes a map that it draws.

    Raises:
        ValueError: Maps hold NaN or Inf, or a score is neither a finite number nor None with a
            reason.
    """

    id: str
    generated: "Image"
    sources: Sequence[Source]
    stacks: Sequence[Stack]
    times: Sequence[str] = ()
    heads: Sequence[str] = ()
    layers: Sequence[str] = ()
    mask: "Image | None" = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    scored: Mapping[str, str] = field(default_factory=lambda: SCORED)
    regions: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    normalizations: int = 1

    def __post_init__(self) -> None:
        for stack in self.stacks:
            if not bool(stack.maps.isfinite().all()):
                raise ValueError(f"maps must be finite, got NaN or Inf in {stack.name}")
        for name, score in self.scores.items():
            value, reason = score["value"], score["reason"]
            if reason is None if value is None else not math.isfinite(value):
                raise ValueError(
                    f"scores must be finite numbers, or None with a reason, got {value} and reason "
                    f"{reason!r} for {name}"
                )

    def document(self, *, compress: bool = True) -> dict[str, Any]:
        """Everything as JSON values: maps in two payloads, so that overall ones are there first."""
        payloads: dict[str, bytearray] = {"overall": bytearray(), "pairs": bytearray()}
        entries = []
        for stack in self.stacks:
            part = "pairs" if stack.asked else "overall"
            levels = [stack.levels(name) for name in stack.slices]
            entries.append(
                {
                    "name": stack.name,
                    "source": stack.source,
                    "part": part,
                    "offset": len(payloads[part]),
                    "grid": list(stack.maps.shape[-2:]),
                    "asked": list(stack.asked or (1, 1)),
                    "slices": list(stack.slices),
                    "levels": levels,
                }
            )
            payloads[part] += pack(stack.maps, levels)
        return {
            "id": self.id,
            "generated": _outlined(self.generated, self.mask),
            "sources": [
                {
                    "name": source.name,
                    "reference": source.reference and _outlined(source.reference, source.mask),
                    "share": source.share,
                    "invert": source.invert,
                }
                for source in self.sources
            ],
            "times": list(self.times),
            "heads": list(self.heads),
            "layers": list(self.layers),
            "scores": {name: dict(score) for name, score in self.scores.items()},
            "scored": dict(self.scored),
            "regions": [dict(region) for region in self.regions],
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "normalizations": self.normalizations,
            "maps": entries,
            "payloads": {
                part: encode(bytes(data), compress=compress)
                for part, data in payloads.items()
                if data
            },
        }


def sample(
    maps: AttributionMaps,
    *,
    generated: ImageInput,
    reference: References = None,
    index: int = 0,
    id: str = "sample",
    mask: ImageInput | None = None,
    reference_mask: ImageInput | None = None,
    scores: Mapping[str, Score] | None = None,
    truths: Mapping[str, tuple[float, float]] | None = None,
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    preset: str | Preset = "paper",
) -> Sample:
    """What a page shows of one sample of a recording.

    Args:
        maps: The recording; its pair maps, where it has them, let a reader point at any patch.
        generated: The generated image, see `i2am.data.arrays.pictures`. Where the run made a part
            of it alone, or saw a part of the reference, that part is shown.
        reference: The reference image; of several one by the name of each; None for words alone.
        index: Which sample of `maps`.
        id: Its name in links and lists.
        mask: White where the image was painted, see `i2am.data.arrays.masks`; of the generated
            image's shape.
        reference_mask: White on the object in the reference; of its shape.
        scores: ``{name: {"value": float | None, "reason": str | None}}``, as ``scores.json`` has.
        truths: Where declared regions should look, as fractions of the reference's height and
            width.
        facts: What made the image, in words, shown as a list.
        notes: Sentences a reader must know.
        preset: How overall maps are read and drawn.

    Raises:
        ValueError: The maps hold NaN or Inf, a score is neither a finite number nor None with a
            reason, the preset is unknown, an image is none, there are not as many references as
            were recorded, or a mask has another shape or comes with several references.
        IndexError: There is no such sample.
    """
    preset = get_preset(preset)
    generated, mask = _shown(maps, "generated", generated, "mask", mask)
    given = references(maps, reference)
    if reference_mask is not None and len(given) != 1:
        raise ValueError(
            f"reference_mask must belong to one reference, got one for {len(given)} recorded ones"
        )
    # words have none
    pictures: dict[str, tuple[Image | None, Image | None]]
    pictures = dict.fromkeys(maps.sources, (None, None))
    for name, image in given.items():
        pictures[name] = _shown(maps, "reference", image, "reference_mask", reference_mask)
    maps = maps.select(samples=[index])
    if broken := maps.nonfinite():
        raise ValueError(f"maps must be finite, got NaN or Inf in {broken[0]}")
    every = [Shown(maps, preset, source) for source in maps.sources]
    merged = any("layer" not in shown.axes() for shown in every)
    layers = [] if merged else [*dict.fromkeys(layer for one in every for layer in one.layers)]
    stacks = [
        stack for number, one in enumerate(every) for stack in overall_stacks(one, number, layers)
    ]
    regions: list[dict[str, Any]] = []
    for region in maps.regions if any(one.has_g2r for one in every) else ():
        # a place on one of several references is not a place on the others
        place = cut_place((truths or {}).get(region), maps.provenance) if len(given) == 1 else None
        box = region_box(maps.provenance, region)
        regions.append({"name": region, "box": box and list(box), "truth": place and list(place)})
    if maps.pairs is not None:
        stacks += pair_stacks(maps.pairs)

    told = [maps.provenance["note"]] if maps.provenance.get("note") else []
    if not maps.informative:
        told.append("Some layers have a single reference token: their maps show no cause.")
    if maps.frames > 1:
        told.append(f"Maps are the mean over {maps.frames} frames of a video.")
    several = len(every) > 1 or every[0].word
    return Sample(
        id=id,
        generated=generated,
        sources=[
            Source(
                *pictures[one.source],
                one.name if several else "",
                one.aim(one.ways[0].votes if one.ways else "uniform"),
                one.invert,
            )
            for one in every
        ],
        stacks=stacks,
        times=step_titles(maps.time_groups, maps.provenance.get("steps")),
        heads=head_titles(max((one.head_count for one in every if one.alike), default=0)),
        layers=layers,
        mask=mask,
        scores=scores or {},
        scored=SCORED if preset.query_mask else {**SCORED, "imacs_r": "g2r"},
        regions=regions,
        facts=facts or {},
        notes=[*dict.fromkeys([*notes, *told])],
        normalizations=preset.normalizations,
    )


def references(maps: AttributionMaps, reference: References) -> dict[str, Any]:
    """The picture, or pictures, of every recorded reference by its name.

    Raises:
        ValueError: There are not as many as there are references.
    """
    names = sources(maps.layer_sums, "reference")
    if reference is None or isinstance(reference, Mapping):
        given = dict(reference or {})
    else:
        given = {names[0] if len(names) == 1 else "one without a name": reference}
    if given.keys() != set(names):
        raise ValueError(
            "reference must be a picture of every recorded reference, by the names of several; "
            f"recorded: {', '.join(names) or 'none'}; got {', '.join(map(str, given)) or 'none'}"
        )
    return given


def _shown(
    maps: AttributionMaps, which: Which, image: Any, mask_name: str, mask: Any
) -> "tuple[Image, Image | None]":
    """A picture and its mask, as far as the maps lie on them."""
    shown = _only(as_pil(image, which), which)
    outlined = None
    if mask is not None:
        values = _only(masks(mask, mask_name), mask_name)
        size, wanted = (values.shape[0], values.shape[1]), (shown.height, shown.width)
        # a model that squeezed its picture said what that was, and squeezed the mask alike
        known = seen(maps.provenance, which)
        wanted = wanted if known is None or known.size is None else known.size
        require_shape(mask_name, size, f"the {which} image", wanted)
        (outlined,) = as_pil((values > 0.5).cpu().numpy().astype("uint8") * 255, mask_name)
    picture = seen(maps.provenance, which)
    if picture is None or picture.box is None:
        return shown, outlined
    return cut_picture(shown, picture.box), outlined and cut_picture(outlined, picture.box)


def _only(found: list[Any], name: str) -> Any:
    if len(found) != 1:
        raise ValueError(f"{name} must be one image, got {len(found)}")
    return found[0]


def _outlined(image: "Image", mask: "Image | None") -> dict[str, Any]:
    """A picture with the outline of a mask."""
    drawn = picture(image)
    drawn["outline"] = mask and outline(mask, (drawn["width"], drawn["height"]))
    return drawn
