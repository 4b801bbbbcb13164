"""StableVITON's networks against diffusers' own forward pass, and what they are made of."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from i2am.models import StableVITONUNet

# in_channels of a warp block, channels of its keys, heads and their width
PUBLISHED_WARPS = [
    (1280, 1280, 8, 160),
    (1280, 1280, 8, 160),
    (1280, 640, 8, 160),
    (1280, 640, 8, 160),
    (640, 640, 8, 80),
    (640, 320, 8, 80),
    (640, 320, 8, 80),
    (320, 320, 8, 40),
    (320, 320, 8, 40),
]
OURS = ("spatial_encoder.", "warp_blocks.", "warp_zero_convs.")


@pytest.fixture
def unet(stableviton_unet):
    return stableviton_unet


def inputs(size=(16, 12), samples=2, seed=0):
    """Sample, timesteps, context and hint of a tiny network."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(samples, 13, *size), (samples, 1, 24), (samples, 4, *size)]
    sample, context, hint = (torch.randn(shape, generator=generator) for shape in shapes)
    return sample, torch.tensor([7, 801][:samples]), context, hint


def plain(unet, state):
    """diffusers' UNet of the same sizes with some of the weights."""
    settings = {name: value for name, value in unet.config.items() if name[0] != "_"}
    del settings["hint_channels"]
    network = UNet2DConditionModel(**settings).to(unet.dtype).eval()
    report = network.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    return network, report.missing_keys


def core(unet):
    return {key: x for key, x in unet.state_dict().items() if not key.startswith(OURS)}


