"""Where tensors go, against the lists of published names, and diffusers' own private converters."""

import functools

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

from i2am.models.conversion import SYSTEMS, component_of, convert_tensors, encoders
from i2am.models.conversion.describing import empty_pipeline
from i2am.models.conversion.rules import BUFFERS, unwrapped

TENSORS = {
    "paint-by-example": {"unet": 686, "vae": 248, "image_encoder": 476},
    "dci-vton": {"unet": 686, "vae": 248, "image_encoder": 476},
    "stableviton": {"unet": 686 + 298 + 2 + 234 + 18, "vae": 248, "image_encoder": 476},
    "custom": {"unet": 686, "vae": 248, "image_encoder": 807, "image_proj": 44},
}
DROPPED = {"paint-by-example": 12, "dci-vton": 12 + 32, "stableviton": 13 + 2, "custom": 0}


@functools.cache
def published(system):
    """The shapes of all tensors at full size, by component."""
    modules = empty_pipeline(system, {}).components
    return {
        name: {key: tuple(x.shape) for key, x in module.state_dict().items()}
        for name, module in modules.items()
        if isinstance(module, torch.nn.Module)
    }


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_published_tensor_has_its_place_and_its_shape(system, published_keys):
    shapes, dropped = {}, []
    for key, (shape, _) in published_keys(system).items():
        targets = component_of(system, key)
        assert targets is not None, key
        if not targets:
            dropped.append(key)
        for target in targets:
            component = shapes.setdefault(target.component, {})
            assert target.key not in component
            component[target.key] = target.shape_of(shape)
    assert {name: len(component) for name, component in shapes.items()} == TENSORS[system]
    assert len(dropped) == DROPPED[system]
    assert shapes == published(system)


@pytest.mark.parametrize(
    "key",
    [
        "betas_",
        "model.diffusion_model.",
        "model.diffusion_model.input_blocks.x.0.op.weight",
        "model.diffusion_model.input_blocks.1.2.norm.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.1.weight",
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.time_embed.1.weight",
        "model_ema.decay",
        "first_stage_model.encoder.down.0.attn.0.q.weight",
        "first_stage_model.decoder.up.x.block.0.conv1.weight",
        "first_stage_model.loss.logvar",
        "cond_stage_model.mapper.resblocks.0.attn.c_kv.weight",
        "cond_stage_model.mapper.ln.weight",
        "control_model.zero_convs.0.0.weight",
        "diffusion.unet.encoders.1.0.conv.extra.weight",
        "diffusion.unet.encoders.1.1.attention_3.q_proj.weight",
        "mlp.proj.3.weight",
        "dinov2.model.blocks.0.attn.kv.weight",
        "dinov2.model.register_tokens",
        "encoder.16.weight",
        "decoder.26.weight",
        "encoder.13.attention.k_proj.weight",
        "optimizer",
    ],
)
@pytest.mark.parametrize("system", SYSTEMS)
def test_unknown_tensors_have_none(system, key):
    targets = component_of(system, key)
    # where only the end of a name is wrong, the network has no such tensor
    assert targets is None or (
        targets and all(x.key not in published(system)[x.component] for x in targets)
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_only_what_is_known_to_be_no_weight_is_dropped(system, published_keys):
    names = [key for key in published_keys(system) if component_of(system, key) == ()]
    known = {*BUFFERS, "logvar", "lastzc.weight", "lastzc.bias"}
    assert all(name in known or name.startswith("vgg.conv") for name in names)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    "wrap",
    [
        *("_orig_mod.{}".format, "module.{}".format, "module._orig_mod.{}".format),
        "_fsdp_wrapped_module.{}".format,
        lambda key: key.replace(".", "._checkpoint_wrapped_module."),
        lambda key: key.replace("model.", "model.module."),
    ],
    ids=["compiled", "parallel", "both", "fsdp", "checkpointing", "inside"],
)
def test_names_of_wrapped_models_are_those_of_the_models(system, wrap, published_keys):
    for key in published_keys(system):
        assert unwrapped(key) == key
        assert component_of(system, wrap(key)) == component_of(system, key)


