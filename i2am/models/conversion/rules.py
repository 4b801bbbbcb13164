"""Where each tensor of a published checkpoint goes: system and name in, component and name out."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from i2am.models.conversion import encoders, flat, ldm

SYSTEMS = ("paint-by-example", "dci-vton", "stableviton", "custom")

BUFFERS = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod "
    "posterior_variance posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2"
).split()
"""Of the noise schedule; the scheduler of the folder computes them anew."""

_LDM_DROPPED = "|".join([*BUFFERS, r"cond_stage_model\..*\.position_ids"])
DROPPED: Mapping[str, re.Pattern[str]] = {
    "paint-by-example": re.compile(_LDM_DROPPED),
    # the network of the training loss
    "dci-vton": re.compile(rf"{_LDM_DROPPED}|vgg\.conv\d_\d\.(weight|bias)"),
    # a layer that is never called
    "stableviton": re.compile(rf"{_LDM_DROPPED}|logvar|lastzc\.(weight|bias)"),
    "custom": re.compile("(?!)"),
    # a file of the autoencoder alone; the loss it was trained with
    "vae": re.compile(r"loss\..+"),
}
"""By system (or "vae"): the whole names of tensors that are left out, and no others."""

# of torch.compile, data parallelism, FSDP and activation checkpointing
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclass(frozen=True)
class Target:
    """A tensor of the converted folder.

    Args:
        component: Name of the component.
        key: Name in its state dict.
        part: Which of the equal `parts` of the source's rows it is.
        parts: 1, or the number of projections that the source fuses.
        matrix: Whether the source may be a 1x1 convolution of which the rows and columns stay.
    """

    component: str
    key: str
    part: int = 0
    parts: int = 1
    matrix: bool = False

    def shape_of(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this tensor, for the shape of the source."""
        shape = (source[0] // self.parts, *source[1:]) if self.parts > 1 and source else source
        return shape[:2] if self.matrix and shape[2:] == (1, 1) else shape

    def of(self, source: Tensor) -> Tensor:
        """This tensor, a view of the source, whose rows `parts` must divide."""
        rows = source.chunk(self.parts)[self.part] if self.parts > 1 else source
        return rows.reshape(self.shape_of(tuple(source.shape)))


def component_of(system: str, key: str) -> tuple[Target, ...] | None:
    """Where a tensor of a checkpoint goes.

    Args:
        system: One of `SYSTEMS`, or "vae" for a file that holds an autoencoder alone.
        key: Its name in the checkpoint, with or without the wrappers' parts, see `unwrapped`.

    Returns:
        Its targets, several for a fused projection; none if it is left out on purpose; None if
        the system has no such tensor.

    Raises:
        ValueError: `system` is unknown.
    """
    if system not in _RULES:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {system!r}")
    key = unwrapped(key)
    if DROPPED[system].fullmatch(key):
        return ()
    for prefix, targets in _RULES[system].items():
        if key.startswith(prefix):
            return targets(key.removeprefix(prefix)) or None
    return None


def unwrapped(key: str) -> str:
    """A tensor's name in the model itself, without what wrappers add to it while it is trained."""
    return _WRAPPERS.sub("", key)


def convert_tensors(system: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """All tensors by component and new name, in memory; nothing is checked but the names.

    Raises:
        ValueError: A name that the system does not have, or `system` is unknown.
    """
    converted: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        targets = component_of(system, key)
        if targets is None:
            raise ValueError(f"{key} is no tensor of a {system} checkpoint")
        for target in targets:
            converted.setdefault(target.component, {})[target.key] = target.of(tensor)
    return converted


def _targets(component: str, *keys: str | None) -> tuple[Target, ...]:
    return tuple(
        Target(component, key, part, len(keys)) for part, key in enumerate(keys) if key is not None
    )


def _unet(key: str) -> tuple[Target, ...]:
    return _targets("unet", ldm.unet_key(key))


def _warp(key: str) -> tuple[Target, ...]:
    return _targets("unet", f"warp_blocks.{key}")


def _warp_zero_conv(key: str) -> tuple[Target, ...]:
    return _targets("unet", f"warp_zero_convs.{key}")


def _control(key: str) -> tuple[Target, ...]:
    hint = re.fullmatch(r"cond_first_block\.0\.(weight|bias)", key)
    name = f"hint_conv.{hint[1]}" if hint else ldm.unet_key(key)
    return _targets("unet", f"spatial_encoder.{name}") if name else ()


def _vae(*keys: str) -> tuple[Target, ...]:
    names = [ldm.vae_key(key) for key in keys]
    return tuple(
        Target("vae", name, part, len(keys), matrix=ldm.is_vae_attention(name))
        for part, name in enumerate(names)
        if name is not None
    )


def _clip(key: str) -> tuple[Target, ...]:
    return _targets("image_encoder", "model." + key.removeprefix("vision_model."))


def _mapper(key: str) -> tuple[Target, ...]:
    return _targets("image_encoder", *(f"mapper.{name}" for name in encoders.mapper_keys(key)))


def _fixed(component: str, name: str) -> Callable[[str], tuple[Target, ...]]:
    return lambda key: _targets(component, name + key)


def _flat_unet(key: str) -> tuple[Target, ...]:
    return _targets("unet", *map(ldm.unet_key, flat.unet_keys(key)))


def _flat_projection(key: str) -> tuple[Target, ...]:
    return _targets("image_proj", *flat.projection_keys("mlp." + key))


def _flat_vae(half: str) -> Callable[[str], tuple[Target, ...]]:
    return lambda key: _vae(*flat.vae_keys(half + key))


def _dinov2(key: str) -> tuple[Target, ...]:
    return _targets("image_encoder", *encoders.dinov2_keys(key))


_Rules = dict[str, Callable[[str], tuple[Target, ...]]]

# the first prefix that fits decides
_SHARED: _Rules = {
    "model.diffusion_model.": _unet,
    "first_stage_model.": _vae,
    "cond_stage_model.transformer.": _clip,
    "cond_stage_model.mapper.": _mapper,
    "cond_stage_model.final_ln.": _fixed("image_encoder", "final_layer_norm."),
    "proj_out.": _fixed("image_encoder", "proj_out."),
    "learnable_vector": _fixed("image_encoder", "uncond_vector"),
}
_RULES: Mapping[str, _Rules] = {
    "paint-by-example": _SHARED,
    "dci-vton": _SHARED,
    "stableviton": {
        "model.diffusion_model.warp_flow_blks.": _warp,
        "model.diffusion_model.warp_zero_convs.": _warp_zero_conv,
        "control_model.": _control,
        **_SHARED,
    },
    "custom": {
        "diffusion.uncond_vector": _fixed("image_proj", "uncond_vector"),
        "diffusion.": _flat_unet,
        "mlp.": _flat_projection,
        "dinov2.model.": _dinov2,
        "encoder.": _flat_vae("encoder."),
        "decoder.": _flat_vae("decoder."),
    },
    "vae": {"": _vae},
}
