"""Norms of what tokens bring, and where patches look given the reference, of whole pipelines."""

import inspect
from importlib import import_module

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
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

import i2am
from i2am.adapters.attention.tap import tap
from i2am.adapters.run import Run
from i2am.adapters.value_norms import ValueNorms, output_weight
from i2am.layouts import TokenLayout
from i2am.layouts.spans import joint

PATCHES = TokenLayout.cross_attention((4, 3), prefix=1)
BOTH = {"values": "norm", "normalise": "conditional"}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


class Spy(TorchFunctionMode):
    """The arguments of every attention call, fp64, in a run that nobody records."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (given[name].double() for name in ("query", "key", "value"))
            self.calls.append((query, key, value))
        return func(*args, **kwargs)


def brought(value, weight):
    """``|| W_o v ||`` by definition: every token through the columns of its head."""
    by_head = weight.double().unflatten(1, (value.shape[1], value.shape[3]))
    return torch.einsum("bhjd,ohd->bhjo", value, by_head).norm(dim=-1)


def definitions(calls, weight, generated, reference):
    """Both readings of the calls of one layer, mean over heads, fp64: a mean and a sum."""
    by_norm = received = 0
    for query, key, value in calls:
        scores = query[:, :, generated] @ key.mT * query.shape[-1] ** -0.5
        p = scores.softmax(-1)[..., reference]
        norm = (p * brought(value, weight)[:, :, None, reference]).sum(-1)
        by_norm = by_norm + norm.mean(1)
        received = received + (p / p.sum(-1, keepdim=True)).mean((1, 2))
    return by_norm / len(calls), received


def assert_maps(maps, layer, expected, grid, reference_grid, tolerance=2e-5):
    one = maps.select(layers=layer)
    found = (
        one.reference_to_generated(values="norm"),
        one.generated_to_reference(normalise="conditional"),
    )
    for actual, sums, size in zip(found, expected, (grid, reference_grid), strict=True):
        sums = sums.unflatten(-1, size)
        atol = tolerance * sums.max().item()
        torch.testing.assert_close(actual.double(), sums, rtol=0, atol=atol)


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("guidance", ["off", "unconditional first", "two calls"])
def test_cross_attention(tiny, impl, guidance):
    loop, reference, options = tiny.loop(), tiny.reference(2), {"guidance": guidance, "steps": 4}
    with Spy() as spy:
        plain = loop(reference, **options)
    order = ("conditional", "unconditional") if guidance == "two calls" else None
    layout = TokenLayout.cross_attention((4, 3), prefix=1, guidance_order=order)
    with i2am.record(loop, layout=layout, time_groups=2, impl=impl, **BOTH) as recorder:
        assert torch.equal(loop(reference, **options), plain)
    maps = recorder.maps()
    crossing = [call for call in spy.calls if call[1].shape[2] == 13]
    apart = 2 if guidance == "two calls" else 1  # the conditional call comes first
    for number, layer in enumerate(maps.layers):
        n = len(maps.layers)
        own = [c for i, c in enumerate(crossing) if i % n == number and i // n % apart == 0]
        own = [[each[-2:] for each in call] for call in own]
        weight = loop.unet.get_submodule(layer).to_out[0].weight
        expected = definitions(own, weight, slice(None), slice(1, None))
        grid = maps.layer_sums[number].site.generated_grid
        assert_maps(maps, layer, expected, grid, (4, 3))
    by = maps.reference_to_generated("time", values="norm")
    torch.testing.assert_close(by.mean(1), maps.reference_to_generated(values="norm"))


def test_norms_are_fp32_under_autocast(tiny):
    loop, layout = tiny.loop(), TokenLayout.cross_attention((4, 3), prefix=1)
    options = {"guidance": "off", "steps": 1}
    with torch.autocast("cpu", torch.bfloat16):
        with Spy() as spy:
            loop(tiny.reference(2), **options)
        with i2am.record(loop, layout=layout, time_groups=1, **BOTH) as recorder:
            loop(tiny.reference(2), **options)
    maps = recorder.maps()
    crossing = [call for call in spy.calls if call[1].shape[2] == 13]
    for number, layer in enumerate(maps.layers):
        weight = loop.unet.get_submodule(layer).to_out[0].weight
        expected = definitions([crossing[number]], weight, slice(None), slice(1, None))
        grid = maps.layer_sums[number].site.generated_grid
        assert_maps(maps, layer, expected, grid, (4, 3))


def test_keys_that_are_all_the_references_are_recorded_once(tiny):
    loop, layout = tiny.loop(), TokenLayout.cross_attention((4, 3), prefix=0)
    found = {}
    for normalise in ("full", "conditional"):
        with i2am.record(loop, layout=layout, time_groups=2, normalise=normalise) as recorder:
            loop(tiny.reference(tokens=12))
        maps = recorder.maps()
        assert all(layer.site.alone for layer in maps.layer_sums)
        assert all(layer.generated_to_reference_conditional is None for layer in maps.layer_sums)
        found[normalise] = maps.generated_to_reference("time", normalise="conditional")
        assert torch.equal(found[normalise], maps.generated_to_reference("time"))
    assert torch.equal(found["full"], found["conditional"])


def test_a_whole_graph_hands_values_over(tiny):
    one_level = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    loop, reference = tiny.loop(1, **one_level), tiny.reference(2)
    with i2am.record(loop, layout=PATCHES, **BOTH) as recorder:
        loop(reference)
    eager = recorder.maps()
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    loop.unet.compile(backend=backend, fullgraph=True)
    plain = loop(reference)
    graphs = backend.frame_count
    for _ in range(2):
        with i2am.record(loop, layout=PATCHES, **BOTH) as recorder:
            assert torch.equal(loop(reference), plain)
        assert backend.frame_count == 2 * graphs
        torch.testing.assert_close(
            recorder.maps().reference_to_generated(values="norm"),
            eager.reference_to_generated(values="norm"),
        )
    torch._dynamo.reset()


@pytest.fixture
def kontext():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
            **HEADS,
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
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer,
        **dict.fromkeys(parts),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(tiny, pipe):
    generator = torch.Generator().manual_seed(1)
    return tiny.run(
        pipe,
        prompt_embeds=torch.randn(1, 5, 16, generator=generator),
        pooled_prompt_embeds=torch.randn(1, 16, generator=generator),
        image=tiny.picture(0, 16, 16),
        height=32,
        width=24,
        max_area=32 * 24,
        _auto_resize=False,
        num_inference_steps=3,
    )


@pytest.mark.parametrize("impl", ["reference", "streaming"])
def test_joint_attention(tiny, kontext, impl):
    """The projection of the generated queries, and the first columns of a joined one."""
    with Spy() as spy:
        plain = images(tiny, kontext)
    options = {"time_groups": 3, "impl": impl, "pairs": True}
    with i2am.record(kontext, **options, **BOTH) as recorder:
        images(tiny, kontext)
    resized = recorder.maps()
    with i2am.record(kontext, sums="native", **options, **BOTH) as recorder:
        assert torch.equal(images(tiny, kontext), plain)
    maps = recorder.maps()
    for reading in (
        lambda maps: maps.reference_to_generated("time", values="norm"),
        lambda maps: maps.generated_to_reference("time", normalise="conditional"),
    ):
        torch.testing.assert_close(reading(resized), reading(maps))
    # 5 of text, 8x6 generated, 4x4 of the reference
    calls = [call for call in spy.calls if call[1].shape[2] == 5 + 48 + 16]
    network = kontext.transformer
    weights = {
        "transformer_blocks.0.attn": network.transformer_blocks[0].attn.to_out[0].weight,
        "single_transformer_blocks.0.attn": (
            network.single_transformer_blocks[0].proj_out.weight[:, :16]
        ),
    }
    assert maps.layers == tuple(weights)
    for number, (layer, weight) in enumerate(weights.items()):
        expected = definitions(calls[number::2], weight, slice(5, 53), slice(53, None))
        assert_maps(maps, layer, expected, (8, 6), (4, 4))


def test_adapters_of_a_unet_and_their_scale(tiny):
    pipe = tiny.ip_adapters(tiny.stable_diffusion(), "full", "base")
    pipe.set_ip_adapter_scale([0.5, 1.0])

    def run():
        return tiny.run(
            pipe,
            **tiny.prompts(),
            ip_adapter_image=[tiny.picture(), tiny.picture(1)],
            num_inference_steps=2,
            height=24,
            width=24,
        )

    with Spy() as spy:
        plain = run()
    with i2am.record(pipe, time_groups=1, **BOTH) as recorder:
        assert torch.equal(run(), plain)
    maps = recorder.maps()
    first = maps.sources[0]
    # 17 tokens of the first adapter, 4 of the second, 7 of the prompt
    calls = [call for call in spy.calls if call[1].shape[2] == 17 != call[0].shape[2]]
    layers = [layer for layer in maps.layer_sums if layer.site.source == first]
    tokens = slice(17 - layers[0].site.reference_tokens, None)
    for number, layer in enumerate(layers):
        own = [[each[-1:] for each in call] for call in calls[number :: len(layers)]]
        weight = pipe.unet.get_submodule(layer.site.layer).to_out[0].weight
        by_norm, _ = definitions(own, weight, slice(None), tokens)
        chosen = maps.select(layers=layer.site.layer)
        found = chosen.reference_to_generated(source=first, values="norm")
        expected = 0.5 * by_norm.unflatten(-1, layer.site.generated_grid)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_words_of_a_prompt(tiny):
    pipe = tiny.stable_diffusion()

    def run():
        return tiny.run(pipe, **tiny.prompts(), num_inference_steps=2, height=24, width=24)

    options = {"words": {"shirt": [2, 3]}, "time_groups": 1}
    with Spy() as spy:
        plain = run()
    with i2am.record(pipe, values="norm", **options) as recorder:
        assert torch.equal(run(), plain)
    maps = recorder.maps()
    calls = [call for call in spy.calls if call[1].shape[2] == 7]
    for number, layer in enumerate(maps.layers):
        own = [[each[-1:] for each in call] for call in calls[number :: len(maps.layers)]]
        weight = pipe.unet.get_submodule(layer).to_out[0].weight
        by_norm, _ = definitions(own, weight, slice(None), slice(2, 4))
        found = maps.select(layers=layer).reference_to_generated(source="shirt", values="norm")
        expected = by_norm.unflatten(-1, found.shape[-2:])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_recordings_without_them_are_handed_no_values(tiny, monkeypatch):
    seen, add = [], Run.add

    def note(self, layer, call_index, *call):
        seen.append(call[-1])
        add(self, layer, call_index, *call)

    monkeypatch.setattr(Run, "add", note)
    for values in ("one", "norm"):
        seen.clear()
        with i2am.record(tiny.loop(), layout=PATCHES, values=values, time_groups=1) as recorder:
            recorder._denoisers[0](torch.ones(1, 4, 8, 6), 1, tiny.reference())
        assert seen
        assert {value is not None for value in seen} == {values == "norm"}


def test_the_tap_hands_values_over_where_it_is_asked(tiny):
    loop = tiny.loop()
    for values in (False, True):
        for graph in (False, True):
            seen = []
            with tap(loop.unet, listen=seen.append, values=values, graph=graph):
                loop(tiny.reference(), steps=1)
            assert seen
            for call in seen:
                assert (call.value is not None) == values
                if values:
                    assert call.value.shape == call.key.shape


SINGLE = {
    "bria": "Bria",
    "bria_fibo": "BriaFibo",
    "chroma": "Chroma",
    "flux": "Flux",
    "flux2": "Flux2",
    "hunyuan_video": "HunyuanVideo",
    "hunyuanimage": "HunyuanImage",
    "longcat_image": "LongCatImage",
    "motif_video": "MotifVideo",
    "ovis_image": "OvisImage",
}


@pytest.mark.parametrize("family", SINGLE)
def test_a_joined_projection_takes_the_heads_first(family):
    module = import_module(f"diffusers.models.transformers.transformer_{family}")
    kind = getattr(module, f"{SINGLE[family]}SingleTransformerBlock")
    width = {"dim": 16} if "dim" in inspect.signature(kind.__init__).parameters else {}
    block = kind(**width, **HEADS).eval()
    seen, projected = [], []
    path = next(name for name, part in block.named_modules() if hasattr(part, "get_processor"))
    linear = block.get_submodule(path).to_out if family == "flux2" else block.proj_out
    linear.register_forward_pre_hook(lambda _, given: projected.append(given[0]))
    generator = torch.Generator().manual_seed(0)
    given = {"hidden_states": torch.randn(1, 6, 16, generator=generator)}
    named = inspect.signature(kind.forward).parameters
    if "encoder_hidden_states" in named:
        given["encoder_hidden_states"] = torch.randn(1, 3, 16, generator=generator)
    if family == "flux2":
        given["temb_mod"] = torch.randn(1, 48, generator=generator)
    else:
        rows = (3,) if family == "chroma" else ()
        given["temb"] = torch.randn(1, *rows, 16, generator=generator)
    with torch.no_grad(), tap(block, listen=seen.append, values=True):
        block(**given)
    (call,) = seen
    attended = F.scaled_dot_product_attention(call.query, call.key, call.value)
    attended = attended.transpose(1, 2).flatten(2)
    found = projected[0][:, : attended.shape[1], :16]
    torch.testing.assert_close(found.sort(1).values, attended.sort(1).values)
    assert torch.equal(output_weight(block, path, 16), linear.weight[:, :16])


def test_images_of_a_flux_adapter_are_not_projected(kontext):
    network = kontext.transformer
    norms = ValueNorms([(network, "transformer_blocks.0.attn")])
    value = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    weight = network.transformer_blocks[0].attn.to_out[0].weight
    for adapted in (False, True):
        if adapted:
            from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

            processor = FluxIPAdapterAttnProcessor(16, 16)
            network.transformer_blocks[0].attn.set_processor(processor)
        expected = brought(value.double(), weight).float()
        torch.testing.assert_close(norms.of(0, 0, value), expected)
        expected = value.norm(dim=-1) if adapted else expected
        torch.testing.assert_close(norms.of(0, 1, value), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 40, 72])
def test_norms_are_as_exact_as_their_dtype(dtype, width):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(2 * width, 96).to(dtype)
    layer = nn.Module()
    layer.to_out = nn.ModuleList([linear, nn.Dropout(0.0)])
    layer.processor = None
    network = nn.ModuleDict({"attn": layer})
    value = torch.randn(2, 2, 7, width, generator=generator).to(dtype)
    found = ValueNorms([(network, "attn")]).of(0, 0, value)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    expected = brought(value.double(), linear.weight)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)


class Lora(nn.Module):
    """As of peft: shows the weight of what it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, states):
        return self.base_layer(states)