@pytest.mark.parametrize("key", ["my_module.x", "modules.x", "x.module", "_orig_mod_.x"])
def test_other_names_are_no_wrappers(key):
    assert unwrapped(key) == key


def test_unknown_system():
    with pytest.raises(ValueError, match=r"system must be one of paint-by-example, .* got 'sd'"):
        component_of("sd", "betas")


def test_unknown_name_in_memory():
    with pytest.raises(ValueError, match="betas is no tensor of a custom checkpoint"):
        convert_tensors("custom", {"betas": torch.zeros(1)})


@pytest.fixture(scope="module")
def tiny_tensors(tiny_keys, synthetic):
    """Tiny checkpoints of a system, made once."""
    made = {}

    def tensors(system):
        if system not in made:
            made[system] = synthetic(tiny_keys(system))
        return made[system]

    return tensors


def assert_same(result, expected):
    assert set(result) == set(expected)
    assert all(torch.equal(result[key], expected[key]) for key in expected)


@pytest.mark.parametrize("system", ["paint-by-example", "stableviton"])
def test_unet_as_diffusers_converts_it(system, tiny_tensors):
    tensors = tiny_tensors(system)
    config = {"layers_per_block": 2, "block_out_channels": (32, 64, 128, 128)}
    core = {key: x for key, x in tensors.items() if key.startswith("model.diffusion_model.")}
    expected = convert_ldm_unet_checkpoint(dict(core), config)
    result = convert_tensors(system, tensors)["unet"]
    extra = ("warp_", "spatial_encoder.")
    assert_same({k: x for k, x in result.items() if not k.startswith(extra)}, expected)
    assert len(expected) == 686


def test_spatial_encoder_as_diffusers_converts_such_a_half(tiny_tensors):
    tensors = tiny_tensors("stableviton")
    config = {"layers_per_block": 2, "block_out_channels": (32, 64, 128, 128)}
    half = {
        key.replace("control_model.", "model.diffusion_model."): x
        for key, x in tensors.items()
        if key.startswith("control_model.")
    }
    # the other half is needed to be asked for, not to be looked at
    rest = {
        key: x
        for key, x in tensors.items()
        if key.startswith(("model.diffusion_model.out.", "model.diffusion_model.output_blocks."))
    }
    expected = convert_ldm_unet_checkpoint({**rest, **half}, config)
    result = convert_tensors("stableviton", tensors)["unet"]
    ours = {
        key.removeprefix("spatial_encoder."): x
        for key, x in result.items()
        if key.startswith("spatial_encoder.") and "hint_conv" not in key
    }
    beginnings = ("time_embedding", "conv_in", "down_blocks", "mid_block")
    assert_same(ours, {key: x for key, x in expected.items() if key.startswith(beginnings)})
    assert len(ours) == 298
    for leaf in ("weight", "bias"):
        hint = result[f"spatial_encoder.hint_conv.{leaf}"]
        assert torch.equal(hint, tensors[f"control_model.cond_first_block.0.{leaf}"])


def test_warp_blocks_keep_their_names(tiny_tensors):
    tensors = tiny_tensors("stableviton")
    result = convert_tensors("stableviton", tensors)["unet"]
    old, new = "model.diffusion_model.warp_flow_blks.", "warp_blocks."
    names = {key: key.replace(old, new) for key in tensors if old in key}
    names |= {
        key: key.removeprefix("model.diffusion_model.") for key in tensors if "warp_zero" in key
    }
    assert len(names) == 234 + 18
    assert all(torch.equal(result[name], tensors[key]) for key, name in names.items())


