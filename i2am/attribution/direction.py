"""The two directions of attribution between a generated image and its reference.

With ``S = scale * Q K^T``, queries on the generated grid and keys on the reference grid:

| direction | softmax of S over | mean over | lives on |
| --- | --- | --- | --- |
| ``REFERENCE_TO_GENERATED`` (R2G) | queries | reference keys | generated grid |
| ``GENERATED_TO_REFERENCE`` (G2R) | keys | generated queries | reference grid |

So in R2G each reference token spreads one unit over the generated image, and in G2R each generated
patch spends one unit on the reference.

``specific_reference`` is G2R read for chosen generated patches only.
"""

from enum import StrEnum


class Direction(StrEnum):
    """Which image attribution flows from and which image the map is drawn on."""

    REFERENCE_TO_GENERATED = "reference_to_generated"
    GENERATED_TO_REFERENCE = "generated_to_reference"