class Quantised(nn.Linear):
    def forward(self, states):
        return F.linear(states, self.weight.to(states.dtype), self.bias)


class Packed(torch.Tensor):
    """A tensor that passes for a floating-point one."""


def lora(linear):
    return Lora(linear)


def quantised(linear):
    made = Quantised(linear.in_features, linear.out_features)
    made.load_state_dict(linear.state_dict())
    return made


def packed(linear):
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Packed), requires_grad=False)
    return linear


def offloaded(linear):
    return linear.to("meta")


@pytest.mark.parametrize("change", [lora, quantised, packed, offloaded])
def test_projections_that_are_no_plain_matrix_are_refused(tiny, change):
    loop = tiny.loop()
    layer = next(m for n, m in loop.unet.named_modules() if n.endswith("attn2"))
    layer.to_out[0] = change(layer.to_out[0])
    message = "values='norm' needs output projections that are one matrix .* nor with a LoRA .* of"
    with pytest.raises(NotImplementedError, match=message):
        i2am.record(loop, layout=PATCHES, values="norm")
    i2am.record(loop, layout=PATCHES)


def test_projections_that_change_before_the_run_end_the_recording(tiny, oracle):
    loop = tiny.loop()
    plain = loop(tiny.reference(), steps=2)
    recorder = i2am.record(loop, layout=PATCHES, values="norm", time_groups=1)
    layer = next(m for n, m in loop.unet.named_modules() if n.endswith("attn2"))
    layer.to_out[0] = Lora(layer.to_out[0])
    with oracle.gives_up(recorder, NotImplementedError, "values='norm' needs output projections"):
        assert torch.equal(loop(tiny.reference(), steps=2), plain)


