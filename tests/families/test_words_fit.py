"""Words by position: texts of another length than the prompt's, and keys that are moved."""

import warnings
from types import SimpleNamespace

import family_oracle as oracle
import pytest
import torch
from family_cases import FAMILIES, dits, normal, seeded, zimage
from family_known import recorded
from family_oracle import Keys, Tokens

import i2am

pytestmark = pytest.mark.usefixtures("small_references")


def refused(model, words, message):
    """Its image is made all the same."""
    plain = model.run()
    with (
        pytest.warns(UserWarning, match="recording ended"),
        i2am.record(model.pipe, words=words, time_groups=2) as recorder,
    ):
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


@pytest.mark.parametrize(("sides", "size"), [((8, 6), None), ((4, 10), "2x5"), ((8, 10), "4x5")])
def test_references_of_a_batch_must_be_of_one_size(sides, size):
    """Z-Image takes a list of pictures for each sample, which need not be alike."""
    net = seeded(dits.BUILDERS["zimage"], siglip_feat_dim=20).denoiser
    arguments = {
        "x": [
            [normal(4, 1, 8, 6), normal(4, 1, 10, 14)],
            [normal(4, 1, *sides, seed=1), normal(4, 1, 10, 14, seed=1)],
        ],
        "t": torch.tensor([0.5, 0.5]),
        "cap_feats": [
            [normal(count, 24) for count in counts] for counts in ((7, 3, 2), (40, 5, 2))
        ],
        "siglip_feats": [[normal(2, 3, 20), None]] * 2,
        "image_noise_mask": [[0, 1]] * 2,
    }
    options = {"time_groups": 1, "sums": "native", "num_inference_steps": 1}
    with torch.no_grad(), oracle.spied([net], SimpleNamespace(step=None)) as calls:
        plain = net(**arguments).sample
    recorder = i2am.record(net, words={"shirt": [1]}, **options)
    with warnings.catch_warnings(), recorder, torch.no_grad():
        warnings.filterwarnings("ignore", message="recording ended")
        output = net(**arguments).sample
    assert all(map(torch.equal, output, plain))
    if size is not None:
        message = rf"references of one size, got 'reference' of 4x3 .* and 'reference' of {size} "
        with pytest.raises(ValueError, match=message):
            recorder.maps()
        return

    def of(call):
        if not call.layer.startswith("layers"):
            return None
        tokens = Tokens(range(128, 163), (5, 7), {0: Keys(range(96, 108), (4, 3))})
        # the longer text of the second sample takes two paddings more
        later = Tokens(range(160, 195), (5, 7), {0: Keys(range(128, 140), (4, 3))})
        return [(0, tokens), (1, later)]

    maps = recorder.maps()
    wanted = oracle.expected(calls, of, [0])
    for (layer, _), sums in wanted.items():
        own = maps.select(layers=layer, source="reference")
        for measure in ("share", "spread"):
            read = own.reference_to_generated(("time", "head"), measure=measure).flatten(3)
            oracle.assert_close(read, getattr(sums, measure), f"{measure} in {layer}")
