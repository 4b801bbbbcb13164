"""Z-Image of several pictures: ``[pieces of text | references and image | pieces of SigLIP]``.

Every piece is padded to a multiple of 32 tokens. The transformer lays out the features of SigLIP
anew, channels before places, so that a token of theirs has no place.
"""

import math
from collections.abc import Iterator
from itertools import count
from typing import Any

from i2am.layouts.joint_tokens import Part, numbered
from i2am.layouts.spans import GENERATED, OTHER, REFERENCE, TEXT
from i2am.layouts.token_layout import Frame

MULTIPLE = 32
MIXED = "references and image were mixed with each other before these layers; "


def patches(latents: Any, frame: Frame) -> tuple[int, ...]:
    """The grid of the patches of ``[channels, frames, height, width]``, one frame left out."""
    given = frame.arguments
    sides = (given.get("f_patch_size") or 1, *(given.get("patch_size") or 2,) * 2)
    grid = tuple(size // side for size, side in zip(latents.shape[1:], sides, strict=True))
    return grid[1:] if grid[0] == 1 else grid


def padded(part: Part) -> Iterator[Part]:
    """A span and its padding to a multiple of 32 tokens; without tokens it is padding alone."""
    name, _, grid = part
    tokens = math.prod(grid)
    yield part
    yield f"{name} padding", OTHER, (-tokens % MULTIPLE if tokens else MULTIPLE,)


def pieces(frame: Frame) -> Iterator[Part]:
    """What the lists of a sample tell of, in order and without padding.

    Raises:
        ValueError: None of its pictures is noisy, or several are.
    """
    given, row = frame.arguments, frame.row
    pictures, noisy = given["x"][row], given["image_noise_mask"][row]
    if sum(noisy) != 1:
        raise ValueError(
            "layout expects image_noise_mask to mark one noisy picture of each sample, got "
            f"{list(noisy)}"
        )
    # each picture has a piece of text before it, the noisy one that of the prompt
    prompt, templates = list(noisy).index(1), count(1)
    for index, text in enumerate(given["cap_feats"][row]):
        name = "text" if index == prompt else f"template {next(templates)}"
        yield name, TEXT if index == prompt else OTHER, (len(text),)
    grids = [(0,) if latents is None else patches(latents, frame) for latents in pictures]
    roles = [GENERATED if noise else REFERENCE for noise in noisy]
    named = numbered(*zip(roles, grids, strict=True))
    yield from named
    features = (given.get("siglip_feats") or [None] * len(given["x"]))[row]
    if features is not None and frame.config.get("siglip_feat_dim") is not None:
        for (name, *_), feature in zip(named, features, strict=True):
            tokens = 0 if feature is None else feature.shape[0] * feature.shape[1]
            yield f"{name} (SigLIP)", REFERENCE, (tokens,)
