"""The attention total-variation loss: closed forms, derivatives, and a UNet that is only lent."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import i2am
from i2am.layouts import TokenLayout
from i2am.models import POCKET
from i2am.training.attention_tv import (
    AttentionTotalVariation,
    attention_centres,
    default_layer,
    mean_attention,
    total_variation,
)

REFERENCE = (4, 3)
PREFIX = 1
TOKENS = PREFIX + REFERENCE[0] * REFERENCE[1]
LAYER = "up_blocks.0.attentions.1.transformer_blocks.0.attn2"
OTHER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture
def unet() -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=(8, 6),
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    for name, weight in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            weight.data *= 3  # attention as uneven as a trained model's
    return unet


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 6, generator=generator),
        "timestep": torch.tensor([100, 700]),
        "encoder_hidden_states": torch.randn(2, TOKENS, 24, generator=generator),
    }


def make(unet: UNet2DConditionModel, **options) -> AttentionTotalVariation:
    return AttentionTotalVariation(
        unet, **{"prefix": PREFIX, "reference_grid": REFERENCE, **options}
    )


# The loss itself


def test_a_hand_computed_value() -> None:
    # 2 x 2 queries over 1 prefix token and 2 x 3 patches; a fifth of the attention on the prefix
    attention = torch.zeros(1, 4, 7)
    attention[..., 0] = 0.2
    attention[0, 0, 1] = 0.8  # (0, 0)
    attention[0, 1, 1 + 2] = 0.8  # (0, 2)
    attention[0, 2, 1 + 3] = attention[0, 2, 1 + 4] = 0.4  # (1, 0) and (1, 1): (1, .5)
    attention[0, 3, 1 + 5] = 0.8  # (1, 2)
    centres = attention_centres(attention, (2, 3), prefix=1)
    torch.testing.assert_close(
        centres, torch.tensor([[[0.0, 0.0], [0.0, 2.0], [1.0, 0.5], [1.0, 2.0]]])
    )
    inside = torch.ones(1, 2, 2, dtype=torch.bool)
    # down: 1.5 and 1, two pairs; across: 2 and 1.5, two pairs
    assert float(total_variation(centres.unflatten(1, (2, 2)), inside)) == pytest.approx(
        (1.5 + 1) / 2 + (2 + 1.5) / 2
    )
    inside[0, 1, 1] = False
    # down: only the left pair, 1.5; across: only the upper pair, 2
    assert float(total_variation(centres.unflatten(1, (2, 2)), inside)) == pytest.approx(1.5 + 2)


def test_pairs_are_counted_over_the_whole_batch() -> None:
    centres = torch.zeros(2, 1, 3, 2)
    centres[0, 0, :, 0] = torch.tensor([0.0, 1.0, 3.0])
    inside = torch.tensor([[[1, 1, 1]], [[1, 1, 0]]]) == 1
    # three pairs in the batch, two of which move, by 1 and by 2
    assert float(total_variation(centres, inside)) == pytest.approx(3 / 3)


def test_constant_centres_cost_nothing_and_affine_ones_their_slopes() -> None:
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(4.0), indexing="ij")
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(2, 5, 4, generator=generator) < 0.8
    constant = torch.tensor([3.0, 1.5]).expand(2, 5, 4, 2)
    assert float(total_variation(constant, inside)) == 0
    affine = torch.stack([0.5 * y - 0.25 * x + 2, 0.125 * y + x], dim=-1).expand(2, 5, 4, 2)
    assert float(total_variation(affine, inside)) == pytest.approx(0.5 + 0.25 + 0.125 + 1)


def test_attention_is_the_softmax_of_every_head_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 8, generator=generator).double() for n in (5, 7))
    by_head = [
        torch.softmax(query[:, head] @ key[:, head].mT / 8**0.5, dim=-1) for head in range(3)
    ]
    torch.testing.assert_close(mean_attention(query, key), sum(by_head) / 3)
    hidden = torch.zeros(2, 1, 1, 7).index_fill(3, torch.tensor([2]), -torch.inf)
    masked = mean_attention(query, key, bias=hidden)
    assert not masked[..., 2].any()
    assert torch.equal(masked, mean_attention(query, key, bias=hidden == 0))
    without = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(masked[..., without], mean_attention(query, key[:, :, without]))


def test_derivatives_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 2, 6, 4, generator=generator).double().requires_grad_()
    key = torch.randn(2, 2, TOKENS, 4, generator=generator).double().requires_grad_()
    inside = torch.rand(2, 3, 2, generator=generator) < 0.9

    def loss(query: Tensor, key: Tensor) -> Tensor:
        centres = attention_centres(mean_attention(query, key), REFERENCE, prefix=PREFIX)
        return total_variation(centres.unflatten(1, (3, 2)), inside)

    assert torch.autograd.gradcheck(loss, (query, key))
    assert float(torch.autograd.grad(loss(query, key), query)[0].abs().sum()) > 0


def test_a_query_that_sees_only_the_prefix_has_no_nan() -> None:
    query = torch.ones(1, 1, 2, 4, requires_grad=True)
    key = torch.zeros(1, 1, TOKENS, 4)
    key[:, :, 0] = 1000
    centres = attention_centres(mean_attention(query, key), REFERENCE, prefix=PREFIX)
    assert not centres.any()
    centres.sum().backward()
    assert not query.grad.any()


# On a UNet


def test_the_loss_is_that_of_the_attention_the_recorder_sees(unet, batch) -> None:
    region = torch.zeros(2, 16, 12)
    region[:, 4:, :8] = 1
    with make(unet, weight=0.5) as tv:
        unet(**batch)
        loss = tv.loss(region)
    # one specific-reference map per query is the attention of that query, prefix left out
    queries = [
        i2am.Patch(row, column, (4, 3)) for row, column in itertools.product(range(4), range(3))
    ]
    layout = TokenLayout.cross_attention(REFERENCE, PREFIX)
    with (
        torch.no_grad(),
        i2am.record(
            unet,
            layout=layout,
            regions=queries,
            directions="generated_to_reference",
            num_inference_steps=1,
            time_groups=1,
        ) as recorder,
    ):
        unet(**batch)
    maps = recorder.maps().select(layers=LAYER)
    shares = torch.stack([maps.specific_reference(query).flatten(1) for query in queries], dim=1)
    shares = (shares / shares.sum(-1, keepdim=True)).unflatten(-1, REFERENCE)
    down = (shares.sum(-1) * torch.arange(4)).sum(-1)
    across = (shares.sum(-2) * torch.arange(3)).sum(-1)
    centres = torch.stack([down, across], dim=-1).reshape(2, 4, 3, 2)
    # the region covers rows 1 to 3 and columns 0 and 1 of the 4 x 3 queries
    seen = centres[:, 1:, :2]
    vertical = (seen[:, 1:] - seen[:, :-1]).abs().sum() / (2 * 2 * 2)
    horizontal = (seen[:, :, 1:] - seen[:, :, :-1]).abs().sum() / (2 * 3 * 1)
    assert loss.item() > 0
    torch.testing.assert_close(loss.detach(), 0.5 * (vertical + horizontal), rtol=1e-4, atol=1e-7)


def test_the_output_and_its_gradients_are_those_without_the_loss(unet, batch) -> None:
    plain = unet(**batch).sample
    weight = unet.get_submodule(LAYER).to_q.weight
    (expected,) = torch.autograd.grad(plain.square().sum(), weight)
    with make(unet) as tv:
        output = unet(**batch).sample
        tv.loss(torch.ones(2, 8, 6))
    assert torch.equal(output, plain)
    assert torch.equal(torch.autograd.grad(output.square().sum(), weight)[0], expected)


def test_gradients_reach_queries_and_keys_and_stop_at_other_layers_behind(unet, batch) -> None:
    with make(unet) as tv:
        unet(**batch)
        tv.loss(torch.ones(2, 8, 6)).backward()
    attention = unet.get_submodule(LAYER)
    assert attention.to_q.weight.grad.any()
    assert attention.to_k.weight.grad.any()
    assert attention.to_v.weight.grad is None
    assert unet.conv_out.weight.grad is None
    assert unet.conv_in.weight.grad.any()


def test_several_layers_add_up(unet, batch) -> None:
    region = torch.ones(2, 8, 6)
    losses = {}
    for layers in ([LAYER], [OTHER], [LAYER, OTHER]):
        with make(unet, layers=layers) as tv:
            unet(**batch)
            losses[tuple(layers)] = tv.loss(region).item()
    assert losses[LAYER,] != losses[OTHER,]
    assert losses[LAYER, OTHER] == pytest.approx(losses[LAYER,] + losses[OTHER,])


def test_an_empty_region_costs_nothing_and_has_no_nan(unet, batch) -> None:
    with make(unet) as tv:
        unet(**batch)
        loss = tv.loss(torch.zeros(2, 8, 6))
        loss.backward()
    assert loss.item() == 0
    gradient = unet.get_submodule(LAYER).to_q.weight.grad
    assert gradient is not None
    assert not gradient.any()


def test_a_dropped_sample_does_not_count(unet, batch) -> None:
    region = torch.ones(2, 8, 6)
    alone = {name: values[1:] for name, values in batch.items()}
    changed = batch | {"encoder_hidden_states": batch["encoder_hidden_states"].clone()}
    changed["encoder_hidden_states"][0] = 0
    with make(unet) as tv:
        unet(**alone)
        expected = tv.loss(region[1:]).item()
        losses = []
        for given in (batch, changed):
            unet(**given)
            losses.append(tv.loss(region, keep=torch.tensor([False, True])).item())
        none = tv.loss(region, keep=torch.tensor([False, False]))
    assert losses == pytest.approx([expected, expected], rel=1e-5)
    assert none.item() == 0


def test_processors_and_hooks_are_given_back(unet, batch) -> None:
    originals = dict(unet.attn_processors)
    names = [LAYER, OTHER]
    with make(unet, layers=names):
        unet(**batch)
        inside = unet.attn_processors
        touched = {name for name in originals if inside[name] is not originals[name]}
        assert touched == {f"{name}.processor" for name in names}
    with pytest.raises(KeyboardInterrupt), make(unet, layers=names):
        raise KeyboardInterrupt
    assert all(unet.attn_processors[name] is processor for name, processor in originals.items())
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks


def test_passes_without_gradients_and_recording_leave_the_loss_alone(unet, batch) -> None:
    region = torch.ones(2, 8, 6)
    other = batch | {"sample": -batch["sample"]}
    layout = TokenLayout.cross_attention(REFERENCE, PREFIX)
    options = {"layout": layout, "num_inference_steps": 1, "time_groups": 1}
    with torch.no_grad(), i2am.record(unet, **options) as recorder:
        unet(**other)
    expected = recorder.maps().generated_to_reference(per="layer")
    with make(unet) as tv:
        unet(**batch)
        before = tv.loss(region).item()
        with torch.no_grad(), i2am.record(unet, **options) as recorder:
            unet(**other)
        assert tv.loss(region).item() == before
        assert torch.equal(recorder.maps().generated_to_reference(per="layer"), expected)
        unet(**other)
        assert tv.loss(region).item() != before


def test_gradient_checkpointing_changes_nothing(unet, batch) -> None:
    region = torch.ones(2, 8, 6)
    weight = unet.get_submodule(LAYER).to_k.weight
    gradients = []
    for checkpointing in (False, True):
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        with make(unet, weight=1.0) as tv:
            output = unet(**batch).sample
            (output.square().mean() + tv.loss(region)).backward()
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_autocast_keeps_the_loss_in_fp32(unet, batch) -> None:
    with make(unet, weight=1.0) as tv:
        unet(**batch)
        exact = tv.loss(torch.ones(2, 8, 6)).item()
        with torch.autocast("cpu", torch.bfloat16):
            unet(**batch)
            loss = tv.loss(torch.ones(2, 8, 6))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.05)


def test_training_lowers_it(unet, batch) -> None:
    region = torch.ones(2, 8, 6)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    losses = []
    with make(unet, weight=1.0) as tv:
        for _ in range(30):
            unet(**batch)
            loss = tv.loss(region)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Which layer, and what is refused


def test_the_default_layer_goes_by_level(unet) -> None:
    assert default_layer(unet) == LAYER
    assert make(unet).layers == (LAYER,)
    pocket = POCKET.build().unet
    assert default_layer(pocket) == "up_blocks.1.attentions.1.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("up_blocks", "expected"),
    [
        (("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), 2),
        (("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"), 1),
        (("UpBlock2D", "UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"), 3),
    ],
)
def test_the_default_layer_of_a_model_of_four_levels(up_blocks, expected) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(16, 32, 32, 32),
            up_block_types=up_blocks,
            layers_per_block=2,
            cross_attention_dim=24,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    name = f"up_blocks.{expected}.attentions.1.transformer_blocks.0.attn2"
    assert default_layer(unet) == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight must be a finite number of at least 0, got -1.0"),
        ({"weight": float("nan")}, "weight must be a finite number"),
        ({"layers": ["mid_block"]}, r"layers must name cross-attentions .* got 'mid_block'"),
        ({"layers": []}, "layers must name at least one cross-attention, got none"),
        ({"reference_grid": (0, 3)}, "grid must be at least 1x1, got 0x3"),
        ({"prefix": -1}, "prefix must be at least 0, got -1"),
    ],
)
def test_options_are_refused(unet, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(unet, **options)


def test_a_unet_without_a_decoder_to_choose_from_is_refused() -> None:
    with pytest.raises(ValueError, match="must have cross-attention in its up blocks, Linear"):
        default_layer(torch.nn.Linear(1, 1))


def test_a_compiled_unet_is_refused(unet) -> None:
    with pytest.raises(NotImplementedError, match="unet must not be compiled"):
        make(torch.compile(unet))


def test_a_pass_with_other_tokens_is_refused(unet, batch) -> None:
    message = r"layout expects 1 \+ 5x3 = 16 reference tokens, got 13 keys"
    with make(unet, reference_grid=(5, 3)), pytest.raises(ValueError, match=message):
        unet(**batch)


def test_a_loss_that_cannot_be_is_refused(unet, batch) -> None:
    region = torch.ones(2, 8, 6)
    with make(unet) as tv:
        with pytest.raises(RuntimeError, match="no attention was kept"):
            tv.loss(region)
        with torch.no_grad():
            unet(**batch)
        with pytest.raises(RuntimeError, match="no attention was kept"):
            tv.loss(region)
        unet(**batch)
        with pytest.raises(ValueError, match=r"garment_region must be \[2, height, width\]"):
            tv.loss(region[:1])
        with pytest.raises(ValueError, match=r"keep must be bool \[2\], got torch.float32 \[2\]"):
            tv.loss(region, keep=torch.ones(2))
    with pytest.raises(RuntimeError, match="no attention was kept"):
        tv.loss(region)
