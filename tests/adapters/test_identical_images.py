"""Recording must not change a bit of what a pipeline makes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)

import i2am
from i2am.layouts import TokenLayout

PATCHES = TokenLayout.cross_attention((4, 3))
TEXT = TokenLayout.cross_attention((2, 3))  # prompts stand for a reference of 1 + 6 tokens


# diffusers' own, about NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def assert_identical(make, **recording):
    """`make()` gives the same tensors with and without recording."""
    plain = make()
    with i2am.record(**recording) as recorder:
        recorded = make()
    assert torch.equal(torch.as_tensor(recorded), torch.as_tensor(plain))
    assert torch.as_tensor(plain).isfinite().all()
    return recorder.maps()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", ["off", "unconditional first", "two calls"])
def test_custom_pipeline(tiny, dtype, guidance):
    loop = tiny.loop().to(dtype)
    reference = tiny.reference(2).to(dtype)
    order = ("conditional", "unconditional") if guidance == "two calls" else None
    layout = replace(PATCHES, guidance_order=order)
    maps = assert_identical(
        lambda: loop(reference, guidance=guidance), pipe_or_denoiser=loop, layout=layout
    )
    assert len(maps.layers) == 4
    assert maps.n_samples == 2


def test_masked_reference_tokens(tiny):
    loop = tiny.loop()
    mask = torch.ones(2, 13)
    mask[1, 7:] = 0
    assert_identical(
        lambda: loop(tiny.reference(2), context_mask=mask), pipe_or_denoiser=loop, layout=PATCHES
    )


def test_fused_projections(tiny):
    loop = tiny.loop()
    loop.unet.fuse_qkv_projections()
    assert {type(p) for p in loop.unet.attn_processors.values()} == {FusedAttnProcessor2_0}
    assert_identical(lambda: loop(tiny.reference()), pipe_or_denoiser=loop, layout=PATCHES)


@pytest.mark.parametrize(
    "processor",
    [AttnProcessor(), SlicedAttnProcessor(slice_size=3)],
    ids=lambda p: type(p).__name__,
)
def test_processors_without_scaled_dot_product_attention(tiny, processor):
    loop = tiny.loop()
    loop.unet.set_attn_processor(processor)
    assert_identical(lambda: loop(tiny.reference(2)), pipe_or_denoiser=loop, layout=PATCHES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["base", "plus", "full"])
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_ip_adapter(tiny, xl, kind, dtype):
    pipeline = tiny.sdxl() if xl else tiny.stable_diffusion()
    tiny.ip_adapters(pipeline, kind).to(dtype)
    prompts = {name: tensor.to(dtype) for name, tensor in tiny.prompts(xl).items()}

    def images():
        return tiny.run(
            pipeline,
            **prompts,
            ip_adapter_image=tiny.picture(),
            num_inference_steps=3,
            height=32,
            width=24,
        )

    maps = assert_identical(images, pipe_or_denoiser=pipeline, time_groups=3)
    tokens = {"base": 4, "plus": 5, "full": 16}[kind]
    assert {layer.site.reference_tokens for layer in maps.layer_sums} == {tokens}
    assert (maps.layer_sums[0].site.reference_grid == (4, 4)) == (kind == "full")


def test_masked_ip_adapter_images(tiny):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "base")
    masks = torch.zeros(1, 2, 24, 24)
    masks[:, 0, :, :12] = 1
    masks[:, 1, 12:] = 1

    def images(**options):
        return tiny.run(
            pipeline,
            **tiny.prompts(),
            ip_adapter_image=[[tiny.picture(0), tiny.picture(1)]],
            num_inference_steps=2,
            height=24,
            width=24,
            **options,
        )

    masked = {"cross_attention_kwargs": {"ip_adapter_masks": [masks]}}
    assert_identical(lambda: images(**masked), pipe_or_denoiser=pipeline, time_groups=1)
    # the masks do reach the processors
    assert not torch.equal(images(), images(**masked))


def test_image_to_image(tiny):
    pipeline = tiny.stable_diffusion(
        StableDiffusionImg2ImgPipeline, scheduler=HeunDiscreteScheduler(**tiny.betas)
    )

    def images():
        return tiny.run(
            pipeline, **tiny.prompts(), image=tiny.picture(), strength=0.6, num_inference_steps=10
        )

    assert_identical(images, pipe_or_denoiser=pipeline, layout=TEXT)


def test_perturbed_attention_guidance(tiny):
    pipeline = tiny.stable_diffusion(StableDiffusionPAGPipeline, pag_applied_layers=["mid"])

    def images():
        return tiny.run(
            pipeline,
            **tiny.prompts(),
            pag_scale=3.0,
            num_inference_steps=3,
            height=16,
            width=16,
        )

    order = ("unconditional", "conditional", "perturbed")
    layout = replace(TEXT, guidance_order=order)
    maps = assert_identical(images, pipe_or_denoiser=pipeline, layout=layout, time_groups=3)
    assert maps.n_samples == 1
    # the pipeline puts self-attention processors of its own in place while it runs
    layout = TokenLayout.same_grid(r"attn1$", guidance_order=order)
    with pytest.warns(UserWarning, match="1 of 4 layers made no attention call") as warned:
        maps = assert_identical(images, pipe_or_denoiser=pipeline, layout=layout, time_groups=3)
    assert "mid_block" in str(warned[0].message)
    assert not any("mid_block" in layer for layer in maps.layers)


def test_instruct_pix2pix(tiny):
    pipeline = tiny.stable_diffusion(StableDiffusionInstructPix2PixPipeline, in_channels=8)
    order = ("conditional", "image", "unconditional")
    layout = TokenLayout.cross_attention((2, 3), guidance_order=order)

    def images():
        return tiny.run(pipeline, **tiny.prompts(), image=tiny.picture(), num_inference_steps=3)

    assert_identical(images, pipe_or_denoiser=pipeline, layout=layout, time_groups=3)


def test_inference_mode(tiny):
    loop = tiny.loop()
    with torch.inference_mode():
        plain = loop(tiny.reference())
        with i2am.record(loop, layout=PATCHES) as recorder:
            assert torch.equal(loop(tiny.reference()), plain)
    inside = recorder.maps()
    # the same recorder goes on outside: its sums are ordinary tensors
    recorder.attach()
    loop(tiny.reference())
    recorder.detach()
    outside = recorder.maps()
    for one, other in zip(inside.layer_sums, outside.layer_sums, strict=True):
        assert torch.equal(one.reference_to_generated, other.reference_to_generated)
        assert not other.reference_to_generated.is_inference()


def test_recorder_entered_in_inference_mode_records_outside_of_it(tiny):
    loop = tiny.loop()
    with torch.inference_mode():
        recorder = i2am.record(loop, layout=PATCHES)
        recorder.attach()
    loop(tiny.reference())
    recorder.detach()
    assert recorder.maps().n_samples == 1


def test_gradients_pass_the_recording(tiny):
    loop = tiny.loop()
    unet: UNet2DConditionModel = loop.unet
    latents, reference = torch.randn(1, 4, 8, 6), tiny.reference()

    def gradient():
        unet.zero_grad()
        output = unet(latents, torch.tensor(10), encoder_hidden_states=reference).sample
        output.square().mean().backward()
        weight = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
        return weight.grad.clone()

    plain = gradient()
    with i2am.record(unet, layout=PATCHES, num_inference_steps=1, time_groups=1) as recorder:
        recorded = gradient()
    assert torch.equal(plain, recorded)
    sums = recorder.maps().layer_sums[0].reference_to_generated
    assert not sums.requires_grad


def test_gradient_checkpointing_is_not_counted_twice(tiny):
    unet = tiny.unet()
    latents, reference = torch.randn(1, 4, 8, 6), tiny.reference()
    sums = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.train()
        with i2am.record(unet, layout=PATCHES, num_inference_steps=1, time_groups=1) as recorder:
            output = unet(latents, torch.tensor(10), encoder_hidden_states=reference).sample
            output.square().mean().backward()
        sums.append(recorder.maps().reference_to_generated())
    torch.testing.assert_close(*sums)
    assert set(recorder.maps().provenance["calls"].values()) == {1}


def test_paint_by_example_of_diffusers(tiny):
    pytest.importorskip("diffusers.pipelines.deprecated.paint_by_example")
    from diffusers import DDIMScheduler, PaintByExamplePipeline
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = PaintByExampleImageEncoder(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_attention_heads=2,
                num_hidden_layers=4,
                image_size=16,
                patch_size=4,
            ),
            proj_size=16,
        )
        pipeline = PaintByExamplePipeline(
            vae=tiny.vae(),
            image_encoder=encoder.eval(),
            unet=tiny.unet(in_channels=9),
            scheduler=DDIMScheduler(**tiny.betas),
            safety_checker=None,
            feature_extractor=CLIPImageProcessorPil(
                size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
            ),
        )
    pipeline.set_progress_bar_config(disable=True)
    mask = np.zeros((24, 16), np.uint8)
    mask[8:16, 4:12] = 255

    def images():
        return tiny.run(
            pipeline,
            image=tiny.picture(1, 24, 16),
            mask_image=tiny.Image.fromarray(mask),
            example_image=tiny.picture(2),
            num_inference_steps=3,
            output_type="np",
        )

    with pytest.warns(UserWarning, match="single reference token"):
        maps = assert_identical(images, pipe_or_denoiser=pipeline, time_groups=3)
    assert not maps.informative
    assert maps.reference_to_generated().shape == (1, 12, 8)
