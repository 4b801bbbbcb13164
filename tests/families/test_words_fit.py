"""Words by position: texts of another length than the prompt's, and keys that are moved."""

import pytest
import torch
from family_cases import FAMILIES, zimage
from test_parity import recorded

import i2am

pytestmark = pytest.mark.usefixtures("small_references")


def refused(model, words, message):
    """Its image is made all the same."""
    plain = model.run()
    with pytest.warns(UserWarning, match="recording ended"), i2am.record(
        model.pipe, words=words, time_groups=2
    ) as recorder:
        image = model.run()
    assert torch.equal(image, plain)
    with pytest.raises(ValueError, match=message):
        recorder.maps()


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("flux kontext", 6),
        ("flux kontext, true guidance", 6),
        ("flux2 klein", 5),  # of its negative prompt 7
        ("flux2 klein kv", 5),
        ("qwen edit plus", 7),  # of its negative prompt 4
        ("zimage", 40),
        ("wan 2.2 t2v", 512),
    ],
)
def test_positions_beyond_the_prompt_are_refused(name, tokens):
    message = rf"words\['hat'\] must be positions below {tokens} in 'text', got {tokens}"
    refused(FAMILIES[name](), {"shirt": [1], "hat": [2, tokens]}, message)


def test_positions_beyond_the_prompt_of_one_sample_are_refused():
    model = zimage(samples=3, texts=(40, 7, 12))
    refused(model, {"hat": [8]}, r"words\['hat'\] must be positions below 7 in 'text', got 8")


def test_a_prompt_that_becomes_shorter_in_a_later_step_is_refused():
    model = zimage()
    run = model.run

    def cut(pipe, step, timestep, given):
        return {"prompt_embeds": [one[:4] for one in given["prompt_embeds"]]}

    call = type(model.pipe).__call__
    options = {
        "callback_on_step_end": cut,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }

    class Cut(type(model.pipe)):
        def __call__(self, **given):
            return call(self, **given, **options)

    Cut.__name__ = "ZImagePipeline"
    model.pipe.__class__ = Cut
    assert run().isfinite().all()
    refused(model, {"hat": [5]}, r"words\['hat'\] must be positions below 4 in 'text', got 5")


# Where a key lies


def keys_moved(module, positions):
    """From now on a projection gives other keys at some positions."""
    change = torch.randn(len(positions), 32, generator=torch.Generator().manual_seed(5))

    def hook(_, args, output):
        output = output.clone()
        output[:, positions] += change[:, : output.shape[-1]]
        return output

    return module.register_forward_hook(hook)


POKED = [
    # the text is projected by itself, references lie behind 35 tokens of the image
    ("flux2 dev", "transformer_blocks.0.attn", "add_k_proj", [2], "shirt"),
    ("flux2 dev", "transformer_blocks.0.attn", "add_k_proj", [4], "rest"),
    ("flux2 dev", "transformer_blocks.0.attn", "to_k", [35 + 17], "reference 1"),
    ("flux2 dev", "transformer_blocks.0.attn", "to_k", [35 + 18], "reference 2"),
    ("flux2 dev", "transformer_blocks.0.attn", "to_k", [34], None),
    ("qwen edit plus", "transformer_blocks.0.attn", "to_k", [35 + 127], "reference 1"),
    ("qwen edit plus", "transformer_blocks.0.attn", "to_k", [35 + 128], "reference 2"),
    ("sd", "down_blocks.0.attentions.0.transformer_blocks.0.attn2", "to_k", [3], "red"),
    ("sd", "down_blocks.0.attentions.0.transformer_blocks.0.attn2", "to_k", [76], "<padding>"),
]


@pytest.mark.parametrize(("name", "layer", "projection", "positions", "source"), POKED)
def test_keys_that_move_move_the_maps_of_their_source_alone(
    name, layer, projection, positions, source
):
    model = FAMILIES[name]()
    before, _ = recorded(model, sums="native")
    network = model.networks[0]
    with keys_moved(network.get_submodule(f"{layer}.{projection}"), positions):
        after, _ = recorded(model, sums="native")

    def first(maps, of, measure):
        """In the first step, to which nothing else has come yet."""
        own = maps.select(layers=layer)
        read = own.reference_to_generated(("time", "head"), source=of, measure=measure)
        return read[:, 0]

    assert source is None or source in before.sources
    kept = [one for one in before.sources if one != source]
    for one in kept:
        torch.testing.assert_close(first(after, one, "spread"), first(before, one, "spread"))
    if source is not None:
        moved = first(after, source, "spread") - first(before, source, "spread")
        assert moved.abs().max() > 1e-3 * first(before, source, "spread").max()
    # all the others give way by one factor
    factors = [
        first(after, one, "share") / first(before, one, "share")
        for one in kept
        if first(before, one, "share").any()
    ]
    assert (factors[0] - 1).abs().max() > 1e-4
    for factor in factors:
        torch.testing.assert_close(factor, factors[0], rtol=1e-4, atol=0)
