"""Pictures of maps: fast overlays by numpy, and the figures of the paper by matplotlib.

`heat`, `overlay` and `contact_sheet` need no matplotlib and give arrays. The others give a
matplotlib Figure, made without pyplot; matplotlib is the extra ``plots``, imported when one is
called. They take arrays: images uint8 ``[height, width, 3]`` (arrays, tensors, PIL images), and raw
maps on their own grids, as `AttributionMaps` reads them. Maps are brought to [0, 1], resized to
their image and cut at the threshold here (eqs 8 and 9). Several samples or runs become rows of one
figure: a sequence of images, as many maps, and a label for each row.

    figure = i2am.plots.heads(image, maps.reference_to_generated(per="head")[0])
    figure.savefig("heads.png")

Keywords of every figure:

- ``style``: "default" (inferno over the image in grey) or "paper" (jet, image x 0.7 + heat x 0.5).
- ``threshold``: normalized values up to this are left out; None keeps all.
- ``shared``: one scale for all maps of a row, so that they can be compared; where a row has many.
- ``preset``: "paper", "official" or a `Preset`: how often maps are normalized.
- ``heading``: text above the figure.

Errors of every figure:

- ValueError: an argument has the wrong shape, holds NaN or infinite values or does not match
  another in number; the sentence names it.
- ImportError: matplotlib is missing.
"""

from i2am.plots.comparisons import models, time_and_head
from i2am.plots.overlay import contact_sheet, heat, overlay
from i2am.plots.pointing import specific_reference
from i2am.plots.splits import heads, layers, reference_maps, time_groups

__all__ = [
    "contact_sheet",
    "heads",
    "heat",
    "layers",
    "models",
    "overlay",
    "reference_maps",
    "specific_reference",
    "time_and_head",
    "time_groups",
]