def test_weights_may_change_between_runs(tiny):
    loop, found = tiny.loop(), []
    with i2am.record(loop, layout=PATCHES, values="norm", time_groups=1) as recorder:
        for _ in range(2):
            loop(tiny.reference(), steps=1)
            found.append(recorder.maps().reference_to_generated("layer", values="norm"))
            for name, weight in loop.unet.named_parameters():
                if name.endswith("attn2.to_out.0.weight"):
                    weight.data *= 2
    torch.testing.assert_close(found[1][:, 0], 2 * found[0][:, 0])


def test_blocks_that_nobody_knows_are_refused(kontext):
    class Block(nn.Module):
        def __init__(self, attn, proj_out):
            super().__init__()
            self.attn, self.proj_out = attn, proj_out

    single = kontext.transformer.single_transformer_blocks[0]
    network = nn.ModuleDict({"block": Block(single.attn, single.proj_out)})
    message = "needs an output projection to_out of block.attn, .* of a Block takes .* not known"
    with pytest.raises(NotImplementedError, match=message):
        ValueNorms([(network, "block.attn")])
    double = kontext.transformer.transformer_blocks[0]
    double.attn.to_out[0] = nn.Linear(20, 16)
    norms = ValueNorms([(kontext.transformer, "transformer_blocks.0.attn")])
    with pytest.raises(
        NotImplementedError, match=r"of the 16 features of the heads of .*, got one"
    ):
        norms.of(0, 0, torch.ones(1, 2, 3, 8))


def test_sd3_projects_generated_queries_by_their_own(tiny):
    """The text's queries go through to_add_out."""
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        **HEADS,
    ).eval()
    parts = [("generated", "generated", (2, 4)), ("reference", "reference", (2, 4))]
    spans = joint(*parts, ("text", "text", (5,)))
    layout = TokenLayout("halves", lambda call, frame: spans, layers=r"attn$")
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.tensor([500.0]),
    }
    with torch.no_grad(), Spy() as spy:
        plain = network(**given).sample
    options = {"layout": layout, "num_inference_steps": 1, "time_groups": 1}
    with torch.no_grad(), i2am.record(network, **options, **BOTH) as recorder:
        assert torch.equal(network(**given).sample, plain)
    maps = recorder.maps()
    for number, layer in enumerate(maps.layers):
        weight = network.get_submodule(layer).to_out[0].weight
        expected = definitions(spy.calls[number::2], weight, slice(0, 8), slice(8, 16))
        assert_maps(maps, layer, expected, (2, 4), (2, 4))
