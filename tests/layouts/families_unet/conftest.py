"""Whole pipelines with tiny random weights, and what their attention layers were called with."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    PaintByExamplePipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from i2am.layouts import AttentionCall, Frame, Sequences, TokenLayout

CONTEXT = 32
PROMPT = "a red zebra on the shirt"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int = 24, width: int = 40, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def make_unet(channels: int = 4, context: int = CONTEXT, **options: Any) -> UNet2DConditionModel:
    """Two levels with attention, and one without."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": channels,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 4,
        "cross_attention_dim": context,
        "attention_head_dim": 2,  # historic name: 2 heads
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**settings, **options}).eval()


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def make_tokenizer() -> CLIPTokenizer:
    """Knows the letters, with and without the end of a word behind them."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate([*tokens, *specials])}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[], model_max_length=77, pad_token="<|endoftext|>"
    )


def make_text_encoder(cls: Any = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        hidden_size=CONTEXT,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=60,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return cls(config).eval()


def make_image_encoder(cls: Any = CLIPVisionModelWithProjection, patch: int = 4) -> dict[str, Any]:
    """A class token and 4x4 patches, or as many as 16 pixels have."""
    config = CLIPVisionConfig(
        hidden_size=20,
        projection_dim=12,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=16,
        patch_size=patch,
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    return {"image_encoder": cls(config).eval(), "feature_extractor": processor}


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(cls: Any = StableDiffusionPipeline, **modules: Any) -> Any:
    """Any of the Stable Diffusion 1.x pipelines, with what that one needs."""
    torch.manual_seed(0)
    channels = {StableDiffusionInpaintPipeline: 9, StableDiffusionInstructPix2PixPipeline: 8}
    unet = make_unet(channels.get(cls, 4))
    if cls is StableDiffusionControlNetPipeline:
        modules["controlnet"] = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(8, 8)
        )
    if cls is StableDiffusionAdapterPipeline:
        modules["adapter"] = T2IAdapter(
            in_channels=3, channels=(16, 32, 32), num_res_blocks=1, downscale_factor=2
        )
    else:
        modules = {**make_image_encoder(), **modules}
    settings = {
        "vae": make_vae(),
        "text_encoder": make_text_encoder(),
        "tokenizer": make_tokenizer(),
        "unet": unet,
        "scheduler": make_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return quiet(cls(**{**settings, **modules}))


def stable_diffusion_arguments(cls: Any, height: int = 24, width: int = 40) -> dict[str, Any]:
    given: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent"}
    image = picture(height, width)
    if cls is not StableDiffusionPipeline:
        given["image"] = image
    if cls is StableDiffusionInpaintPipeline:
        given["mask_image"] = image.convert("L")
    if cls is StableDiffusionImg2ImgPipeline:
        given["strength"] = 1.0
    if cls not in (StableDiffusionImg2ImgPipeline, StableDiffusionInstructPix2PixPipeline):
        given |= {"height": height, "width": width}
    return given


def sdxl(cls: Any = StableDiffusionXLPipeline, **modules: Any) -> Any:
    torch.manual_seed(0)
    unet = make_unet(
        context=2 * CONTEXT,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    settings = {
        "vae": make_vae(),
        "text_encoder": make_text_encoder(),
        "text_encoder_2": make_text_encoder(CLIPTextModelWithProjection),
        "tokenizer": make_tokenizer(),
        "tokenizer_2": make_tokenizer(),
        "unet": unet,
        "scheduler": make_scheduler(),
        "add_watermarker": False,
    }
    return quiet(cls(**{**settings, **modules}))


def add_ip_adapters(pipe: Any, *kinds: str) -> Any:
    """Adapters, "base" of 4 tokens or "full" of a class token and 4x4 patches, as loaded ones."""
    unet, tokens = pipe.unet, {"base": 4, "full": 17}
    context = unet.config.cross_attention_dim
    torch.manual_seed(3)
    projections = [
        ImageProjection(12, context, num_image_text_embeds=4)
        if kind == "base"
        else IPAdapterFullImageProjection(20, context)
        for kind in kinds
    ]
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        processors[name] = AttnProcessor2_0()
        if name.endswith("attn2.processor"):
            counts = [tokens[kind] for kind in kinds]
            processors[name] = IPAdapterAttnProcessor2_0(width, context, counts)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    unet.eval()
    return pipe


def paint_by_example() -> Any:
    torch.manual_seed(0)
    modules = make_image_encoder()
    config = modules["image_encoder"].config
    config.num_hidden_layers = 4  # its mapper has a fifth as many
    modules["image_encoder"] = PaintByExampleImageEncoder(config, proj_size=CONTEXT).eval()
    return quiet(
        PaintByExamplePipeline(
            vae=make_vae(),
            unet=make_unet(9),
            scheduler=make_scheduler(),
            safety_checker=None,
            requires_safety_checker=False,
            **modules,
        )
    )


class SkipAttnProcessor(nn.Module):
    """What CatVTON puts in place of cross-attention."""

    def forward(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class CatVTONPipeline:
    """No diffusers pipeline, as the authors' is none: person and garment on one canvas."""

    axis, channels = -2, 9

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.noise_scheduler, self.vae, self.unet = make_scheduler(), make_vae(), None
        self.unet = make_unet(self.channels)
        processors = {
            name: SkipAttnProcessor() if name.endswith("attn2.processor") else processor
            for name, processor in self.unet.attn_processors.items()
        }
        self.unet.set_attn_processor(processors)

    @torch.no_grad()
    def __call__(
        self, height: int = 16, width: int = 12, steps: int = 2, samples: int = 1
    ) -> Tensor:
        """Latents of the person."""
        person = noise(samples, 4, height, width, seed=1)
        garment = noise(samples, 4, height, width, seed=2)
        parts = [torch.zeros_like(garment), garment]
        known = torch.cat([torch.cat([person, part], self.axis) for part in parts])
        if self.channels == 9:  # where the person is to be painted
            mask = torch.cat([torch.ones_like(person), torch.zeros_like(person)], self.axis)
            known = torch.cat([mask[:, :1].repeat(2, 1, 1, 1), known], dim=1)
        self.noise_scheduler.set_timesteps(steps)
        latents = noise(samples, 4, *known.shape[-2:])
        for timestep in self.noise_scheduler.timesteps:
            given = torch.cat([latents.repeat(2, 1, 1, 1), known], dim=1)
            output = self.unet(given, timestep, encoder_hidden_states=None, return_dict=False)[0]
            without, with_garment = output.chunk(2)
            guided = without + 2.5 * (with_garment - without)
            latents = self.noise_scheduler.step(guided, timestep, latents).prev_sample
        return latents.chunk(2, self.axis)[0]