def composed(unet, sample, timesteps, context, hint):
    """The prediction, by hooks on two of diffusers' UNets."""
    # the spatial encoder: one UNet, of which the decoder's output is thrown away
    half = {
        key.removeprefix(OURS[0]): x
        for key, x in unet.state_dict().items()
        if key.startswith(OURS[0]) and ".hint_conv." not in key
    }
    encoder, missing = plain(unet, half)
    assert missing
    assert all(key.startswith(("up_blocks.", "conv_norm_out.", "conv_out.")) for key in missing)
    features = []
    hint_conv = unet.spatial_encoder.hint_conv

    def add_hint(module, args, output):
        features.append(output + hint_conv(hint))
        return features[0]

    encoder.conv_in.register_forward_hook(add_hint)
    for block in encoder.down_blocks:
        block.register_forward_hook(lambda module, args, output: features.extend(output[1]))
    encoder(sample, timesteps, context)

    # the decoder: what a residual block is given, hidden state and skip connection, is taken apart
    network, missing = plain(unet, core(unet))
    assert not missing
    resnets = [resnet for block in network.up_blocks for resnet in block.resnets]
    # the last feature belongs to the first skip connection
    by_resnet = dict(zip(resnets, reversed(features), strict=True))
    untouched = len(network.up_blocks[0].resnets)

    def attach(resnet, warp, zero_conv):
        feature = by_resnet[resnet]

        def change(module, args):
            both, *rest = args
            width = both.shape[1] - feature.shape[1]
            hidden = both[:, :width]
            keys = feature.permute(0, 2, 3, 1).reshape(len(feature), -1, feature.shape[1])
            hidden = hidden + zero_conv(warp(hidden, encoder_hidden_states=keys).sample)
            return torch.cat([hidden, both[:, width:]], dim=1), *rest

        resnet.register_forward_pre_hook(change)

    for number, resnet in enumerate(resnets[untouched:]):
        attach(resnet, unet.warp_blocks[number], unet.warp_zero_convs[number])
    return network(sample, timesteps, context).sample


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 12), (15, 11), (8, 20)], ids=str)
def test_forward_equals_a_composition_of_diffusers_unets(unet, size) -> None:
    sample, timesteps, context, hint = inputs(size)
    expected = composed(unet, sample, timesteps, context, hint)
    result = unet(sample, timesteps, context, hint).sample
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5 * float(expected.std()))
    assert torch.equal(unet(sample, timesteps, context, hint, return_dict=False)[0], result)
    one = unet(sample[:1], 7, context[:1], hint=hint[:1]).sample
    torch.testing.assert_close(one[0], result[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_part_has_a_share_in_the_prediction(unet) -> None:
    sample, timesteps, context, hint = inputs()
    expected = unet(sample, timesteps, context, hint).sample
    scale = float(expected.std())
    changed = unet(sample, timesteps, context, hint + 1).sample
    assert (changed - expected).abs().max() > 1e-2 * scale
    for number in range(len(unet.warp_blocks)):
        handle = unet.warp_zero_convs[number].register_forward_hook(lambda m, a, output: 0 * output)
        without = unet(sample, timesteps, context, hint).sample
        handle.remove()
        assert (without - expected).abs().max() > 1e-3 * scale, number


@torch.no_grad()
def test_the_spatial_encoder_sees_the_context_too(unet) -> None:
    sample, timesteps, context, hint = inputs()
    time = unet.get_time_embed(sample, timesteps)
    features = [unet.spatial_encoder(sample, time, x, hint, levels=2) for x in (context, -context)]
    assert not torch.allclose(features[0][1], features[1][1], rtol=0, atol=1e-3)


@torch.no_grad()
def test_features_of_some_levels_are_the_first_of_all(unet) -> None:
    sample, timesteps, context, hint = inputs()
    arguments = (sample, unet.get_time_embed(sample, timesteps), context, hint)
    every = unet.spatial_encoder(*arguments)
    # one of the first convolution, three per level with halving, two of the last, the middle block
    assert [tuple(feature.shape[1:]) for feature in every] == [
        *[(16, 16, 12)] * 3,
        (16, 8, 6),
        *[(32, 8, 6)] * 2,
        *[(32, 4, 3)] * 4,
    ]
    some = unet.spatial_encoder(*arguments, levels=2)
    assert len(some) == 7
    assert all(map(torch.equal, some, every))


@torch.no_grad()
def test_a_fresh_network_is_the_unet_it_was_made_of() -> None:
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    unet = StableVITONUNet(**settings).eval()
    assert len(unet.warp_blocks) == 2
    sample, timesteps, context, hint = inputs()
    network, missing = plain(unet, core(unet))
    assert not missing
    expected = network(sample, timesteps, context).sample
    torch.testing.assert_close(unet(sample, timesteps, context, hint).sample, expected)
    for block in (unet.spatial_encoder.down_blocks, unet.spatial_encoder.mid_block):
        assert all(parameter.requires_grad for parameter in block.parameters())
    assert torch.equal(unet.spatial_encoder.conv_in.weight, unet.conv_in.weight)
    assert unet.spatial_encoder.conv_in.weight is not unet.conv_in.weight


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        unet = StableVITONUNet()
    names = ("in_channels", "cross_attention_dim", "num_attention_heads", "attention_head_dim")
    found = [tuple(block.config[name] for name in names) for block in unet.warp_blocks]
    assert found == PUBLISHED_WARPS
    names = list(unet.state_dict())
    assert len(names) == 686 + 298 + 2 + 9 * 26 + 9 * 2
    assert len(core(unet)) == 686
    assert tuple(unet.conv_in.weight.shape) == (320, 13, 3, 3)
    assert tuple(unet.spatial_encoder.hint_conv.weight.shape) == (320, 4, 3, 3)
    encoder = sum(parameter.numel() for parameter in unet.spatial_encoder.parameters())
    assert round(encoder / 1e6, 2) == 348.75


@torch.no_grad()
def test_round_trip(unet, tmp_path) -> None:
    unet.save_pretrained(tmp_path)
    loaded, report = StableVITONUNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    state = loaded.state_dict()
    assert all(torch.equal(state.pop(name), x) for name, x in unet.state_dict().items())
    assert not state
    assert set(loaded.config) - {"_class_name", "_diffusers_version", "_name_or_path"} == {
        name for name in unet.config if name[0] != "_"
    }


@pytest.mark.parametrize("shape", [(1, 4, 16, 12), (2, 3, 16, 12), (2, 4, 8, 6)], ids=str)
def test_a_hint_of_another_shape_is_refused(unet, shape) -> None:
    sample, timesteps, context, _ = inputs()
    with pytest.raises(ValueError, match=r"hint must have shape \[2, 4, 16, 12\], got \["):
        unet(sample, timesteps, context, torch.zeros(shape))


def test_what_would_be_ignored_is_refused(unet) -> None:
    with pytest.raises(NotImplementedError, match="StableVITONUNet does not support FreeU"):
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        unet.enable_gradient_checkpointing()
