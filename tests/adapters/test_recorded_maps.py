"""The maps are those of the run: recomputed from its queries and keys, call by call."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

import i2am
from i2am.layouts import TokenLayout

GRID = (4, 3)
PATCHES = TokenLayout.cross_attention(GRID)
REFERENCE = slice(1, 13)
SIX_IN_THREE = [0, 0, 1, 1, 2, 2]

# diffusers' own, about NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def record_and_list(oracle, loop, *arguments, layout=PATCHES, recording=None, **options):
    """Maps of a recorded run, and the attention calls of the same run unrecorded."""
    with oracle.spy(loop.unet, loop.scheduler) as calls:
        loop(*arguments, **options)
    with i2am.record(loop, layout=layout, **(recording or {"time_groups": 3})) as recorder:
        loop(*arguments, **options)
    return recorder.maps(), calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_maps_per_layer_time_and_head(tiny, oracle, samples, dtype):
    loop = tiny.loop(3).to(dtype)
    reference = tiny.reference(samples).to(dtype)
    maps, calls = record_and_list(oracle, loop, reference)
    assert len(maps.layers) == 7
    oracle.assert_maps(
        maps, calls, groups=SIX_IN_THREE, rows=oracle.last(samples), reference=REFERENCE
    )


class UpcastNorm(torch.nn.Module):
    """As autocast norms on CUDA: query and key differ from value in dtype."""

    def forward(self, states):
        # 0 stays 0, as the key of an empty context is
        return F.normalize(states.float(), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "normed"])
def test_autocast(tiny, oracle, dtype, qk_norm):
    """The model computes in 16 bits, the statistics of what it computed in 32."""
    loop = tiny.loop()
    if qk_norm:
        for module in loop.unet.modules():
            if hasattr(module, "get_processor"):
                module.norm_q = module.norm_k = UpcastNorm()
    with torch.autocast("cpu", dtype=dtype):
        with oracle.spy(loop.unet, loop.scheduler) as calls:
            plain = loop(tiny.reference(2))
        with i2am.record(loop, layout=PATCHES, time_groups=3) as recorder:
            assert torch.equal(loop(tiny.reference(2)), plain)
    assert calls[0].query.dtype == (torch.float32 if qk_norm else dtype)
    oracle.assert_maps(
        recorder.maps(), calls, groups=SIX_IN_THREE, rows=oracle.last(2), reference=REFERENCE
    )


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_every_implementation_for_the_cpu(tiny, oracle, impl):
    loop = tiny.loop()
    recording = {"time_groups": 2, "impl": impl}
    maps, calls = record_and_list(oracle, loop, tiny.reference(), recording=recording)
    groups = [0, 0, 0, 1, 1, 1]
    oracle.assert_maps(maps, calls, groups=groups, rows=oracle.last(1), reference=REFERENCE)


@pytest.mark.parametrize("samples", [1, 2])
def test_resized_sums_give_the_same_time_and_head_maps(tiny, samples):
    loop = tiny.loop(3)
    reference = tiny.reference(samples)
    found = []
    for sums in ("native", "resized"):
        with i2am.record(loop, layout=PATCHES, time_groups=3, sums=sums) as recorder:
            image = loop(reference)
        found.append((image, recorder.maps()))
    (plain, native), (same, resized) = found
    assert torch.equal(plain, same)
    assert resized.layer_sums[0].site.merged == native.layers
    for per in ((), "time", ("time", "head")):
        for name in ("reference_to_generated", "generated_to_reference"):
            expected = getattr(native, name)(per)
            torch.testing.assert_close(getattr(resized, name)(per), expected, rtol=3e-6, atol=0)


def test_one_direction_only(tiny, oracle):
    loop = tiny.loop()
    both, calls = record_and_list(oracle, loop, tiny.reference())
    for direction in i2am.Direction:
        recording = {"time_groups": 3, "directions": direction}
        maps, _ = record_and_list(oracle, loop, tiny.reference(), recording=recording)
        assert maps.directions == (direction,)
        for one, all_ in zip(maps.layer_sums, both.layer_sums, strict=True):
            torch.testing.assert_close(getattr(one, direction), getattr(all_, direction))
    oracle.assert_maps(both, calls, groups=SIX_IN_THREE, rows=oracle.last(1), reference=REFERENCE)


def test_masked_reference_tokens(tiny, oracle):
    loop = tiny.loop()
    mask = torch.ones(2, 13)
    mask[1, 7:] = 0
    maps, calls = record_and_list(oracle, loop, tiny.reference(2), context_mask=mask)
    assert calls[0].bias is not None
    oracle.assert_maps(maps, calls, groups=SIX_IN_THREE, rows=oracle.last(2), reference=REFERENCE)
    hidden = maps.generated_to_reference()[1].flatten()[6:]
    assert torch.equal(hidden, torch.zeros_like(hidden))
    # every token that can be seen spreads one unit per evaluation, hidden ones nothing
    for layer in maps.layer_sums:
        votes = layer.reference_to_generated.sum((1, -2, -1)).mean((1, 2))
        torch.testing.assert_close(votes, torch.tensor([6.0, 6.0 * 6 / 12]))


def test_fused_projections(tiny, oracle):
    loop = tiny.loop()
    loop.unet.fuse_qkv_projections()
    maps, calls = record_and_list(oracle, loop, tiny.reference(2))
    assert calls[0].key.stride() != calls[0].key.contiguous().stride()
    oracle.assert_maps(maps, calls, groups=SIX_IN_THREE, rows=oracle.last(2), reference=REFERENCE)


@pytest.mark.parametrize(
    "processor",
    [AttnProcessor(), SlicedAttnProcessor(slice_size=3)],
    ids=lambda p: type(p).__name__,
)
def test_processors_without_scaled_dot_product_attention(tiny, oracle, processor):
    loop = tiny.loop()
    loop.unet.set_attn_processor(processor)
    mask = torch.ones(2, 13)
    mask[0, 9:] = 0
    maps, calls = record_and_list(oracle, loop, tiny.reference(2), context_mask=mask)
    assert calls[0].bias is not None
    oracle.assert_maps(maps, calls, groups=SIX_IN_THREE, rows=oracle.last(2), reference=REFERENCE)


def test_unscaled_attention_keeps_its_scale(tiny, oracle):
    loop = tiny.loop()
    for module in loop.unet.modules():
        if hasattr(module, "get_processor"):
            module.scale = 0.7
            module.set_processor(AttnProcessor())
    maps, calls = record_and_list(oracle, loop, tiny.reference())
    assert calls[0].scale == 0.7
    oracle.assert_maps(maps, calls, groups=SIX_IN_THREE, rows=oracle.last(1), reference=REFERENCE)


def test_one_processor_object_for_recorded_and_other_layers(tiny, oracle):
    loop = tiny.loop()
    shared = AttnProcessor()
    loop.unet.set_attn_processor(shared)
    layout = TokenLayout.cross_attention(GRID, layers=r"up_blocks.*attn2$")
    maps, calls = record_and_list(oracle, loop, tiny.reference(), layout=layout)
    calls = [call for call in calls if call.layer.startswith("up_blocks")]
    oracle.assert_maps(maps, calls, groups=SIX_IN_THREE, rows=oracle.last(1), reference=REFERENCE)
    assert type(shared) is AttnProcessor
    assert vars(shared) == {}


@pytest.mark.parametrize("prefix_votes", [False, True], ids=["patches", "all keys"])
def test_who_votes(tiny, oracle, prefix_votes):
    loop = tiny.loop()
    layout = TokenLayout.cross_attention(GRID, prefix_votes=prefix_votes)
    maps, calls = record_and_list(oracle, loop, tiny.reference(), layout=layout)
    voters = slice(0, 13) if prefix_votes else REFERENCE
    oracle.assert_maps(
        maps,
        calls,
        groups=SIX_IN_THREE,
        rows=oracle.last(1),
        reference=REFERENCE,
        voters=voters,
    )


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_tokens_are_no_patches(tiny, oracle, prefix):
    loop = tiny.loop()
    layout = TokenLayout.cross_attention(GRID, prefix=prefix)
    reference = tiny.reference(1, prefix + 12)
    maps, calls = record_and_list(oracle, loop, reference, layout=layout)
    patches = slice(prefix, prefix + 12)
    oracle.assert_maps(maps, calls, groups=SIX_IN_THREE, rows=oracle.last(1), reference=patches)


def test_reference_on_the_grid_of_the_query(tiny, oracle):
    loop = tiny.loop(3)
    layout = TokenLayout.same_grid(r"attn1$")
    with oracle.spy(loop.unet, loop.scheduler, layers="attn1") as calls:
        loop(tiny.reference())
    with i2am.record(loop, layout=layout, time_groups=3) as recorder:
        loop(tiny.reference())
    maps = recorder.maps()
    assert {layer.site.reference_grid for layer in maps.layer_sums} == {(8, 6), (4, 3), (2, 2)}
    oracle.assert_maps(maps, calls, groups=SIX_IN_THREE, rows=oracle.last(1), reference=slice(None))


def test_reference_grid_of_its_own_in_every_layer(tiny, oracle):
    def spans(call, frame):
        inner = "mid_block" in call.layer
        return (TokenLayout.cross_attention((2, 6)) if inner else PATCHES).spans(call, frame)

    loop = tiny.loop()
    layout = TokenLayout("by layer", spans)
    maps, calls = record_and_list(oracle, loop, tiny.reference(), layout=layout)
    grids = {
        "mid_block" in layer.site.layer: layer.site.reference_grid for layer in maps.layer_sums
    }
    assert grids == {True: (2, 6), False: GRID}
    oracle.assert_maps(maps, calls, groups=SIX_IN_THREE, rows=oracle.last(1), reference=REFERENCE)


def test_part_of_a_wider_grid(tiny, oracle):
    """Halves beside each other, as two pictures joined in width: rows of both alternate."""
    from i2am.layouts import Sequences, Span

    def spans(call, frame):
        grid = frame.level_grid(call.seqlen_q)
        height, width = grid
        left, right = (0, width // 2), (width // 2, width)
        return Sequences(
            (Span("left", "generated", 0, grid, ((0, height), left)),),
            (Span("right", "reference", 0, grid, ((0, height), right)),),
        )

    loop = tiny.loop()
    with oracle.spy(loop.unet, loop.scheduler, layers="attn1") as calls:
        loop(tiny.reference())
    layout = TokenLayout("diptych", spans, layers=r"down_blocks.*attn1$")
    with i2am.record(loop, layout=layout, time_groups=1) as recorder:
        loop(tiny.reference())
    [layer] = recorder.maps().layer_sums
    generated = [row * 6 + column for row in range(8) for column in range(3)]
    reference = [row * 6 + column for row in range(8) for column in range(3, 6)]
    r2g, g2r = 0, 0
    for call in calls:
        if call.layer == layer.site.layer:
            logits = call.logits()[1:, :, generated]
            r2g = r2g + logits.softmax(-2)[..., reference].mean(-1)
            g2r = g2r + logits.softmax(-1)[..., reference].mean(-2)
    r2g, g2r = (sums.float().unflatten(-1, (8, 3)) for sums in (r2g, g2r))
    torch.testing.assert_close(layer.reference_to_generated[:, 0, :, 0], r2g)
    torch.testing.assert_close(layer.generated_to_reference[:, 0, :, 0], g2r)


@pytest.mark.parametrize(
    "kinds", [("base",), ("full",), ("base", "full"), ("plus", "plus")], ids=str
)
def test_ip_adapter_image_branch(tiny, oracle, kinds):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), *kinds)
    scales = [0.6, 0.9][: len(kinds)]
    pipeline.set_ip_adapter_scale(scales)

    def images():
        return tiny.run(
            pipeline,
            **tiny.prompts(),
            ip_adapter_image=[tiny.picture(i) for i in range(len(kinds))],
            num_inference_steps=4,
            height=32,
            width=24,
        )

    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        images()
    for adapter, kind in enumerate(kinds):
        spatial = {"grid": (4, 4), "prefix": 1} if kind == "full" else {}
        layout = TokenLayout.ip_adapter(adapter=adapter, **spatial)
        with i2am.record(pipeline, layout=layout, time_groups=2) as recorder:
            images()
        oracle.assert_maps(
            recorder.maps(),
            calls,
            groups=[0, 0, 1, 1],
            rows=oracle.last(1),
            reference=slice(1, 17) if kind == "full" else slice(None),
            call_index=1 + adapter,
        )


def test_ip_adapter_of_scale_zero_is_not_mistaken_for_the_next_one(tiny, oracle):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "plus", "plus")
    pipeline.set_ip_adapter_scale([0.0, 1.0])

    def images():
        return tiny.run(
            pipeline,
            **tiny.prompts(),
            ip_adapter_image=[tiny.picture(0), tiny.picture(1)],
            num_inference_steps=2,
            height=16,
            width=16,
        )

    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        images()
    assert {call.call_index for call in calls} == {0, 1}
    with i2am.record(pipeline, layout=TokenLayout.ip_adapter(adapter=1), time_groups=2) as recorder:
        images()
    oracle.assert_maps(
        recorder.maps(),
        calls,
        groups=[0, 1],
        rows=oracle.last(1),
        reference=slice(None),
        call_index=1,
    )
    with i2am.record(pipeline, layout=TokenLayout.ip_adapter(adapter=0), time_groups=2) as recorder:
        images()
    with pytest.raises(RuntimeError, match="an IP-Adapter scale of 0"):
        recorder.maps()


@pytest.mark.parametrize("masked", [False, True], ids=["keys in a row", "a call each"])
@pytest.mark.parametrize("image", [0, 1])
def test_several_images_of_one_ip_adapter(tiny, oracle, image, masked):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "full")
    masks = torch.zeros(1, 2, 16, 16)
    masks[:, 0, :8], masks[:, 1, 8:] = 1, 1

    def images():
        return tiny.run(
            pipeline,
            **tiny.prompts(),
            ip_adapter_image=[[tiny.picture(0), tiny.picture(1)]],
            cross_attention_kwargs={"ip_adapter_masks": [masks]} if masked else None,
            num_inference_steps=2,
            height=16,
            width=16,
        )

    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        images()
    chosen = {"adapter": image} if masked else {"image": image}
    layout = TokenLayout.ip_adapter((4, 4), prefix=1, **chosen)
    with i2am.record(pipeline, layout=layout, time_groups=2) as recorder:
        images()
    start = 1 if masked or image == 0 else 18
    oracle.assert_maps(
        recorder.maps(),
        calls,
        groups=[0, 1],
        rows=oracle.last(1),
        reference=slice(start, start + 16),
        call_index=1 + image if masked else 1,
    )


def test_masked_adapters_count_their_calls_in_order(tiny, oracle):
    """Text, two images of the first adapter (left out: scale 0), one of the second."""
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "base", "plus")
    pipeline.set_ip_adapter_scale([0.0, 1.0])
    masks = [torch.ones(1, 2, 16, 16), torch.ones(1, 1, 16, 16)]

    def images():
        return tiny.run(
            pipeline,
            **tiny.prompts(),
            ip_adapter_image=[[tiny.picture(0), tiny.picture(1)], [tiny.picture(2)]],
            cross_attention_kwargs={"ip_adapter_masks": masks},
            num_inference_steps=2,
            height=16,
            width=16,
        )

    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        images()
    assert {(call.call_index, call.key.shape[2]) for call in calls} == {(0, 7), (1, 5)}
    layout = TokenLayout.ip_adapter(adapter=2)
    with i2am.record(pipeline, layout=layout, time_groups=2) as recorder:
        images()
    oracle.assert_maps(
        recorder.maps(),
        calls,
        groups=[0, 1],
        rows=oracle.last(1),
        reference=slice(None),
        call_index=1,
    )


@pytest.mark.parametrize("guidance", ["off", "unconditional first", "two calls"])
def test_masks_and_regions(tiny, oracle, guidance):
    """Each sample's own masks, in both directions, whichever way its row came."""
    loop = tiny.loop()
    torch.manual_seed(0)
    mask, reference_mask = torch.rand(2, 16, 12), torch.rand(2, 8, 6)
    region = torch.rand(16, 12)
    order = ("conditional", "unconditional") if guidance == "two calls" else None
    with oracle.spy(loop.unet, loop.scheduler) as calls:
        loop(tiny.reference(4), guidance=guidance)
    with i2am.record(
        loop,
        layout=replace(PATCHES, guidance_order=order),
        time_groups=1,
        mask=mask,
        reference_mask=reference_mask,
        regions={"corner": i2am.Patch(0, 1, (4, 3)), "free": region},
    ) as recorder:
        loop(tiny.reference(4), guidance=guidance)
    maps = recorder.maps()
    assert maps.votes == ("uniform", "mask")
    assert maps.rows == ("uniform", "mask", "corner", "free")
    of_sample = [0, 0, 1, 1]  # images of one prompt lie one after the other
    for layer in maps.layer_sums:
        height, width = layer.site.generated_grid
        inside = torch.nn.functional.adaptive_avg_pool2d(mask, (height, width)).flatten(1)
        votes = torch.nn.functional.adaptive_avg_pool2d(reference_mask, GRID).flatten(1)
        votes = (votes / votes.sum(-1, keepdim=True))[of_sample].double()
        corner = torch.zeros(4, 3)
        corner[0, 1] = 1
        corner = torch.kron(corner, torch.ones(height // 4, width // 3))
        free = torch.nn.functional.adaptive_avg_pool2d(region[None], (height, width))[0]
        rows = [inside[of_sample] / (height * width)]
        rows += [(area / area.sum()).flatten().expand(4, -1) for area in (corner, free)]
        weights = torch.stack(rows, 1).double()
        r2g, g2r = 0, 0
        for call in calls:
            if call.layer == layer.site.layer and call.denoiser_call == 0:
                logits = call.logits()[-4:]
                r2g = r2g + logits.softmax(-2)[..., REFERENCE] @ votes[:, None, :, None]
                g2r = g2r + weights[:, None] @ logits.softmax(-1)[..., REFERENCE]
        recorded = layer.reference_to_generated[:, 0, :, 1].flatten(-2)
        torch.testing.assert_close(recorded, r2g[..., 0].float(), rtol=2e-5, atol=1e-7)
        recorded = layer.generated_to_reference[:, 0, :, 1:].flatten(-2)
        torch.testing.assert_close(recorded, g2r.float(), rtol=2e-5, atol=1e-7)


def test_keys_kept_apart(tiny, oracle):
    loop = tiny.loop()
    recording = {"time_groups": 2, "keep_keys": True}
    maps, calls = record_and_list(oracle, loop, tiny.reference(2), recording=recording)
    for layer in maps.layer_sums:
        by_key = torch.zeros(())
        for call in calls:
            if call.layer == layer.site.layer:
                over_queries = call.logits()[2:].softmax(-2)[..., REFERENCE].mT
                by_key = by_key + over_queries
        recorded = layer.reference_to_generated_by_key
        assert recorded.shape[:4] == (2, 2, 4, 12)
        torch.testing.assert_close(recorded.sum(1).flatten(-2), by_key.float())


@pytest.mark.parametrize(
    ("scheduler", "evaluations"),
    [(HeunDiscreteScheduler, 11), (PNDMScheduler, 15)],
    ids=["heun", "pndm"],
)
def test_time_groups_add_up_to_the_whole(tiny, scheduler, evaluations):
    loop = tiny.loop(scheduler=scheduler(**tiny.betas))
    results = []
    for time_groups in (1, 3):
        with i2am.record(loop, layout=PATCHES, time_groups=time_groups) as recorder:
            loop(tiny.reference())
        results.append(recorder.maps())
    whole, grouped = results
    assert whole.provenance["evaluations"] == grouped.provenance["evaluations"] == evaluations
    for one, three in zip(whole.layer_sums, grouped.layer_sums, strict=True):
        for name in ("reference_to_generated", "generated_to_reference"):
            assert (getattr(three, name).flatten(2).sum(-1) > 0).all()
            torch.testing.assert_close(
                getattr(one, name), getattr(three, name).sum(1, keepdim=True)
            )


def test_provenance_says_what_ran(tiny):
    loop = tiny.loop()
    badge = i2am.Patch(0, 1, (4, 3))
    with i2am.record(loop, layout=PATCHES, time_groups=2, regions={"badge": badge}) as recorder:
        loop(tiny.reference(), steps=4)
    maps = recorder.maps()
    assert torch.equal(maps.specific_reference(badge), maps.specific_reference("badge"))
    provenance = maps.provenance
    versions = provenance.pop("versions")
    layers = provenance.pop("calls")
    assert provenance == {
        "denoiser": "UNet2DConditionModel",
        "scheduler": "DDIMScheduler",
        "layout": "cross_attention 4x3",
        "note": None,
        "prefix_votes": False,
        "guidance_order": ["unconditional", "conditional"],
        "branch": "conditional",
        "attach": "beside",
        "sums": "native",
        "pictures": {
            "generated": {"size": [8, 6], "box": None},
            "reference": {"size": None, "box": None},
        },
        "regions": {"badge": "0,1@4x3"},
        "steps": 4,
        "evaluations": 4,
        "timesteps": [750.0, 500.0, 250.0, 0.0],
    }
    assert set(layers.values()) == {4}
    assert set(versions) >= {"torch", "diffusers"}


def test_maps_are_a_copy_and_saveable(tiny, tmp_path):
    loop = tiny.loop()
    recorder = i2am.record(loop, layout=PATCHES)
    recorder.attach()
    loop(tiny.reference())
    first = recorder.maps()
    kept = first.reference_to_generated().clone()
    loop(tiny.reference(seed=9))
    recorder.detach()
    assert torch.equal(first.reference_to_generated(), kept)
    assert not torch.equal(recorder.maps().reference_to_generated(), kept)
    first.save(tmp_path / "maps.safetensors")
    loaded = i2am.load_maps(tmp_path / "maps.safetensors")
    assert torch.equal(loaded.reference_to_generated(), kept)
    assert loaded.provenance == first.provenance
