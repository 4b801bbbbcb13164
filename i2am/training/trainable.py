"""Which parameters of a custom model are trained: by name, as the paper's recipe and others say."""

import re
from collections.abc import Mapping

from torch import nn

from i2am.models.custom import CustomPipeline

# every set by component and a regular expression that a parameter's name begins with
_PROJECTION = {"image_proj": r""}  # the learned unconditional context is one of its parameters
SETS: Mapping[str, Mapping[str, str]] = {
    "all": {
        "unet": r"",
        # the encoder's mask token serves a pretraining that is not ours: nothing ever reads it
        "image_encoder": r"(?!embeddings\.mask_token$)",
        **_PROJECTION,
    },
    "paper": {
        "unet": r"conv_in\.|up_blocks\.|conv_norm_out\.|conv_out\.|down_blocks\..*\.attn2\.",
        **_PROJECTION,
    },
    "lite": {"unet": r"conv_in\.|.*\.attn2\.", **_PROJECTION},
}
"""The sets that `select_parameters` knows."""


def select_parameters(pipeline: CustomPipeline, which: str) -> list[tuple[str, nn.Parameter]]:
    """Makes the parameters of a set trainable, and every other one of the pipeline not.

    - ``"all"``: UNet, image encoder and projection; what a model trained from nothing needs.
    - ``"paper"``: the projection, and of the UNet the first convolution, the cross-attention of the
      down blocks, all of the up blocks, and the last norm and convolution.
    - ``"lite"``: the projection, the UNet's first convolution, and its cross-attention everywhere.

    The projection includes the learned unconditional context, which gets a gradient only in steps
    that use it. The autoencoder is never trained here.

    Args:
        pipeline: A custom model of any size.
        which: Name of the set.

    Returns:
        (``"component.parameter"``, parameter) of the set, in the order of the modules.

    Raises:
        ValueError: There is no such set.
    """
    if which not in SETS:
        raise ValueError(f"which must be one of {', '.join(SETS)}, got {which!r}")
    patterns = SETS[which]
    chosen = []
    for component, module in pipeline.components.items():
        if not isinstance(module, nn.Module):
            continue
        for name, parameter in module.named_parameters():
            trained = component in patterns and re.match(patterns[component], name) is not None
            parameter.requires_grad_(trained)
            if trained:
                chosen.append((f"{component}.{name}", parameter))
    return chosen
