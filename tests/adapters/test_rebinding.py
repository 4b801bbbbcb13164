"""Processors of diffusers beside the plain ones: recorded in their own code, whatever attends."""

import copy
import io
import itertools
import pickle
import sys
import threading
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    MochiTransformer3DModel,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from i2am.adapters.attention.attending import attend_by
from i2am.adapters.attention.sites import LISTENERS
from i2am.adapters.attention.tap import LayerCall, Tap, tap
from i2am.adapters.guard import Guard

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
BLOCKS = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
TEXT = {"text_encoder": None, "tokenizer": None}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def photo(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def kontext() -> tuple[Any, dict[str, Any]]:
    pipe = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(**BLOCKS, shift_factor=0.1, scaling_factor=1.5),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
            **HEADS,
        ),
        text_encoder_2=None,
        tokenizer_2=None,
        **TEXT,
    )
    return pipe, {
        "image": photo(40, 24),
        "height": 24,
        "width": 40,
        "max_area": 24 * 40,
        "_auto_resize": False,
        "prompt_embeds": noise(1, 6, 24),
        "pooled_prompt_embeds": noise(1, 20),
    }


def klein_kv() -> tuple[Any, dict[str, Any]]:
    pipe = Flux2KleinKVPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(**BLOCKS),
        transformer=Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
            **HEADS,
        ),
        is_distilled=True,
        **TEXT,
    )
    pictures = {"image": [photo(64, 64)], "height": 64, "width": 96}
    return pipe, {"prompt_embeds": noise(1, 5, 24), **pictures}


def sd3(dual: tuple[int, ...] = (0,)) -> tuple[Any, dict[str, Any]]:
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            num_layers=3,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=20,
            out_channels=4,
            pos_embed_max_size=24,
            dual_attention_layers=dual,
            qk_norm="rms_norm",
            **HEADS,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(**BLOCKS, shift_factor=0.1, scaling_factor=1.5),
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
        **TEXT,
    )
    return pipe, {
        "height": 24,
        "width": 40,
        "prompt_embeds": noise(1, 7, 24),
        "pooled_prompt_embeds": noise(1, 20),
        "negative_prompt_embeds": noise(1, 7, 24, seed=1),
        "negative_pooled_prompt_embeds": noise(1, 20, seed=1),
    }


def qwen_edit() -> tuple[Any, dict[str, Any]]:
    pipe = QwenImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=24,
            axes_dims_rope=(8, 4, 4),
            **HEADS,
        ),
        processor=None,
        **TEXT,
    )
    mask = torch.ones(1, 7, dtype=torch.long)
    mask[:, 5:] = 0  # padding that the layers mask
    return pipe, {
        "image": photo(40, 64),
        "height": 24,
        "width": 40,
        "prompt_embeds": noise(1, 7, 24),
        "prompt_embeds_mask": mask,
        "true_cfg_scale": 1.0,
    }


def wan() -> tuple[Any, dict[str, Any]]:
    encoder = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=32,
        patch_size=8,
    )
    pipe = WanImageToVideoPipeline(
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
        ),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            in_channels=12,
            out_channels=4,
            text_dim=12,
            freq_dim=8,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
            image_dim=20,
            added_kv_proj_dim=32,
            **HEADS,
        ),
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        image_encoder=CLIPVisionModel(encoder),
        **TEXT,
    )
    return pipe, {
        "image": photo(32, 48),
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "prompt_embeds": noise(1, 512, 12),
        "negative_prompt_embeds": noise(1, 512, 12, seed=1),
    }


FAMILIES = {f.__name__: f for f in (kontext, klein_kv, sd3, qwen_edit, wan)}


