"""Tiny joint transformers with random weights in their pipelines.

One token of each shows 4x4 pixels.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)
from PIL import Image
from torch import Tensor, nn

HEIGHT, WIDTH = 20, 28  # 5x7 tokens
WIDE, TALL = (12, 24), (28, 8)  # pictures of 3x6 and of 7x2 tokens
HEADS, HEAD_DIM = 2, 16
INNER = HEADS * HEAD_DIM
CLIP_TOKENS = 8  # of the tiny SD3, instead of 77


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass
class Tiny:
    """A pipeline and what it is called with."""

    pipe: Any
    inputs: dict[str, Any]

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.transformer

    def __call__(self, **more: Any) -> Any:
        return self.pipe(**self.inputs | more)


def _vae(**options: Any) -> diffusers.AutoencoderKL:
    """Two levels: a latent shows 2x2 pixels."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.06,
        scaling_factor=1.5,
        **options,
    )


def _euler(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


FLUX = {
    "dev": "FluxPipeline",
    "adapter": "FluxPipeline",
    "img2img": "FluxImg2ImgPipeline",
    "inpaint": "FluxInpaintPipeline",
    "fill": "FluxFillPipeline",
    "control": "FluxControlPipeline",
    "kontext": "FluxKontextPipeline",
    "kontext adapter": "FluxKontextPipeline",
    "kontext inpaint": "FluxKontextInpaintPipeline",
}
WITH_ADAPTERS = ("dev", "adapter", "img2img", "inpaint", "kontext", "kontext adapter")
FLUX_TEXT = 6


def _flux(kind: str = "dev", **transformer: Any) -> Tiny:
    channels = {"fill": 48, "control": 32}.get(kind, 16)
    net = diffusers.FluxTransformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": channels,
            "out_channels": 16,
            "num_layers": 2,
            "num_single_layers": 1,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
        }
        | transformer
    ).eval()
    nothing = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    if kind in WITH_ADAPTERS or kind == "kontext inpaint":
        nothing += ("image_encoder", "feature_extractor")
    pipe = getattr(diffusers, FLUX[kind])(
        scheduler=_euler(),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False),
        transformer=net,
        **dict.fromkeys(nothing),
    )
    inputs: dict[str, Any] = {
        "prompt_embeds": normal(1, FLUX_TEXT, 32),
        "pooled_prompt_embeds": normal(1, 32),
    }
    own, mask = picture(HEIGHT, WIDTH), picture(HEIGHT, WIDTH, 1).convert("L")
    if "kontext" in kind:
        inputs |= {"max_area": HEIGHT * WIDTH, "_auto_resize": False}
        inputs["image"] = picture(*WIDE)
    if kind == "kontext inpaint":
        inputs |= {"image": own, "mask_image": mask, "image_reference": picture(*WIDE)}
    if kind in ("fill", "inpaint"):
        inputs |= {"image": own, "mask_image": mask}
    if kind == "img2img":
        inputs["image"] = own
    if kind == "control":
        inputs["control_image"] = own
    if kind in ("inpaint", "img2img", "kontext inpaint"):
        inputs["strength"] = 1.0
    if "adapter" in kind:
        _add_flux_adapters(net)
        images = [normal(1, 1, 20, seed=seed) for seed in range(4)]
        inputs |= {
            "ip_adapter_image_embeds": images[:2],
            "negative_ip_adapter_image_embeds": images[2:],
        }
    return _sized(pipe, inputs)


def _add_flux_adapters(net: nn.Module, tokens: tuple[int, ...] = (4, 3)) -> None:
    net.set_attn_processor(
        {
            name: old
            if name.startswith("single")
            else FluxIPAdapterAttnProcessor(INNER, 32, num_tokens=tokens, scale=[0.7, 0.5])
            for name, old in net.attn_processors.items()
        }
    )
    net.encoder_hid_proj = MultiIPAdapterImageProjection(
        [ImageProjection(20, 32, num_image_text_embeds=count) for count in tokens]
    )


def _chroma() -> Tiny:
    net = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()
    pipe = diffusers.ChromaPipeline(
        scheduler=_euler(),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False),
        transformer=net,
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(1, FLUX_TEXT)
    mask[:, -2:] = 0
    inputs = {
        "prompt_embeds": normal(1, FLUX_TEXT, 32),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": normal(1, FLUX_TEXT - 2, 32, seed=1),
        "negative_prompt_attention_mask": mask[:, 2:],
    }
    return _sized(pipe, inputs)


FLUX2 = {
    "dev": "Flux2Pipeline",
    "klein": "Flux2KleinPipeline",
    "klein inpaint": "Flux2KleinInpaintPipeline",
    "klein kv": "Flux2KleinKVPipeline",
}
FLUX2_TEXT = 5


def _flux2(kind: str = "klein", references: tuple[tuple[int, int], ...] = (WIDE, TALL)) -> Tiny:
    net = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=kind == "dev",
    ).eval()
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    pipe = getattr(diffusers, FLUX2[kind])(
        scheduler=_euler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=net,
        **({} if kind == "dev" else {"is_distilled": kind == "klein kv"}),
    )
    # its sides may be shorter than the 64 pixels that published models need
    pipe.image_processor.check_image_input = lambda *args, **kwargs: None
    images = [picture(*size, seed=index) for index, size in enumerate(references)] or None
    inputs: dict[str, Any] = {"prompt_embeds": normal(1, FLUX2_TEXT, 24)}
    if kind in ("klein", "klein inpaint"):
        inputs |= {
            "negative_prompt_embeds": normal(1, FLUX2_TEXT + 2, 24, seed=1),
            "guidance_scale": 3.0,
        }
    if kind == "klein inpaint":
        mask = picture(HEIGHT, WIDTH, 1).convert("L")
        inputs |= {"image": picture(HEIGHT, WIDTH), "mask_image": mask, "strength": 1.0}
        inputs["image_reference"] = images
    else:
        inputs["image"] = images
    return _sized(pipe, inputs)


