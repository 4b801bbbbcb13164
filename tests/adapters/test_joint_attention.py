"""A layout of one's own for text, generated and reference tokens in one sequence: README's lines.

Recorded is FLUX Kontext. Its grids stand in the arguments of its transformer, its processors are
not UNet ones, and its guidance runs in two calls.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from torch.overrides import TorchFunctionMode

import i2am
from i2am.layouts import TokenLayout, registry

TEXT, GENERATED, REFERENCE = 5, (8, 6), (4, 4)

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
(LINES,) = (
    block for block in re.findall(r"```python\n(.+?)```", README, re.DOTALL) if "def spans" in block
)


DEFINED: dict = {}
exec(LINES.partition("\nregister_layout")[0], DEFINED)
LAYOUT = DEFINED["layout"]


@pytest.fixture
def pipeline(tiny):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        ).eval()
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval()
    made = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    made.set_progress_bar_config(disable=True)
    return made


def images(tiny, pipeline, true_guidance):
    torch.manual_seed(1)
    prompt = {"prompt_embeds": torch.randn(1, TEXT, 16), "pooled_prompt_embeds": torch.randn(1, 16)}
    if true_guidance:
        prompt |= {f"negative_{name}": torch.randn_like(value) for name, value in prompt.items()}
        prompt["true_cfg_scale"] = 2.0
    return tiny.run(
        pipeline,
        **prompt,
        image=tiny.picture(0, 16, 16),
        height=32,
        width=24,
        max_area=32 * 24,
        _auto_resize=False,
        num_inference_steps=4,
    )


def test_a_layout_of_unet_levels_is_refused(tiny, oracle, pipeline):
    """Nobody knows the grid of a denoiser's input [batch, tokens, channels]."""
    plain = images(tiny, pipeline, False)
    prefix = TEXT + GENERATED[0] * GENERATED[1]
    layout = TokenLayout.cross_attention(REFERENCE, prefix, layers=LAYOUT.layers)
    recorder = i2am.record(pipeline, layout=layout, time_groups=1)
    message = r".*layout must give the grid .* is not \[batch, channels, height, width\]"
    with oracle.gives_up(recorder, ValueError, message):
        image = images(tiny, pipeline, False)
    assert torch.equal(image, plain)


@pytest.fixture(scope="module")
def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


@pytest.mark.parametrize("layers", [r"attn$", r"attn2$", r"blocks\.1\.attn$"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("options", [{}, {"grid": (2, 2)}, {"grid": (2, 2), "prefix": 1}])
def test_an_adapter_beside_joint_attention_is_refused(pipeline, sd3, family, layers, options):
    """Its keys follow the image's own ones (SD3), or its queries have no grid (FLUX)."""
    denoiser = {"flux": pipeline.transformer, "sd3": sd3}[family]
    options = {**options, "layers": layers}
    names = [name for name, _ in denoiser.named_modules() if re.search(layers, name)]
    message = rf"must match an attention layer of {type(denoiser).__name__}, but"
    if names:
        kind = type(denoiser.get_submodule(names[0])).__name__
        message = rf"must match cross-attention layers alone, .* got the {kind} {names[0]} of"
    with pytest.raises(ValueError, match=message):
        i2am.record(denoiser, layout=TokenLayout.ip_adapter(**options), time_groups=1)


@pytest.mark.parametrize("true_guidance", [False, True], ids=["one call", "two calls"])
def test_kontext(tiny, pipeline, true_guidance):
    seen = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention:
                # the VAE gives them by place
                given = dict(zip(("query", "key"), args, strict=False)) | kwargs
                seen.append((given["query"].double(), given["key"].double()))
            return func(*args, **kwargs)

    with Spy():
        plain = images(tiny, pipeline, true_guidance)
    with i2am.record(pipeline, layout=LAYOUT, time_groups=2) as recorder:
        assert torch.equal(images(tiny, pipeline, true_guidance), plain)
    maps = recorder.maps()
    assert maps.provenance["steps"] == maps.provenance["evaluations"] == 4
    assert maps.provenance["denoiser"] == "FluxTransformer2DModel"
    assert maps.layers == ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")
    cells, patches = GENERATED[0] * GENERATED[1], REFERENCE[0] * REFERENCE[1]
    joint = [(q, k) for q, k in seen if q.shape[2] == TEXT + cells + patches]
    calls = 2 if true_guidance else 1
    assert len(joint) == 4 * calls * 2
    for number, layer in enumerate(maps.layer_sums):
        assert (layer.site.generated_grid, layer.site.reference_grid) == (GENERATED, REFERENCE)
        r2g, g2r = [], []
        for query, key in joint[number :: 2 * calls]:  # the conditional call comes first
            logits = query[:, :, TEXT : TEXT + cells] @ key.mT * query.shape[-1] ** -0.5
            r2g.append(logits.softmax(-2)[..., TEXT + cells :].mean(-1))
            g2r.append(logits.softmax(-1)[..., TEXT + cells :].mean(-2))
        for sums, recorded, grid in (
            (r2g, layer.reference_to_generated, GENERATED),
            (g2r, layer.generated_to_reference, REFERENCE),
        ):
            expected = torch.stack(sums, 1).unflatten(1, (2, 2)).sum(2)
            torch.testing.assert_close(
                recorded[:, :, :, 0], expected.float().unflatten(-1, grid), rtol=2e-5, atol=1e-7
            )


def test_the_lines_of_readme_run_as_they_stand(tiny, pipeline, monkeypatch):
    class MyPipeline(FluxKontextPipeline):
        def __call__(self, image, prompt):
            assert prompt
            return super().__call__(
                image,
                prompt_embeds=torch.ones(1, TEXT, 16),
                pooled_prompt_embeds=torch.ones(1, 16),
                height=32,
                width=24,
                max_area=32 * 24,
                _auto_resize=False,
                num_inference_steps=5,
            )

    monkeypatch.setattr(registry, "_REGISTERED", {})
    pipe = MyPipeline(**pipeline.components)
    pipe.set_progress_bar_config(disable=True)
    names = {"pipe": pipe, "reference": tiny.picture(0, 16, 16)}
    exec(LINES, names)
    assert names["maps"].provenance["layout"] == "mine"
    layer = names["maps"].layer_sums[0]
    assert (layer.site.generated_grid, layer.site.reference_grid) == (GENERATED, REFERENCE)
    assert names["image"].size == (24, 32)
