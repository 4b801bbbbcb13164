"""Tiny pipelines with random weights, and an oracle for what a recorder must have seen."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from i2am.attribution import AttributionMaps

CONTEXT = 16  # width of the cross-attention context
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def make_unet(levels: int = 2, **options: Any) -> UNet2DConditionModel:
    """A UNet with cross-attention at every level but the last, and in its middle."""
    cross = levels - 1
    settings = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32, 32, 32)[:levels],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": CONTEXT,
        "attention_head_dim": 4,  # historic name: 4 heads
        "down_block_types": ("CrossAttnDownBlock2D",) * cross + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * cross,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**{**settings, **options}).eval()
    for name, weight in unet.named_parameters():
        if name.endswith("to_q.weight"):
            weight.data *= 8  # attention as uneven as a trained model's
    return unet


class ReferenceLoop(DiffusionPipeline):
    """Denoises under the tokens of a reference, with guidance in every form there is."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        reference: Tensor,
        *,
        size: tuple[int, int] = (8, 6),
        steps: int = 6,
        guidance: str = "unconditional first",
        context_mask: Tensor | None = None,
        on_step: Callable[[int], str | None] = lambda index: None,
    ) -> Tensor:
        """`on_step(index)` after every step may change the form of guidance."""
        samples = len(reference)
        nothing = torch.zeros_like(reference)
        self.scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(samples, 4, *size, generator=generator).to(reference.dtype)
        latents = latents * self.scheduler.init_noise_sigma
        for index, timestep in enumerate(self.scheduler.timesteps):
            calls = {
                "off": [[reference]],
                "unconditional first": [[nothing, reference]],
                "conditional first": [[reference, nothing]],
                "three parts": [[reference, nothing, nothing]],
                "two calls": [[reference], [nothing]],
            }[guidance]
            scaled = self.scheduler.scale_model_input(latents, timestep)
            parts: list[Tensor] = []
            for contexts in calls:
                mask = None if context_mask is None else torch.cat([context_mask] * len(contexts))
                output = self.unet(
                    torch.cat([scaled] * len(contexts)),
                    timestep,
                    encoder_hidden_states=torch.cat(contexts),
                    encoder_attention_mask=mask,
                ).sample
                parts += output.chunk(len(contexts))
            first = 1 if guidance == "unconditional first" else 0
            noise = parts[first] + 0.5 * (parts[first] - parts[-1 - first])
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
            guidance = on_step(index) or guidance
        return latents


def make_loop(levels: int = 2, scheduler: Any = None, **unet: Any) -> ReferenceLoop:
    return ReferenceLoop(make_unet(levels, **unet), scheduler or DDIMScheduler(clip_sample=False))


def make_reference(samples: int = 1, tokens: int = 13, seed: int = 1) -> Tensor:
    """Reference tokens: by default a class token and a 4x3 grid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, tokens, CONTEXT, generator=generator)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def picture(seed: int = 0, height: int = 24, width: int = 24) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def prompts(xl: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    made = {name: torch.randn(1, 7, CONTEXT, generator=generator) for name in names}
    if xl:
        for name in names:
            made[name.replace("prompt", "pooled_prompt")] = torch.randn(1, 16, generator=generator)
    return made


def make_stable_diffusion(
    cls: Any = StableDiffusionPipeline, scheduler: Any = None, xl: bool = False, **modules: Any
) -> Any:
    """A Stable Diffusion pipeline (XL on demand) without text encoders: give it `prompts()`."""
    unet: dict[str, Any] = {}
    if xl:
        unet = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 16,
        }
        modules |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    else:
        modules |= {"safety_checker": None, "requires_safety_checker": False}
    unet["in_channels"] = modules.pop("in_channels", 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = make_vae()
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=16,
                projection_dim=12,
                intermediate_size=24,
                num_attention_heads=2,
                num_hidden_layers=2,
                image_size=16,
                patch_size=4,  # 4x4 patches behind the class token
            )
        ).eval()
    pipeline = cls(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=make_unet(**unet),
        scheduler=scheduler or DDIMScheduler(**BETAS, clip_sample=False),
        image_encoder=encoder,
        feature_extractor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        **modules,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def add_ip_adapters(pipeline: Any, *kinds: str) -> Any:
    """Puts adapters ("base", "plus", "full") on a pipeline as `load_ip_adapter` does."""
    unet = pipeline.unet
    encoder = pipeline.image_encoder.config
    tokens = {"base": 4, "plus": 5, "full": 17}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        projections = {
            "base": ImageProjection(encoder.projection_dim, CONTEXT, num_image_text_embeds=4),
            "plus": IPAdapterPlusImageProjection(
                encoder.hidden_size, CONTEXT, hidden_dims=16, heads=2, num_queries=5
            ),
            "full": IPAdapterFullImageProjection(encoder.hidden_size, CONTEXT),
        }
        processors: dict[str, Any] = {}
        for name in unet.attn_processors:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            processors[name] = AttnProcessor2_0()
            if name.endswith("attn2.processor"):
                processors[name] = IPAdapterAttnProcessor2_0(
                    attention.to_q.out_features, CONTEXT, [tokens[kind] for kind in kinds]
                )
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projections[kind] for kind in kinds])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    unet.eval()
    return pipeline


def load_ip_adapter(pipeline: Any) -> None:
    """diffusers' own way, from weights in the layout in which the base variant was published."""
    weights = {}
    for number, name in enumerate(
        name for name in pipeline.unet.attn_processors if name.endswith("attn2.processor")
    ):
        width = pipeline.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for projection in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * number + 1}.{projection}.weight"] = torch.ones(width, CONTEXT)
    embedding = pipeline.image_encoder.config.projection_dim
    projection = {
        "proj.weight": torch.ones(4 * CONTEXT, embedding),
        "proj.bias": torch.zeros(4 * CONTEXT),
        "norm.weight": torch.ones(CONTEXT),
        "norm.bias": torch.zeros(CONTEXT),
    }
    state_dict = {"image_proj": projection, "ip_adapter": weights}
    pipeline.load_ip_adapter(state_dict, subfolder="", weight_name="")