QWEN = {
    "text": "QwenImagePipeline",
    "edit": "QwenImageEditPipeline",
    "edit plus": "QwenImageEditPlusPipeline",
}
QWEN_TEXT, QWEN_CHANNELS = 7, 4


def _qwen_transformer(**options: Any) -> diffusers.QwenImageTransformer2DModel:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * QWEN_CHANNELS,
        out_channels=QWEN_CHANNELS,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        axes_dims_rope=(8, 4, 4),
        **options,
    ).eval()


def _qwen(kind: str = "edit plus", *, guidance: bool = True, padded: bool = False) -> Tiny:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=QWEN_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * QWEN_CHANNELS,
        latents_std=[1.0] * QWEN_CHANNELS,
    ).eval()
    pipe = getattr(diffusers, QWEN[kind])(
        scheduler=_euler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=_qwen_transformer(zero_cond_t=kind == "edit plus"),
        **({} if kind == "text" else {"processor": None}),
    )
    mask = torch.ones(1, QWEN_TEXT, dtype=torch.long)
    if padded:
        mask[:, -2:] = 0
    inputs: dict[str, Any] = {
        "prompt_embeds": normal(1, QWEN_TEXT, 24),
        "prompt_embeds_mask": mask,
        "true_cfg_scale": 3.0 if guidance else 1.0,
    }
    if guidance:
        inputs |= {
            "negative_prompt_embeds": normal(1, QWEN_TEXT - 3, 24, seed=1),
            "negative_prompt_embeds_mask": torch.ones(1, QWEN_TEXT - 3, dtype=torch.long),
        }
    if kind == "edit":
        inputs["image"] = picture(64, 32)
    if kind == "edit plus":
        inputs["image"] = [picture(32, 64), picture(64, 32)]
    return _sized(pipe, inputs)


@pytest.fixture
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's pipelines make references of some 32x64 pixels instead of a million."""
    for module in (
        pipeline_qwenimage_edit,
        pipeline_qwenimage_edit_inpaint,
        pipeline_qwenimage_edit_plus,
    ):
        whole = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda _, ratio, whole=whole: whole(32 * 64, ratio)
        )


SD3_TEXT = 12


def _sd3(adapter: bool = False) -> Tiny:
    net = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        caption_projection_dim=INNER,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    nothing = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in SUFFIXES]
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=net, scheduler=_euler(), vae=_vae(), **dict.fromkeys(nothing)
    )
    pipe.tokenizer_max_length = CLIP_TOKENS
    inputs = {
        "prompt_embeds": normal(1, SD3_TEXT, 32),
        "pooled_prompt_embeds": normal(1, 24),
        "negative_prompt_embeds": normal(1, SD3_TEXT, 32, seed=1),
        "negative_pooled_prompt_embeds": normal(1, 24, seed=1),
    }
    if adapter:
        _add_sd3_adapter(net)
        images = torch.cat([torch.zeros(1, 9, 20), normal(1, 9, 20)])
        inputs["ip_adapter_image_embeds"] = images
    return _sized(pipe, inputs)


SUFFIXES = ("", "_2", "_3")
SD3_ADAPTER_TOKENS = 6


def _add_sd3_adapter(net: nn.Module) -> None:
    net.set_attn_processor(
        {
            name: old
            if name.endswith("attn2.processor")
            else SD3IPAdapterJointAttnProcessor2_0(INNER, 32, HEAD_DIM, timesteps_emb_dim=40)
            for name, old in net.attn_processors.items()
        }
    )
    net.image_proj = IPAdapterTimeImageProjection(
        embed_dim=20,
        output_dim=32,
        hidden_dim=40,
        depth=1,
        dim_head=8,
        heads=2,
        num_queries=SD3_ADAPTER_TOKENS,
        timestep_in_dim=32,
    )


ZIMAGE_TEXTS = (7, 40)


def _zimage(**transformer: Any) -> Tiny:
    settings = {
        "in_channels": 4,
        "dim": INNER,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6],
        "axes_lens": [256, 64, 64],
    }
    net = diffusers.ZImageTransformer2DModel(**settings | transformer).eval()
    pipe = diffusers.ZImagePipeline(
        scheduler=_euler(), vae=_vae(), text_encoder=None, tokenizer=None, transformer=net
    )
    positive, negative = ZIMAGE_TEXTS
    inputs = {
        "prompt_embeds": [normal(positive, 24)],
        "negative_prompt_embeds": [normal(negative, 24, seed=1)],
    }
    return _sized(pipe, inputs)


def _sized(pipe: Any, inputs: dict[str, Any]) -> Tiny:
    pipe.set_progress_bar_config(disable=True)
    sizes = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent"}
    return Tiny(pipe, sizes | inputs)


BUILDERS: dict[str, Callable[..., Any]] = {
    "flux": _flux,
    "chroma": _chroma,
    "flux2": _flux2,
    "qwen": _qwen,
    "qwen transformer": _qwen_transformer,
    "sd3": _sd3,
    "zimage": _zimage,
}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """``tiny(family, ...)``: a pipeline with random weights, the same each time."""

    def make(family: str, *args: Any, **options: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return BUILDERS[family](*args, **options)

    return functools.cache(make)