def test_vae_as_diffusers_converts_it(tiny_tensors):
    tensors = tiny_tensors("paint-by-example")
    config = {"down_block_types": (None,) * 4, "up_block_types": (None,) * 4}
    vae = {key: x for key, x in tensors.items() if key.startswith("first_stage_model.")}
    expected = convert_ldm_vae_checkpoint(dict(vae), config)
    result = convert_tensors("paint-by-example", tensors)["vae"]
    # theirs leaves the attention's 1x1 convolutions to be reshaped when the model loads them
    shaped = {
        key: x[:, :, 0, 0] if ".attentions." in key and x.ndim == 4 else x
        for key, x in expected.items()
    }
    assert_same(result, shaped)


def test_both_ways_to_name_clip(tiny_tensors):
    tensors = {
        key: x
        for key, x in tiny_tensors("paint-by-example").items()
        if key.startswith("cond_stage_model.")
    }
    newer = {key.replace("vision_model.", ""): x for key, x in tensors.items()}
    assert len(newer.keys() - tensors.keys()) > 50
    assert_same(
        convert_tensors("paint-by-example", newer)["image_encoder"],
        convert_tensors("paint-by-example", tensors)["image_encoder"],
    )
    position_ids = "cond_stage_model.transformer.vision_model.embeddings.position_ids"
    assert component_of("paint-by-example", position_ids) == ()


def test_fused_thirds(tiny_tensors):
    tensors = tiny_tensors("custom")
    result = convert_tensors("custom", tensors)
    fused = tensors["diffusion.unet.encoders.1.1.attention_1.in_proj.weight"]
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_"
    for number, name in enumerate("qkv"):
        third = fused[32 * number : 32 * (number + 1)]
        assert torch.equal(result["unet"][f"{block}{name}.weight"], third)


def test_dinov2_in_the_words_of_an_older_transformers(monkeypatch):
    attention = "attention.attention."
    older = ("norm1", "norm2", "attention.output.dense", "mlp.weights_in", "mlp.weights_out")
    queries = tuple(attention + name for name in ("query", "key", "value"))
    monkeypatch.setattr(encoders, "dinov2_layer_names", lambda: frozenset(older + queries))

    def names(layer):
        targets = component_of("custom", f"dinov2.model.blocks.7.{layer}.weight")
        return [(x.key.removeprefix("encoder.layer.7."), x.part, x.parts) for x in targets]

    assert names("attn.qkv") == [(f"{name}.weight", i, 3) for i, name in enumerate(queries)]
    assert names("attn.proj") == [("attention.output.dense.weight", 0, 1)]
    assert names("mlp.w12") == [("mlp.weights_in.weight", 0, 1)]
    assert names("mlp.w3") == [("mlp.weights_out.weight", 0, 1)]
    assert names("norm1") == [("norm1.weight", 0, 1)]


# Against networks written here from nothing but their description


def norm(x, tensors, name, eps):
    width = x.shape[-1:]
    return torch.nn.functional.layer_norm(
        x, width, tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps
    )


def linear(x, tensors, name):
    return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def conv(x, tensors, name, **options):
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return torch.nn.functional.conv2d(x, weight, bias, **options)


def group_norm(x, tensors, name):
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return torch.nn.functional.group_norm(x, 32, weight, bias, eps=1e-6)


def attend(q, k, v):
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