def run(pipeline: Any, seed: int = 0, **arguments: Any) -> Any:
    """Latents (or what `output_type` says) of a pipeline, from a fixed seed."""
    settings = {"output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    return pipeline(**{**settings, **arguments}).images


@contextlib.contextmanager
def gives_up(recorder: Any, error: type[Exception], message: str) -> Iterator[None]:
    """A run that is made and not recorded: told at once, and whenever its maps are asked for."""
    with recorder:
        with pytest.warns(UserWarning, match=f"recording ended at call .*: {message}"):
            yield
        with pytest.raises(error, match=message):
            recorder.maps()
    with pytest.raises(error, match=message):
        recorder.maps()


@dataclass
class Call:
    """One attention call of an unrecorded run."""

    layer: str
    call_index: int  # among the calls of one invocation of the layer
    evaluation: int  # scheduler steps made before
    denoiser_call: int  # within the evaluation
    query: Tensor
    key: Tensor
    bias: Tensor | None
    scale: float

    @property
    def rows(self) -> int:
        return len(self.query)

    def logits(self) -> Tensor:
        logits = self.query.double() @ self.key.double().mT * self.scale
        if self.bias is None:
            return logits
        # diffusers adds -10000 to keys that nobody may see
        hidden = ~self.bias if self.bias.dtype == torch.bool else self.bias < -5000
        return logits.masked_fill(hidden, -torch.inf)


class _Mode(torch.overrides.TorchFunctionMode):
    def __init__(self, note: Callable[..., None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            query = given["query"]
            scale = given.get("scale") or query.shape[-1] ** -0.5
            self.note(query, given["key"], given.get("attn_mask"), scale)
        return func(*args, **kwargs)


@contextlib.contextmanager
def spy(denoiser: Any, scheduler: Any, layers: str = "attn2") -> Iterator[list[Call]]:
    """Lists every attention call of some layers in a run that nobody records."""
    calls: list[Call] = []
    count = SimpleNamespace(evaluation=0, denoiser_call=-1, call_index=0)
    undo: list[Callable[[], Any]] = []

    def watch(name: str, module: Any) -> None:
        chunks: list[tuple[Tensor, Tensor, Tensor | None]] = []

        def note(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> None:
            calls.append(
                Call(
                    name,
                    count.call_index,
                    count.evaluation,
                    count.denoiser_call,
                    query.detach().clone(),
                    key.detach().clone(),
                    None if bias is None else bias.clone(),
                    scale,
                )
            )
            count.call_index += 1

        mode = _Mode(note)

        def scores(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
            chunks.append((query, key, mask))
            return type(module).get_attention_scores(module, query, key, mask)

        def enter(*_: Any) -> None:
            count.call_index = 0
            mode.__enter__()

        def leave(*_: Any) -> None:
            mode.__exit__(None, None, None)
            if chunks:  # processors without scaled_dot_product_attention fold heads into the batch
                query, key, mask = (
                    None if parts[0] is None else torch.cat(parts).unflatten(0, (-1, module.heads))
                    for parts in zip(*chunks, strict=True)
                )
                note(query, key, mask, module.scale)  # type: ignore[arg-type]
                chunks.clear()

        module.get_attention_scores = scores
        hooks = [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]
        undo.extend(hook.remove for hook in hooks)
        undo.append(lambda: delattr(module, "get_attention_scores"))

    for name, module in denoiser.named_modules():
        if name.endswith(layers):
            watch(name, module)

    def call_denoiser(*_: Any) -> None:
        count.denoiser_call += 1

    undo.append(denoiser.register_forward_pre_hook(call_denoiser).remove)
    step = scheduler.step

    @functools.wraps(step)
    def count_step(*args: Any, **kwargs: Any) -> Any:
        count.evaluation += 1
        count.denoiser_call = -1
        return step(*args, **kwargs)

    scheduler.step = count_step
    undo.append(lambda: delattr(scheduler, "step"))
    try:
        yield calls
    finally:
        for function in undo:
            function()


def assert_maps(
    maps: AttributionMaps,
    calls: Sequence[Call],
    *,
    groups: Sequence[int],
    rows: Callable[[Call], slice | None],
    reference: slice,
    call_index: int = 0,
    voters: slice | None = None,
) -> None:
    """Recomputes every sum of a recording from the queries and keys of the same run.

    Args:
        maps: The recording.
        calls: What :func:`spy` listed.
        groups: Time group of each evaluation.
        rows: The batch rows of a call that were to be recorded.
        reference: Keys that are the reference patches.
        call_index: Which attention call of a layer.
        voters: Keys that share the R2G vote, default the reference.
    """
    layers = list(dict.fromkeys(call.layer for call in calls))
    assert list(maps.layers) == layers
    assert max(call.evaluation for call in calls) == len(groups) - 1
    for layer in maps.layer_sums:
        r2g = torch.zeros(())
        g2r = torch.zeros(())
        for call in calls:
            part = rows(call)
            if call.layer != layer.site.layer or call.call_index != call_index or part is None:
                continue
            logits = call.logits()[part]
            over_queries = logits.softmax(-2).nan_to_num(0)[..., voters or reference].mean(-1)
            over_keys = logits.softmax(-1)[..., reference].mean(-2)
            group = F.one_hot(torch.tensor(groups[call.evaluation]), maps.time_groups)
            group = group[None, :, None, None].double()
            r2g = r2g + group * over_queries[:, None]
            g2r = g2r + group * over_keys[:, None]
        recorded = layer.reference_to_generated
        assert recorded is not None
        recorded = recorded[:, :, :, 0].flatten(-2)
        torch.testing.assert_close(recorded.double(), r2g, rtol=2e-5, atol=1e-7)
        if layer.site.reference_grid is not None:
            recorded = layer.generated_to_reference
            assert recorded is not None
            recorded = recorded[:, :, :, 0].flatten(-2)
            torch.testing.assert_close(recorded.double(), g2r, rtol=2e-5, atol=1e-7)


def last(samples: int) -> Callable[[Call], slice]:
    """Conditional rows where the unconditional part comes first, or alone."""
    return lambda call: slice(call.rows - samples, call.rows)


def state(pipeline: Any) -> dict[str, Any]:
    """All that a recording may touch and has to put back, by identity where there is one."""
    unet = getattr(pipeline.unet, "_orig_mod", pipeline.unet)
    modules = [module for module in unet.modules() if hasattr(module, "get_processor")]
    scheduler = {k: v for k, v in vars(pipeline.scheduler).items() if callable(v)}
    return {
        "keys": list(unet.state_dict()),
        "processors": [(id(module.processor), type(module.processor)) for module in modules],
        "attributes": [sorted(vars(module.processor)) for module in modules],
        "modules": [sorted(vars(module)) for module in modules],
        "hooks": [
            (list(module._forward_hooks), list(module._forward_pre_hooks))
            for module in pipeline.unet.modules()
        ],
        "always": [list(module._forward_hooks_always_called) for module in pipeline.unet.modules()],
        "compiled": unet._compiled_call_impl,
        "scheduler": (scheduler, sorted(vars(pipeline.scheduler)), type(pipeline.scheduler)),
    }


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Builders of pipelines and inputs."""
    return SimpleNamespace(
        unet=make_unet,
        loop=make_loop,
        reference=make_reference,
        vae=make_vae,
        picture=picture,
        prompts=prompts,
        stable_diffusion=make_stable_diffusion,
        sdxl=lambda **options: make_stable_diffusion(StableDiffusionXLPipeline, xl=True, **options),
        ip_adapters=add_ip_adapters,
        load_ip_adapter=load_ip_adapter,
        run=run,
        state=state,
        betas=BETAS,
        Loop=ReferenceLoop,
        Image=Image,
    )


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    """What was to be recorded: list it with `spy` in a plain run, compare with `assert_maps`;
    what cannot be: `gives_up`."""
    return SimpleNamespace(spy=spy, assert_maps=assert_maps, last=last, gives_up=gives_up)
