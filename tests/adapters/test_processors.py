"""Single attention modules: what a recorded one computes, and what it hands on."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)

import i2am
from i2am.adapters.attention import processors
from i2am.layouts import TokenLayout

OPTIONS = [
    {},
    {"norm_num_groups": 4, "bias": True},
    {"qk_norm": "rms_norm"},
    {"qk_norm": "layer_norm", "residual_connection": True, "rescale_output_factor": 2.0},
    {"residual_connection": True, "norm_num_groups": 4, "out_bias": False},
    {"cross_attention_dim": 24},
    {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm", "qk_norm": "rms_norm"},
    {"spatial_norm_dim": 4, "norm_num_groups": 8, "residual_connection": True},
    {"scale_qk": True, "upcast_attention": True, "dropout": 0.3},
]


@pytest.mark.parametrize(
    ("options", "masked", "axes", "projection", "dtype"),
    # every two of them meet: the bits of the number say what goes with a mask
    [
        (
            options,
            masked,
            # spatial norm takes images only
            4 if "spatial_norm_dim" in options or masked ^ (number & 1) else 3,
            "fused" if masked ^ (number >> 1 & 1) else "separate",
            torch.bfloat16 if masked ^ (number >> 2 & 1) else torch.float32,
        )
        for number, options in enumerate(OPTIONS)
        for masked in (False, True)
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else str(value),
)
def test_replacement_processor_equals_the_one_it_replaces(options, masked, axes, projection, dtype):
    torch.manual_seed(0)
    attention = Attention(
        query_dim=32, heads=2, dim_head=8, processor=AttnProcessor2_0(), **options
    ).to(dtype)
    attention.eval()
    if projection == "fused":
        attention.fuse_projections()
        attention.set_processor(FusedAttnProcessor2_0())
    spatial = "spatial_norm_dim" in options
    states = torch.randn(2, 32, 3, 5) if axes == 4 else torch.randn(2, 15, 32)
    given = {}
    keys = 15
    if "cross_attention_dim" in options:
        keys = 7
        given["encoder_hidden_states"] = torch.randn(2, keys, 24, dtype=dtype)
    if masked:
        given["attention_mask"] = torch.zeros(2, 1, keys, dtype=dtype)
        given["attention_mask"][1, :, keys // 2 :] = -10000
    if spatial:
        given["temb"] = torch.randn(2, 4, 3, 5, dtype=dtype)
    seen = []

    def record(query, key, *, bias, query_lse):
        seen.append((query, key, bias))

    with torch.no_grad():
        plain = attention(states.to(dtype), **given)
        original = attention.processor
        restore = processors.install(attention, record)
        recorded = attention(states.to(dtype), **given)
        restore()
    assert torch.equal(plain, recorded)
    assert attention.processor is original
    [(query, key, bias)] = seen
    assert query.shape == (2, 2, 15, 8)
    assert key.shape == (2, 2, keys, 8)
    assert (bias is not None) == masked


def test_processor_without_recorder_only_attends():
    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8)
    states = torch.randn(1, 9, 16)
    plain = attention(states)
    attention.set_processor(processors.RecordingAttnProcessor())
    assert torch.equal(attention(states), plain)


@pytest.mark.parametrize(
    "processor", [AttnProcessor(), SlicedAttnProcessor(3)], ids=["plain", "sliced"]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_num_groups": 4, "residual_connection": True},
        {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
        {"qk_norm": "rms_norm"},  # these processors do not apply it
        {"scale_qk": False},
        {"spatial_norm_dim": 4, "norm_num_groups": 8},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("axes", [3, 4], ids=["tokens", "image"])
def test_projected_once_more(processor, options, axes):
    """What is handed on is what these processors gave to `get_attention_scores`."""
    if "spatial_norm_dim" in options and (axes == 3 or type(processor) is SlicedAttnProcessor):
        pytest.skip("spatial norm takes images only, and is not for sliced attention")
    torch.manual_seed(0)
    attention = Attention(query_dim=32, heads=2, dim_head=8, processor=processor, **options).eval()
    states = torch.randn(2, 32, 3, 5) if axes == 4 else torch.randn(2, 15, 32)
    given = {}
    if "cross_attention_dim" in options:
        given["encoder_hidden_states"] = torch.randn(2, 7, 24)
    if "spatial_norm_dim" in options:
        given["temb"] = torch.randn(2, 4, 3, 5)
    scored = []
    compute = attention.get_attention_scores

    def scores(query, key, mask=None):
        scored.append((query, key))
        return compute(query, key, mask)

    attention.get_attention_scores = scores
    seen = []

    def record(query, key, *, bias, scale):
        seen.append((query, key, bias, scale))

    with torch.no_grad():
        plain = attention(states, **given)
        scored.clear()
        restore = processors.install(attention, record)
        assert torch.equal(attention(states, **given), plain)
        restore()
    assert type(processor) in (AttnProcessor, SlicedAttnProcessor)
    [(query, key, bias, scale)] = seen
    torch.testing.assert_close(query.flatten(0, 1), torch.cat([q for q, _ in scored]))
    torch.testing.assert_close(key.flatten(0, 1), torch.cat([k for _, k in scored]))
    assert bias is None
    assert scale == attention.scale


class Grouped:
    """A processor of somebody else's: fewer key heads than query heads, and a mask of its own."""

    def __init__(self, mask=None):
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query = attn.to_q(hidden_states).unflatten(-1, (4, -1)).transpose(1, 2)
        key = attn.to_k(encoder_hidden_states).unflatten(-1, (4, -1)).transpose(1, 2)[:, ::2]
        value = attn.to_v(encoder_hidden_states).unflatten(-1, (4, -1)).transpose(1, 2)[:, ::2]
        output = F.scaled_dot_product_attention(
            query, key, value, self.mask, enable_gqa=True, scale=0.3
        )
        return attn.to_out[0](output.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.arange(13)[None, None, None] < torch.tensor([9, 13, 9, 13])[:, None, None, None],
        torch.arange(13)[None] != 4,
        torch.zeros(1, 13).masked_fill(torch.arange(13) == 4, -10000),
        torch.arange(13)[None] <= torch.arange(48)[:, None],
        torch.zeros(4, 1, 48, 13).masked_fill(torch.arange(13) > 8, -torch.inf),
    ],
    ids=["none", "bool by sample", "bool by key", "additive by key", "bool by query", "full"],
)
def test_processor_of_somebody_else(tiny, oracle, mask):
    """Grouped heads, own scales and masks of any shape are recorded as they are."""
    loop = tiny.loop()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    attention = loop.unet.get_submodule(name)
    attention.set_processor(Grouped(mask))
    layout = TokenLayout.cross_attention((4, 3), layers=name.replace(".", r"\."))
    with oracle.spy(loop.unet, loop.scheduler, layers=name) as calls:
        plain = loop(tiny.reference(2))
    with i2am.record(loop, layout=layout, time_groups=1) as recorder:
        assert torch.equal(loop(tiny.reference(2)), plain)
    for call in calls:
        assert call.scale == 0.3
        call.key = call.key.repeat_interleave(2, dim=1)
    oracle.assert_maps(
        recorder.maps(), calls, groups=[0] * 6, rows=oracle.last(2), reference=slice(1, 13)
    )