@torch.no_grad()
def test_dinov2_computes_what_its_authors_layers_do(tiny_tensors):
    tensors = {
        key.removeprefix("dinov2.model."): x
        for key, x in tiny_tensors("custom").items()
        if key.startswith("dinov2.")
    }
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    patches = conv(images, tensors, "patch_embed.proj", stride=14).flatten(2).mT
    x = torch.cat([tensors["cls_token"].expand(2, -1, -1), patches], dim=1) + tensors["pos_embed"]
    for number in range(2):
        block = f"blocks.{number}"
        # one head, for the tiny model is one head wide
        q, k, v = linear(
            norm(x, tensors, f"{block}.norm1", 1e-6), tensors, f"{block}.attn.qkv"
        ).chunk(3, dim=-1)
        x = x + tensors[f"{block}.ls1.gamma"] * linear(
            attend(q, k, v), tensors, f"{block}.attn.proj"
        )
        gate, up = linear(
            norm(x, tensors, f"{block}.norm2", 1e-6), tensors, f"{block}.mlp.w12"
        ).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        x = x + tensors[f"{block}.ls2.gamma"] * linear(hidden, tensors, f"{block}.mlp.w3")
    expected = norm(x, tensors, "norm", 1e-6)

    pipeline, converted = with_weights("custom", tiny_tensors("custom"), "image_encoder")
    assert converted == 27 + 20
    result = pipeline.image_encoder(pixel_values=images).last_hidden_state
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def resnet(x, tensors, name):
    hidden = torch.nn.functional.silu(group_norm(x, tensors, f"{name}.groupnorm_1"))
    hidden = conv(hidden, tensors, f"{name}.conv_1", padding=1)
    hidden = torch.nn.functional.silu(group_norm(hidden, tensors, f"{name}.groupnorm_2"))
    hidden = conv(hidden, tensors, f"{name}.conv_2", padding=1)
    if f"{name}.residual_layer.weight" in tensors:
        x = conv(x, tensors, f"{name}.residual_layer")
    return x + hidden


def attention_block(x, tensors, name):
    tokens = group_norm(x, tensors, f"{name}.groupnorm").flatten(2).mT
    q, k, v = linear(tokens, tensors, f"{name}.attention.in_proj").chunk(3, dim=-1)
    tokens = linear(attend(q, k, v), tensors, f"{name}.attention.out_proj")
    return x + tokens.mT.reshape(x.shape)


def run_layers(x, tensors, half, layers):
    """Layers of an autoencoder in turn; what a number means follows from its tensors."""
    for number in range(layers):
        name = f"{half}.{number}"
        if f"{name}.attention.in_proj.weight" in tensors:
            x = attention_block(x, tensors, name)
        elif f"{name}.conv_1.weight" in tensors:
            x = resnet(x, tensors, name)
        elif f"{name}.weight" not in tensors:  # without weights
            last = number > layers - 4
            x = (
                torch.nn.functional.silu(x)
                if last
                else torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            )
        elif tensors[f"{name}.weight"].ndim == 1:
            x = group_norm(x, tensors, name)
        elif tensors[f"{name}.weight"].shape[-1] == 1:
            x = conv(x, tensors, name)
        elif half == "encoder" and number in (3, 6, 9):
            x = conv(torch.nn.functional.pad(x, (0, 1, 0, 1)), tensors, name, stride=2)
        else:
            x = conv(x, tensors, name, padding=1)
    return x


@torch.no_grad()
def test_custom_vae_computes_what_its_layers_do(tiny_tensors):
    tensors = tiny_tensors("custom")
    pipeline, converted = with_weights("custom", tensors, "vae")
    assert converted == 248
    images = torch.randn(1, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    moments = run_layers(images, tensors, "encoder", 19)
    torch.testing.assert_close(
        pipeline.vae.encode(images).latent_dist.parameters, moments, atol=1e-5, rtol=1e-5
    )
    latents = moments[:, :4]
    torch.testing.assert_close(
        pipeline.vae.decode(latents).sample,
        run_layers(latents, tensors, "decoder", 26),
        atol=1e-5,
        rtol=1e-5,
    )


def with_weights(system, tensors, component):
    """An empty pipeline whose one component has got its weights, and how many tensors these are."""
    converted = convert_tensors(system, tensors)
    shapes = {
        name: {key: tuple(x.shape) for key, x in part.items()} for name, part in converted.items()
    }
    pipeline = empty_pipeline(system, shapes)
    module = getattr(pipeline, component)
    module.load_state_dict(converted[component], assign=True)
    return pipeline, len(converted[component])