@pytest.fixture
def make(monkeypatch) -> Callable[..., Any]:
    """A pipeline of a family, `run()` and the arguments of its transformer's first call."""
    # one megapixel otherwise
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (64, 48, None))

    def make(family: str, **options: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe, inputs = FAMILIES[family](**options)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        pipe.set_progress_bar_config(disable=True)

        def run(steps: int = 2, **more: Any) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            options = {"num_inference_steps": steps, "output_type": "latent"}
            return pipe(**inputs, **options, generator=generator, **more)[0]

        def arguments() -> dict[str, Any]:
            given: list[dict[str, Any]] = []
            hook = pipe.transformer.register_forward_pre_hook(
                lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
            )
            run()
            hook.remove()
            return {k: v for k, v in given[0].items() if not k.endswith("attention_kwargs")}

        return SimpleNamespace(
            pipe=pipe, transformer=pipe.transformer, run=run, arguments=arguments
        )

    return make


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _grouped(self, attn, hidden_states, *_, gqa=False, causal=False, **__):
    query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    key = attn.to_k(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    if gqa:
        key = key[:, :1]
    output = F.scaled_dot_product_attention(query, key, key, enable_gqa=gqa, is_causal=causal)
    return output.transpose(1, 2).flatten(2)


def stand_ins() -> set[str]:
    return {name for name in sys.modules if name.startswith("i2am.adapters.attention.stand_ins.")}


def processors(network: torch.nn.Module) -> list[Any]:
    return [module.processor for module in network.modules() if hasattr(module, "get_processor")]


def kinds(network: torch.nn.Module) -> list[tuple[int, type, list[str]]]:
    return [(id(p), type(p), sorted(vars(p))) for p in processors(network)]


def key_of(call: LayerCall) -> tuple[str, int]:
    return call.layer.path, call.index


@pytest.mark.parametrize("family", FAMILIES)
def test_every_call_is_recorded_and_the_image_stays_the_same(make, oracle, family):
    made, seen = make(family), []
    with oracle.spy(
        made.transformer, made.pipe.scheduler, layers=("attn", "attn1", "attn2")
    ) as spied:
        plain = made.run()
    before = kinds(made.transformer)
    with tap(made.transformer, listen=seen.append) as lent:
        assert all(type(p).__name__.startswith("Recording") for p in processors(made.transformer))
        assert torch.equal(made.run(), plain)
    assert plain.isfinite().all()
    assert kinds(made.transformer) == before
    assert torch.equal(made.run(), plain)
    assert {call.layer.path for call in seen} == {layer.path for layer in lent.layers}
    assert [key_of(call) for call in seen] == [(call.layer, call.call_index) for call in spied]
    for call, expected in zip(seen, spied, strict=True):
        assert torch.equal(call.query, expected.query)
        assert torch.equal(call.key, expected.key)
        assert (call.bias is None) == (expected.bias is None)
        assert call.bias is None or torch.equal(call.bias, expected.bias)
        if call.query_lse is None:
            assert call.bias is not None  # PyTorch tells none of a bool mask
        else:
            lse = expected.logits().logsumexp(-1)
            torch.testing.assert_close(call.query_lse.double(), lse, rtol=1e-5, atol=1e-5)
    assert any(call.index == 1 for call in seen) == (family in ("klein_kv", "wan"))
    assert any(call.bias is not None for call in seen) == (family == "qwen_edit")


@pytest.mark.slow
@pytest.mark.parametrize("regionally", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_graphs_keep_every_record(make, fresh_compiler, family, regionally):
    made = make(family)
    network, arguments, eager = made.transformer, made.arguments(), []
    if regionally and not network._repeated_blocks:
        pytest.skip("diffusers names no repeated blocks of this model")
    with torch.no_grad(), tap(network, listen=eager.append):
        expected = network(**arguments)[0]
    backend = CompileCounterWithBackend("aot_eager")
    call: Any = network
    if regionally:
        network.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        call = torch.compile(network, backend=backend, fullgraph=True)
    with torch.no_grad():
        call(**arguments)
        graphs = backend.frame_count
        for repetition in range(3):
            seen: list[LayerCall] = []
            with tap(call, listen=seen.append):
                output = call(**arguments)[0]
            # one more of each, with the recording in it: for all layers and later recordings
            if not repetition:
                recording = backend.frame_count
                assert graphs < recording <= 2 * graphs
            torch.testing.assert_close(output, expected)
            assert [key_of(call) for call in seen] == [key_of(call) for call in eager]
            for one, other in zip(seen, eager, strict=True):
                torch.testing.assert_close(one.query, other.query)
                torch.testing.assert_close(one.key, other.key)
        call(**arguments)
    assert backend.frame_count == recording
    assert not stand_ins()


def test_a_graph_may_attend_by_the_kernels(make, fresh_compiler):
    made, seen = make("kontext"), []
    arguments, network = (
        made.arguments(),
        torch.compile(made.transformer, backend="aot_eager", fullgraph=True),
    )
    with torch.no_grad():
        expected = network(**arguments)[0]
        with Tap(
            network,
            layers=lambda path: True,
            listen=lambda *call: seen.append(call),
            attend=attend_by("fused", "reference"),
        ):
            torch.testing.assert_close(network(**arguments)[0], expected, rtol=1e-4, atol=1e-4)
    assert [layer for layer, *_ in seen] == [0, 1, 2, 3]
    assert all(lse is not None for *_, lse, _, _ in seen)


@pytest.fixture
def native_again():
    """`set_attention_backend` of one model is that of all."""
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield
    registry.set_active_backend(before)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["kontext", "wan"])
def test_other_backends_are_recorded(make, native_again, family):
    made, native, seen = make(family), [], []
    with tap(made.transformer, listen=native.append):
        made.run(steps=1)
    made.transformer.set_attention_backend("flex")
    plain = made.run(steps=1)
    with tap(made.transformer, listen=seen.append):
        assert torch.equal(made.run(steps=1), plain)
    assert [key_of(call) for call in seen] == [key_of(call) for call in native]
    for one, other in zip(seen, native, strict=True):
        torch.testing.assert_close(one.query, other.query, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.key, other.key, rtol=1e-4, atol=1e-4)
        assert one.query_lse is None


def test_a_backend_that_is_set_meanwhile_stays(make, native_again):
    made = make("kontext")
    with tap(made.transformer, listen=lambda call: None):
        made.transformer.set_attention_backend("_native_math")
    backends = {p._attention_backend for p in processors(made.transformer)}
    assert backends == {attention_dispatch.AttentionBackendName._NATIVE_MATH}


def test_layers_that_share_a_processor_are_told_apart(make):
    made, seen = make("sd3"), []
    block = made.transformer.transformer_blocks[0]
    shared = block.attn.processor
    assert shared is block.attn2.processor
    with tap(made.transformer, layers=lambda path: path.endswith(".attn"), listen=seen.append):
        assert block.attn2.processor is shared
        made.run(steps=1)
    names = {f"transformer_blocks.{index}.attn" for index in range(3)}
    assert {call.layer.path for call in seen} == names
    assert len(seen) == 3
    seen.clear()
    with tap(made.transformer, listen=seen.append):
        made.run(steps=1)
    generated = {call.layer.path: call.query.shape[2] for call in seen}
    # the image alone, without the 7 tokens of text
    assert generated["transformer_blocks.0.attn2"] == generated["transformer_blocks.0.attn"] - 7
    assert block.attn.processor is block.attn2.processor is shared
    assert vars(shared) == {}


class Stop(Exception):
    pass


@pytest.mark.parametrize("family", ["klein_kv", "sd3"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_everything_is_given_back_after_an_error(make, family, error):
    made = make(family)
    before, listeners, plain = kinds(made.transformer), dict(LISTENERS), made.run()

    def fail(module, args):
        raise error

    inside = made.transformer.transformer_blocks[1].attn.to_out[0]
    hook = inside.register_forward_pre_hook(fail)
    with pytest.raises(error), tap(made.transformer, listen=lambda call: None):
        made.run()
    hook.remove()
    assert kinds(made.transformer) == before
    assert listeners == LISTENERS
    assert not stand_ins()
    assert not made.transformer._forward_pre_hooks
    seen: list[LayerCall] = []
    assert torch.equal(made.run(), plain)
    with tap(made.transformer, listen=seen.append):
        assert torch.equal(made.run(), plain)
    assert seen


def test_stand_ins_stay_as_long_as_anybody_records(make):
    one, other = make("kontext"), make("kontext")
    first, second = [], []
    with tap(one.transformer, listen=first.append):
        with tap(other.transformer, listen=second.append):
            one.run(steps=1)
        assert len(stand_ins()) == 2  # of the module and of its F
        assert len(first) == 4
        assert not second
        other.run(steps=1)
        assert len(first) == 4
    assert not stand_ins()


def test_several_networks_have_layers_of_the_same_names(make):
    one, other = make("kontext"), make("kontext")
    seen, calls = [], []
    tapped = Tap(
        [one.transformer, other.transformer],
        layers=lambda path: path.startswith("single"),
        listen=lambda layer, *call: seen.append(layer),
        before=lambda network, args, kwargs: calls.append((network, "before")),
        after=lambda network: calls.append((network, "after")),
    )
    paths = [f"single_transformer_blocks.{index}.attn" for index in range(2)]
    assert [(layer.network, layer.path) for layer in tapped.layers] == [
        (network, path) for network in range(2) for path in paths
    ]
    with tapped:
        with pytest.raises(RuntimeError, match="must be detached before it is attached again"):
            tapped.attach()
        other.run(steps=1)
        one.run(steps=1)
    assert seen == [2, 3, 0, 1]
    assert calls == [(1, "before"), (1, "after"), (0, "before"), (0, "after")]
    other.run(steps=1)
    assert len(seen) == 4


def test_a_processor_that_is_installed_meanwhile_is_left_alone(make):
    made, seen, theirs = make("kontext"), [], FluxAttnProcessor()
    layers = [m for m in made.transformer.modules() if hasattr(m, "get_processor")]
    tapped = Tap(made.transformer, layers=lambda path: True, listen=lambda *call: seen.append(call))
    with tapped:
        layers[0].set_processor(theirs)
        # as loading an adapter does it
        layers[1].set_processor(type(layers[1].processor)())
        made.run(steps=1)
        lost = {layer.path: type(processor).__name__ for layer, processor in tapped.lost().items()}
    assert lost == {
        "transformer_blocks.0.attn": "FluxAttnProcessor",
        "transformer_blocks.1.attn": "RecordingFluxAttnProcessor",
    }
    assert [layer for layer, *_ in seen] == [2, 3]
    assert layers[0].processor is theirs
    assert {type(p) for p in processors(made.transformer)} == {FluxAttnProcessor}
    assert not tapped.lost()


def test_projections_fused_while_recording(make):
    """diffusers keeps our processors and brings them back afterwards: they only attend."""
    made, seen = make("sd3", dual=()), []
    plain = made.run()
    made.transformer.fuse_qkv_projections()
    fused = made.run()
    made.transformer.unfuse_qkv_projections()
    with tap(made.transformer, listen=seen.append):
        made.transformer.fuse_qkv_projections()
        made.run(steps=1)
    assert not seen
    assert {type(p) for p in processors(made.transformer)} == {FusedJointAttnProcessor2_0}
    with tap(made.transformer, listen=seen.append):
        assert torch.equal(made.run(), fused)
    assert len(seen) == 2 * 3
    made.transformer.unfuse_qkv_projections()
    seen.clear()
    assert torch.equal(made.run(), plain)
    assert not seen
    # and are recorded like the ones they stand for
    with tap(made.transformer, listen=seen.append):
        assert torch.equal(made.run(), plain)
    assert len(seen) == 2 * 3
    assert all(isinstance(p, JointAttnProcessor2_0) for p in processors(made.transformer))


@pytest.mark.parametrize("way", [copy.deepcopy, "pickle"], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("family", ["kontext", "sd3", "unet", "watched"])
def test_copies_of_a_recorded_model_are_plain_models(make, tiny, way, family):
    seen: list[Any] = []
    if family in FAMILIES:
        made = make(family)
        network, arguments = made.transformer, made.arguments()
    else:
        network = tiny.unet()
        if family == "watched":
            pipe = tiny.ip_adapters(tiny.stable_diffusion(), "base")
            network = pipe.unet
        arguments = {
            "sample": noise(1, 4, 8, 8),
            "timestep": torch.tensor(3),
            "encoder_hidden_states": noise(1, 7, 16),
        }
        if family == "watched":
            arguments["added_cond_kwargs"] = {"image_embeds": [noise(1, 1, 12)]}
    before = [type(p) for p in processors(network)]
    with torch.no_grad():
        expected = network(**arguments)[0]
        with Tap(
            network,
            layers=lambda path: True,
            listen=lambda *call: seen.append(call),
            before=lambda network, args, kwargs: seen.append("before"),
        ):
            if way == "pickle":
                made_anew = pickle.loads(pickle.dumps(network))
            else:
                made_anew = copy.deepcopy(network)
            assert torch.equal(made_anew(**arguments)[0], expected)
            assert not seen
            torch.save(network, io.BytesIO())
            assert torch.equal(network(**arguments)[0], expected)
            assert seen[0] == "before"
    assert [type(p) for p in processors(made_anew)] == before


def test_calls_of_other_threads_are_not_recorded(make):
    made, seen, entered, left = make("kontext"), [], threading.Event(), threading.Event()
    plain, results, arguments = made.run(), [], made.arguments()

    def elsewhere():
        with torch.no_grad():
            results.append(made.transformer(**arguments)[0])
            assert entered.wait(60)
            results.append(made.transformer(**arguments)[0])
        left.set()

    thread = threading.Thread(target=elsewhere)
    with tap(made.transformer, listen=seen.append):
        thread.start()
        entered.set()
        # while the other thread attends by the same processors
        recorded = made.run()
        assert left.wait(60)
        thread.join()
    assert torch.equal(recorded, plain)
    assert torch.equal(*results)
    paths = [f"transformer_blocks.{index}.attn" for index in range(2)]
    paths += [f"single_{path}" for path in paths]
    assert [key_of(call) for call in seen] == [(path, 0) for path in paths] * 2


def test_gradients_flow_back_from_what_is_handed_over(make):
    made, seen = make("kontext"), []
    arguments, network = made.arguments(), made.transformer
    with tap(network, layers=lambda path: "single" in path, listen=seen.append, graph=True):
        network(**arguments)
    last = seen[-1]
    (last.query.square().mean() + last.key.square().mean()).backward()
    attention = network.single_transformer_blocks[1].attn
    assert attention.to_q.weight.grad.any()
    assert attention.to_k.weight.grad.any()
    assert attention.to_v.weight.grad is None
    network.zero_grad()
    seen.clear()
    with tap(network, listen=seen.append):
        network(**arguments)
    assert not any(call.query.requires_grad or call.key.requires_grad for call in seen)
    with pytest.raises(NotImplementedError, match="networks must not be compiled where graph=True"):
        Tap(torch.compile(network), layers=bool, listen=print, graph=True)
    network.single_transformer_blocks[0].compile()
    with pytest.raises(NotImplementedError, match="networks must not be compiled where graph=True"):
        Tap(network, layers=bool, listen=print, graph=True)


def test_what_somebody_has_patched_is_what_runs(make, monkeypatch):
    made, seen, patched = make("kontext"), [], itertools.count()
    plain = made.run(steps=1)
    original = transformer_flux.apply_rotary_emb

    def apply(*args, **kwargs):
        next(patched)
        return original(*args, **kwargs)

    with tap(made.transformer, listen=seen.append):
        assert torch.equal(made.run(steps=1), plain)
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", apply)
    dispatch = transformer_flux.dispatch_attention_fn
    monkeypatch.setattr(
        transformer_flux, "dispatch_attention_fn", lambda *a, **k: dispatch(*a, **k) * 2
    )
    expected = made.run(steps=1)
    assert not torch.equal(expected, plain)
    before = next(patched)
    with tap(made.transformer, listen=seen.append):
        assert torch.equal(made.run(steps=1), expected)
    assert next(patched) == 2 * before + 1
    assert len(seen) == 2 * 4


def test_attention_of_somebody_else_in_the_place_of_pytorchs(make, monkeypatch):
    """As SageAttention asks its users to put it there."""
    made, seen = make("sd3"), []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: original(*a, **k) * 2)
    plain = made.run(steps=1)
    with tap(made.transformer, listen=seen.append):
        assert torch.equal(made.run(steps=1), plain)
    assert len(seen) == 4
    assert {call.query_lse for call in seen} == {None}


def test_a_fault_of_the_listener_ends_the_recording_alone(make):
    made, seen, faults = make("klein_kv"), [], []
    before, plain = kinds(made.transformer), made.run()

    def give_up(error):
        faults.append(error)
        tapped.detach()

    def listen(layer, *call):
        seen.append(layer)
        if len(seen) == 3:  # between the two calls of the second layer
            raise Stop

    guard = Guard(give_up)
    listening = guard.around(listen)
    tapped = Tap(made.transformer, layers=lambda path: True, listen=listening, guard=guard)
    with tapped:
        assert torch.equal(made.run(), plain)
        assert kinds(made.transformer) == before
        assert not stand_ins()
    assert seen == [0, 0, 1]
    assert [type(fault) for fault in faults] == [Stop]


def test_a_mask_by_key_and_masks_that_cannot_be(make):
    made, seen = make("kontext"), []
    attention = made.transformer.single_transformer_blocks[0].attn
    states = noise(2, 9, 32)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    with torch.no_grad(), tap(made.transformer, listen=seen.append):
        attention(states, attention_mask=mask)
        attention(states, attention_mask=mask.float().log())
        assert [call.bias.shape for call in seen] == [(2, 1, 1, 9)] * 2
        assert torch.equal(seen[0].bias[:, 0, 0], mask)
        assert seen[0].query_lse is None
        scores = seen[1].query @ seen[1].key.mT * 16**-0.5 + seen[1].bias
        torch.testing.assert_close(seen[1].query_lse, scores.logsumexp(-1))
        with attention_dispatch.attention_backend("flex"):
            blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, 9, 9, device="cpu")
            with pytest.raises(NotImplementedError, match=r"a mask of blocks .* got a BlockMask"):
                attention(states, attention_mask=blocks)


def test_grouped_and_causal_attention(make):
    """As other processors of diffusers make the calls."""
    made, seen = make("sd3"), []

    class Grouped(JointAttnProcessor2_0):
        __module__ = JointAttnProcessor2_0.__module__

        __call__ = types.FunctionType(_grouped.__code__, vars(attention_processor), "__call__")
        __call__.__kwdefaults__ = _grouped.__kwdefaults__

    attention = made.transformer.transformer_blocks[1].attn
    attention.set_processor(Grouped())
    with tap(made.transformer, layers=lambda p: "1.attn" in p, listen=seen.append):
        output = attention(noise(1, 9, 32), gqa=True)
    (call,) = seen
    assert call.key.shape == call.query.shape == (1, 2, 9, 16)
    assert torch.equal(call.key[:, 0], call.key[:, 1])
    torch.testing.assert_close(
        F.scaled_dot_product_attention(call.query, call.key, call.key).transpose(1, 2).flatten(2),
        output,
    )
    with (
        tap(made.transformer, layers=lambda p: "1.attn" in p, listen=seen.append),
        pytest.raises(NotImplementedError, match="causal attention is not supported"),
    ):
        attention(noise(1, 9, 32), causal=True)


def test_attention_over_several_devices_is_refused(make):
    made = make("kontext")
    before = kinds(made.transformer)
    last = made.transformer.single_transformer_blocks[1].attn.processor
    last._parallel_config = object()
    with (
        pytest.raises(NotImplementedError, match=r"spread over devices \(enable_parallelism\)"),
        tap(made.transformer, listen=print),
    ):
        pass
    del last._parallel_config
    assert kinds(made.transformer) == before
    assert not stand_ins()


def test_layers_that_have_but_a_processor():
    """Mochi attends once for each sample, over its own length of text."""
    torch.manual_seed(0)
    network = MochiTransformer3DModel(
        patch_size=2,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=8,
        num_attention_heads=2,
        attention_head_dim=8,
    ).eval()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    arguments = {
        "hidden_states": noise(2, 4, 2, 4, 6),
        "encoder_hidden_states": noise(2, 6, 16),
        "timestep": torch.tensor([3, 3]),
        "encoder_attention_mask": mask,
    }
    seen: list[LayerCall] = []
    with torch.no_grad():
        plain = network(**arguments)[0]
        original = network.transformer_blocks[0].attn1.processor
        with tap(network, listen=seen.append):
            assert torch.equal(network(**arguments)[0], plain)
    assert network.transformer_blocks[0].attn1.processor is original
    paths = [f"transformer_blocks.{index}.attn1" for index in range(2)]
    assert [key_of(call) for call in seen] == [(path, n) for path in paths for n in range(2)]
    assert [tuple(call.key.shape) for call in seen] == [(1, 2, 18, 8), (1, 2, 16, 8)] * 2


def test_no_layer_that_matches_is_refused(make):
    with pytest.raises(ValueError, match="layers must match an attention layer of FluxTrans"):
        Tap(make("kontext").transformer, layers=lambda path: path == "attn", listen=print)