class CatVTONPix2PixPipeline(CatVTONPipeline):
    """Side by side, and without a mask."""

    axis, channels = -1, 8


class _TryOn(DiffusionPipeline):
    """Appends the features of a second UNet to the tokens of every self-attention of the first."""

    def _bind(self, unet: nn.Module, garment_unet: nn.Module) -> None:
        self.features: dict[str, Tensor] = {}
        for name, module in garment_unet.named_modules():
            if name.endswith("attn1"):
                module.register_forward_pre_hook(
                    lambda _, args, name=name: self.features.update({name: args[0]})
                )
        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                # published code does so in the block around the attention module
                module.register_forward_pre_hook(
                    lambda _, args, name=name: (torch.cat([args[0], self.features[name]], 1),)
                )
                module.register_forward_hook(lambda _, args, out: out[:, : out.shape[1] // 2])

    def _denoise(
        self,
        unet: nn.Module,
        known: Tensor,
        text: Tensor,
        before: Callable[[Any], None],
        weights: tuple[float, float],
    ) -> Tensor:
        samples = len(known)
        latents = noise(samples, 4, *known.shape[-2:])
        for timestep in self.scheduler.timesteps:
            before(timestep)
            given = torch.cat([latents, known], dim=1).repeat(2, 1, 1, 1)
            first, second = unet(given, timestep, encoder_hidden_states=text).sample.chunk(2)
            guided = weights[0] * first + weights[1] * second
            latents = self.scheduler.step(guided, timestep, latents).prev_sample
        return latents


class StableDiffusionXLInpaintPipeline(_TryOn):
    """IDM-VTON's, which has the name of the pipeline that it is based on."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.unet_encoder = make_unet(4)
        self._bind(unet, self.unet_encoder)

    @torch.no_grad()
    def __call__(
        self, person: Tensor | None = None, garment: Tensor | None = None, steps: int = 2
    ) -> Tensor:
        person = noise(1, 9, 16, 12) if person is None else person
        garment = noise(len(person), 4, 16, 12, seed=1) if garment is None else garment
        text = noise(2 * len(person), 7, CONTEXT)
        self.scheduler.set_timesteps(steps)

        def before(timestep: Any) -> None:
            self.unet_encoder(garment, timestep, encoder_hidden_states=text[len(person) :])
            for name, feature in self.features.items():
                self.features[name] = torch.cat([torch.zeros_like(feature), feature])

        return self._denoise(self.unet, person, text, before, (-1.0, 2.0))


class OotdPipeline(_TryOn):
    """OOTDiffusion's: the garment comes first in a batch, and its UNet runs once."""

    def __init__(self, unet_garm: Any, unet_vton: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet_garm=unet_garm, unet_vton=unet_vton, scheduler=scheduler)
        self._bind(unet_vton, unet_garm)

    @torch.no_grad()
    def __call__(
        self, person: Tensor | None = None, garment: Tensor | None = None, steps: int = 2
    ) -> Tensor:
        person = noise(1, 4, 16, 12) if person is None else person
        garment = noise(len(person), 4, 16, 12, seed=1) if garment is None else garment
        text = noise(len(person), 7, CONTEXT).repeat(2, 1, 1)
        self.scheduler.set_timesteps(steps)
        self.unet_garm(
            torch.cat([garment, torch.zeros_like(garment)]), 0, encoder_hidden_states=text
        )
        return self._denoise(self.unet_vton, person, text, lambda _: None, (2.0, -1.0))


def idm_vton() -> Any:
    torch.manual_seed(0)
    return StableDiffusionXLInpaintPipeline(make_unet(13), make_scheduler())


def ootdiffusion() -> Any:
    torch.manual_seed(0)
    return OotdPipeline(make_unet(4), make_unet(8), make_scheduler())


def wan_transformer(channels: int = 4, cls: Any = WanTransformer3DModel, **more: Any) -> Any:
    return cls(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        text_dim=12,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        **more,
    ).eval()


def wan(kind: str) -> Any:
    """``t2v``, ``t2v_22``, ``i2v`` with image tokens, ``i2v_22``, ``ti2v_22``, or ``vace``."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    parts: dict[str, Any] = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae,
        "scheduler": scheduler,
    }
    if kind == "vace":
        net = wan_transformer(cls=WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=72)
        return quiet(WanVACEPipeline(**parts, transformer=net))
    if kind.startswith("t2v"):
        if kind == "t2v_22":
            parts |= {"transformer_2": wan_transformer(), "boundary_ratio": 0.9}
        return quiet(WanPipeline(**parts, transformer=wan_transformer()))
    parts |= {"image_encoder": None, "image_processor": None}
    if kind == "ti2v_22":
        parts["expand_timesteps"] = True
        return quiet(WanImageToVideoPipeline(**parts, transformer=wan_transformer()))
    if kind == "i2v_22":
        parts |= {"transformer_2": wan_transformer(12), "boundary_ratio": 0.9}
        return quiet(WanImageToVideoPipeline(**parts, transformer=wan_transformer(12)))
    made = make_image_encoder(CLIPVisionModel)
    parts |= {"image_encoder": made["image_encoder"], "image_processor": made["feature_extractor"]}
    net = wan_transformer(12, image_dim=20, added_kv_proj_dim=32)
    return quiet(WanImageToVideoPipeline(**parts, transformer=net))


def wan_arguments(kind: str, height: int = 32, width: int = 48) -> dict[str, Any]:
    given: dict[str, Any] = {
        "prompt_embeds": noise(1, 512, 12),
        "negative_prompt_embeds": noise(1, 512, 12, seed=1),
        "guidance_scale": 3.0,
        "height": height,
        "width": width,
        "num_frames": 9,
        "num_inference_steps": 4,
        "output_type": "latent",
    }
    if "i2v" in kind:
        given["image"] = picture(height, width)
    if kind == "vace":
        given["reference_images"] = [picture(height, width, 0), picture(height, width, 1)]
    return given


@dataclass
class Seen:
    """One attention call, and what the denoiser was given."""

    call: AttentionCall
    frame: Frame
    key: Tensor  # [batch, heads, seqlen_k, head_dim]

    def spans(self, layout: TokenLayout) -> Sequences | None:
        return layout.spans(self.call, self.frame)


class Watch(torch.overrides.TorchFunctionMode):
    """Lists the attention calls of a denoiser's layers that a layout matches."""

    def __init__(self, denoiser: nn.Module, layout: TokenLayout) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.frames: list[Frame] = []
        self._denoiser, self._layout = denoiser, layout
        self._layer, self._count = "", 0
        self._signature = inspect.signature(denoiser.forward)

    def __enter__(self) -> "Watch":
        self._hooks = [self._denoiser.register_forward_pre_hook(self._open, with_kwargs=True)]
        for name, module in self._denoiser.named_modules():
            if hasattr(module, "get_processor") and self._layout.matches(name):

                def begin(*_: Any, name: str = name) -> None:
                    self._layer, self._count = name, 0

                def end(*_: Any) -> None:
                    self._layer = ""

                self._hooks.append(module.register_forward_pre_hook(begin))
                self._hooks.append(module.register_forward_hook(end, always_call=True))
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def _open(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        first = next(iter(arguments.values()))
        levels = len(self._denoiser.config.get("down_block_types", ())) or None
        size = (first.shape[2], first.shape[3]) if first.ndim == 4 else None
        self.frames.append(Frame(size, arguments, self._denoiser.config, levels=levels))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and self._layer:
            given = dict(zip(("query", "key"), args, strict=False)) | dict(kwargs or {})
            query, key = given["query"], given["key"]
            call = AttentionCall(self._layer, self._count, query.shape[2], key.shape[2])
            self.seen.append(Seen(call, self.frames[-1], key.detach().clone()))
            self._count += 1
        return func(*args, **(kwargs or {}))


def watch(denoiser: nn.Module, layout: TokenLayout, run: Callable[[], Any]) -> Watch:
    """The attention calls of a run."""
    with Watch(denoiser, layout) as watching:
        run()
    return watching


def again(denoiser: nn.Module, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """The denoiser alone, with arguments as it got them."""

    @torch.no_grad()
    def run() -> Any:
        return denoiser(**arguments)

    return run


def moved(before: Seen, after: Seen) -> set[int]:
    """Tokens whose keys differ."""
    assert before.call == after.call
    difference = (before.key - after.key).abs().amax((0, 1, 3))
    return {*torch.nonzero(difference > 1e-6).flatten().tolist()}


def tokens(spans: Any, name: str) -> set[int]:
    """Positions of the spans of that name."""
    found = [span for span in spans if span.name == name]
    assert found, f"{name} is none of {[span.name for span in spans]}"
    return {
        int(position) for span in found for position in torch.arange(span.stop)[span.index].tolist()
    }


@pytest.fixture(scope="session")
def tiny() -> Iterator[SimpleNamespace]:
    """All of this: test modules cannot import it."""
    names = {name: value for name, value in globals().items() if not name.startswith("__")}
    return SimpleNamespace(**names)
