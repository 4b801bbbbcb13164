"""Whose attention is recorded: branches that are calls of their own, named or not, and extra calls,
layers whose tokens are no grid, and what a layer multiplies its branch by."""

import itertools

import pytest
import torch
from diffusers import FluxKontextPipeline, StableDiffusionSAGPipeline, UNet2DConditionModel
from diffusers.models.cache_utils import CacheMixin

import i2am
from i2am.adapters.guidance import guidance_order
from i2am.layouts import TokenLayout

GRID = (4, 3)
REFERENCE = slice(1, 13)
ADAPTER = slice(1, 17)
STEPS, GROUPS = 4, [0, 0, 1, 1]
CONTEXTS = {"conditional": 1, "unconditional": 2, "image": 3, "perturbed": 4}
TWO = ("unconditional", "conditional")


class Apart:
    """A loop of one's own that calls the denoiser once for every part."""

    def __init__(self, tiny, unet=None):
        loop = tiny.loop()
        self.unet, self.scheduler = unet or loop.unet, loop.scheduler
        self.contexts = {name: tiny.reference(2, seed=seed) for name, seed in CONTEXTS.items()}

    def call(self, name, latents, timestep):
        return self.unet(latents, timestep, encoder_hidden_states=self.contexts[name]).sample

    @torch.no_grad()
    def __call__(self, order, *, before=lambda unet: None, call=None, after=lambda unet: None):
        call = call or self.call
        before(self.unet)
        self.scheduler.set_timesteps(STEPS)
        latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
        for index, timestep in enumerate(self.scheduler.timesteps):
            names = order(index) if callable(order) else order
            noise = sum(call(name, latents, timestep) for name in names) / len(names)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        after(self.unet)
        return latents

    def record(self, order=None, **options):
        layout = TokenLayout.cross_attention(GRID, guidance_order=order)
        options = {"time_groups": 2, "branch": "both", **options}
        return i2am.record(self.unet, scheduler=self.scheduler, layout=layout, **options)


@pytest.fixture
def apart(tiny):
    return Apart(tiny)


def calls_numbered(number):
    return lambda call: slice(None) if call.denoiser_call == number else None


def assert_branches(oracle, recorder, calls, order, extra=0):
    for branch in ("conditional", "unconditional"):
        rows = calls_numbered(order.index(branch) + extra)
        maps = recorder.maps(branch)
        oracle.assert_maps(maps, calls, groups=GROUPS, rows=rows, reference=REFERENCE)
        assert maps.provenance["branch"] == branch
    return maps


ORDERS = [
    ("conditional", "unconditional"),
    TWO,
    *itertools.permutations(["conditional", "unconditional", "image"]),
    ("perturbed", "image", "unconditional", "conditional"),
    ("image", "conditional", "perturbed", "unconditional"),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_declared_order_of_calls(oracle, apart, order):
    with oracle.spy(apart.unet, apart.scheduler) as calls:
        plain = apart(order)
    with apart.record(order) as recorder:
        assert torch.equal(apart(order), plain)
    maps = assert_branches(oracle, recorder, calls, order)
    assert maps.provenance["guidance_order"] == list(order)
    assert "other_calls" not in maps.provenance


def test_order_that_nobody_declared(oracle, apart):
    plain = apart(TWO)
    with oracle.gives_up(apart.record(), ValueError, ".*several calls and no order; or mark"):
        assert torch.equal(apart(TWO), plain)


@pytest.mark.parametrize("declared", [None, TWO, TWO[::-1]], ids=str)
def test_marks_go_before_any_order(oracle, apart, declared):
    order = ("unconditional", "image", "conditional")
    with oracle.spy(apart.unet, apart.scheduler) as calls:
        plain = apart(order)
    recorder = apart.record(declared)

    def marked(name, latents, timestep):
        with recorder.calls(name):
            return apart.call(name, latents, timestep)

    with recorder:
        assert torch.equal(apart(order, call=marked), plain)
    maps = assert_branches(oracle, recorder, calls, order)
    assert maps.provenance["other_calls"] == {"image": STEPS}


class Inherits(FluxKontextPipeline):
    def __init__(self):
        pass


class LoopsByItself(Inherits):
    def __call__(self):
        pass


class Degrades(StableDiffusionSAGPipeline):
    def __init__(self):
        pass


@pytest.mark.parametrize(
    ("pipeline", "calls"),
    [
        (Inherits, ("conditional", "unconditional")),
        (LoopsByItself, None),
        (Degrades, ("conditional", "degraded")),
        (object, None),
    ],
)
def test_orders_of_calls_that_are_known(pipeline, calls):
    layout = TokenLayout.cross_attention(GRID)
    assert guidance_order(pipeline(), layout).calls == calls
    assert guidance_order(pipeline(), layout).batch == TWO


class NamedUNet(CacheMixin, UNet2DConditionModel):
    """A denoiser whose pipelines say which call is which."""


@pytest.mark.parametrize("declared", [None, TWO[::-1]], ids=str)
def test_cache_contexts_go_before_any_order(tiny, oracle, declared):
    apart = Apart(tiny, tiny.unet())
    apart.unet.__class__ = NamedUNet
    order = ("perturbed", "unconditional", "conditional")
    contexts = {"conditional": "cond", "unconditional": "uncond", "perturbed": "uncond_stg"}

    def named(name, latents, timestep):
        with apart.unet.cache_context(contexts[name]):
            return apart.call(name, latents, timestep)

    with oracle.spy(apart.unet, apart.scheduler) as calls:
        plain = apart(order, call=named)
    with apart.record(declared) as recorder:
        assert torch.equal(apart(order, call=named), plain)
    maps = assert_branches(oracle, recorder, calls, order)
    assert maps.provenance["other_calls"] == {"uncond_stg": STEPS}
    assert "cache_context" not in vars(apart.unet)

    # a mark goes before the name of a cache context
    def turned(name, latents, timestep):
        other = {"conditional": "unconditional", "unconditional": "conditional"}.get(name, name)
        with recorder.calls(other):
            return named(name, latents, timestep)

    with recorder:
        apart(order, call=turned)
    assert_branches(oracle, recorder, calls, ("perturbed", "conditional", "unconditional"))


@torch.no_grad()
def other_call(unet, timestep=0):
    unet(torch.ones(1, 4, 8, 6), timestep, encoder_hidden_states=torch.ones(1, 13, 16))


@pytest.mark.parametrize("order", ["one batch", TWO], ids=str)
def test_calls_before_and_after_a_run(tiny, oracle, apart, order):
    def both(name, latents, timestep):
        contexts = torch.cat([apart.contexts[part] for part in TWO])
        noise = apart.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=contexts)
        return noise.sample.chunk(2)[0]

    options = {"call": both} if order == "one batch" else {}
    names = ("both",) if order == "one batch" else order
    with oracle.spy(apart.unet, apart.scheduler) as calls:
        plain = apart(names, **options)

    def after(unet):
        for _ in range(2):
            other_call(unet)

    recorder = apart.record(None if order == "one batch" else order)
    with recorder:
        assert torch.equal(apart(names, before=other_call, after=after, **options), plain)
    for branch, place in (("unconditional", 0), ("conditional", 1)):
        rows = calls_numbered(place)
        if order == "one batch":
            rows = lambda call, place=place: slice(2 * place, 2 * place + 2)  # noqa: E731
        maps = recorder.maps(branch)
        oracle.assert_maps(maps, calls, groups=GROUPS, rows=rows, reference=REFERENCE)
    assert maps.provenance["other_calls"] == {"before the run": 1, "after the run": 2}


def test_prefill_inside_the_run(oracle, apart):
    """Behind set_timesteps: at another timestep than the evaluation that it comes before."""
    timesteps = apart.scheduler.set_timesteps
    with oracle.spy(apart.unet, apart.scheduler) as calls:
        plain = apart(TWO)
    with apart.record(TWO) as recorder:
        begin = apart.scheduler.set_timesteps

        def and_prefill(*args):
            begin(*args)
            other_call(apart.unet)

        apart.scheduler.set_timesteps = and_prefill
        assert torch.equal(apart(TWO), plain)
        apart.scheduler.set_timesteps = begin
    assert apart.scheduler.set_timesteps == timesteps
    maps = assert_branches(oracle, recorder, calls, TWO)
    assert maps.provenance["other_calls"] == {"extra": 1}


@pytest.mark.parametrize(
    ("before", "during", "message"),
    [
        (TWO, ("conditional",), "must name the 1 calls"),
        (("conditional",), TWO, "must hold from the first evaluation on"),
        (("conditional", "image", "unconditional"), ("conditional", "image"), "name the 2 calls"),
    ],
)
def test_numbers_of_calls_that_change(oracle, apart, before, during, message):
    def order(index):
        return before if index < 2 else during

    declared = max(before, during, key=len)
    plain = apart(order)
    with oracle.gives_up(apart.record(declared), ValueError, f".*{message}.*"):
        assert torch.equal(apart(order), plain)


def test_guidance_that_ends_where_the_conditional_call_is_first(oracle, apart):
    order = lambda index: TWO[::-1] if index < 2 else TWO[1:]  # noqa: E731
    with oracle.spy(apart.unet, apart.scheduler) as calls:
        apart(order)
    with apart.record(TWO[::-1]) as recorder:
        apart(order)
    maps, rows = recorder.maps(), calls_numbered(0)
    oracle.assert_maps(maps, calls, groups=GROUPS, rows=rows, reference=REFERENCE)


@pytest.mark.parametrize("first", [0, 1], ids=["from the first on", "later"])
def test_marks_that_are_no_parts(oracle, apart, first):
    recorder = apart.record()
    seen = []

    def marked(name, latents, timestep):
        seen.append(name)
        if len(seen) <= first:
            return apart.call(name, latents, timestep)
        with recorder.calls("conditional"):
            return apart.call(name, latents, timestep)

    order = TWO if first == 0 else TWO[1:]
    message = ".*must have one call named 'conditional'" if first == 0 else ".*from the first"
    with oracle.gives_up(recorder, ValueError, message):
        apart(order, call=marked)
    with pytest.raises(ValueError, match="name must say what the calls are, got ''"):
        recorder.calls("")


def test_a_mark_on_a_batch(tiny, oracle):
    loop = tiny.loop()
    recorder = i2am.record(loop, layout=TokenLayout.cross_attention(GRID))
    message = ".*named 'conditional' must have one row per sample, got 2"
    with oracle.gives_up(recorder, ValueError, message), recorder.calls("conditional"):
        loop(tiny.reference(2))


def test_calls_of_one_evaluation_at_other_timesteps(oracle, apart):
    """A look ahead that comes first would be taken for the first part."""

    def ahead(name, latents, timestep):
        return apart.call(name, latents, timestep if name == "conditional" else timestep - 1)

    recorder = apart.record(TWO)
    with oracle.gives_up(recorder, ValueError, ".*must be at one timestep.*"):
        apart(TWO, call=ahead)


# Layers whose tokens are no grid


def merging(unet, kept, size):
    """Every cross-attention of that many queries gets some of them only, as token merging does."""
    for name, module in unet.named_modules():
        if not name.endswith("attn2"):
            continue

        def merged(states, *args, forward=module.forward, **kwargs):
            if states.shape[1] != size[0] * size[1]:
                return forward(states, *args, **kwargs)
            parts = states[:, :kept]
            output = forward(parts, *args, **kwargs)
            return torch.cat([output] * (states.shape[1] // kept + 1), 1)[:, : states.shape[1]]

        module.forward = merged


# of 16x12 tokens; 48 and 12 are those of the next levels
@pytest.mark.parametrize("kept", [191, 96, 48, 24, 12, 1])
def test_merged_tokens_of_a_level(tiny, kept):
    loop = tiny.loop(levels=3)
    merging(loop.unet, kept, (16, 12))

    def run():
        return loop(tiny.reference(), size=(16, 12), steps=2)

    plain = run()
    with i2am.record(loop, layout=TokenLayout.cross_attention(GRID), time_groups=1) as recorder:
        assert torch.equal(run(), plain)
    message = rf"must have the 16x12 queries of its level's grid, got {kept} in down_blocks.0"
    with pytest.raises(RuntimeError, match=message):
        recorder.maps()
    # the others can be asked for
    layout = TokenLayout.cross_attention(GRID, layers=r"^(down_blocks.1|mid|up_blocks.1).*attn2$")
    with i2am.record(loop, layout=layout, time_groups=1) as recorder:
        run()
    grids = {layer.site.generated_grid for layer in recorder.maps().layer_sums}
    assert grids == {(8, 6), (4, 3)}


def test_merged_tokens_of_one_layer(tiny, oracle):
    loop = tiny.loop(levels=3)
    merging(loop.unet.down_blocks, 48, (16, 12))
    layout = TokenLayout.cross_attention(GRID)
    with i2am.record(loop, layout=layout, time_groups=1) as recorder:
        loop(tiny.reference(), size=(16, 12), steps=2)
    with pytest.warns(UserWarning, match="1 of 7 layers made no attention call.*down_blocks.0"):
        maps = recorder.maps()
    assert not any(layer.startswith("down_blocks.0") for layer in maps.layers)


# What a layer multiplies its branch by


def adapter_run(tiny, pipeline, images=1, **options):
    pictures = [tiny.picture(seed) for seed in range(images)]
    settings = {"num_inference_steps": 2, "height": 16, "width": 24, **tiny.prompts()}
    return tiny.run(pipeline, ip_adapter_image=[pictures], **{**settings, **options})


def expected_r2g(calls, call_index, factor, reference=ADAPTER):
    """fp64 mean over layers and heads of the conditional rows, each layer times its factor."""
    layers = {}
    for call in calls:
        if call.call_index == call_index:
            over_queries = call.logits()[-1:].softmax(-2)[..., reference].mean(-1).mean(1)
            grid = (8, 12) if over_queries.shape[-1] == 96 else (4, 6)
            one = over_queries.unflatten(-1, grid) * factor(call.layer, grid)
            layers[call.layer] = layers.get(call.layer, 0) + one
    resized = [
        torch.nn.functional.interpolate(one[None], size=(8, 12), mode="bilinear")[0]
        for one in layers.values()
    ]
    return torch.stack(resized).mean(0)


def test_scales_per_layer_weigh_the_maps(tiny, oracle):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "full")
    pipeline.set_ip_adapter_scale({"down": 0.25, "mid": 1.0, "up": {"block_1": [0.5, 2.0]}})
    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        adapter_run(tiny, pipeline)
    with i2am.record(pipeline, time_groups=2) as recorder:
        adapter_run(tiny, pipeline)
    maps = recorder.maps()
    factors = [0.25, 1.0, 0.5, 2.0]
    scale = {layer: factor for layer, factor in zip(sorted(maps.layers), factors, strict=True)}

    def factor(layer, grid):
        return scale[layer]

    found = maps.reference_to_generated().double()
    torch.testing.assert_close(found, expected_r2g(calls, 1, factor), rtol=1e-4, atol=1e-8)
    # the raw sums are what the layers attend to
    rows = lambda call: slice(1, 2)  # noqa: E731
    oracle.assert_maps(maps, calls, groups=[0, 1], rows=rows, reference=ADAPTER, call_index=1)
    # G2R is weighed alike
    for layer in maps.layer_sums:
        alone = maps.select(layers=layer.site.layer).generated_to_reference().sum()
        raw = layer.generated_to_reference.sum(1).mean(1).sum()
        torch.testing.assert_close(alone, raw * scale[layer.site.layer])


@pytest.mark.parametrize("image", [0, 1])
def test_masks_and_scales_of_images(tiny, oracle, image, tmp_path):
    from diffusers.image_processor import IPAdapterMaskProcessor

    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "full")
    pipeline.set_ip_adapter_scale([[0.5, 0.9]])
    masks = torch.zeros(1, 2, 16, 24)
    masks[:, 0, :, :12], masks[:, 1, 8:] = 1, 1
    options = {"cross_attention_kwargs": {"ip_adapter_masks": [masks]}, "images": 2}
    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        plain = adapter_run(tiny, pipeline, **options)
    layout = TokenLayout.ip_adapter((4, 4), prefix=1, adapter=image)
    with i2am.record(pipeline, layout=layout, time_groups=2) as recorder:
        assert torch.equal(adapter_run(tiny, pipeline, **options), plain)
    with pytest.warns(UserWarning, match="ip_adapter_masks confine the adapter"):
        maps = recorder.maps()

    def factor(layer, grid):
        mask = IPAdapterMaskProcessor.downsample(masks[:, image], 1, grid[0] * grid[1], 1)
        return (0.5, 0.9)[image] * mask[0, :, 0].unflatten(0, grid).double()

    wanted = expected_r2g(calls, 1 + image, factor)
    found = maps.reference_to_generated()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-8)
    outside = found[0][:, 7:] if image == 0 else found[0][:3]
    assert outside.abs().sum() < 0.02 * found.sum()
    # multipliers stay with the maps
    maps.save(tmp_path / "maps.safetensors")
    loaded = i2am.load_maps(tmp_path / "maps.safetensors")
    assert torch.equal(loaded.reference_to_generated(), found)
    merged = i2am.AttributionMaps.merge([maps, loaded])
    assert torch.equal(merged.reference_to_generated()[1:], found)
    with i2am.record(pipeline, layout=layout, time_groups=2, sums="resized") as recorder:
        with pytest.warns(UserWarning, match="sums='resized' cannot keep masks"):
            adapter_run(tiny, pipeline, **options)


def test_image_of_scale_zero(tiny):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "full")
    pipeline.set_ip_adapter_scale([[0.0, 0.9]])
    masks = torch.ones(1, 2, 16, 24)
    options = {"cross_attention_kwargs": {"ip_adapter_masks": [masks]}, "images": 2}
    informative = []
    for image in (0, 1):
        layout = TokenLayout.ip_adapter((4, 4), prefix=1, adapter=image)
        with i2am.record(pipeline, layout=layout, time_groups=1) as recorder:
            adapter_run(tiny, pipeline, **options)
        if image == 0:
            with pytest.warns(UserWarning, match="layers that multiply their branch by 0: down"):
                maps = recorder.maps()
            assert not maps.reference_to_generated().any()
        informative.append(recorder.maps().informative)
    assert informative == [False, True]


@pytest.mark.parametrize("sums", ["native", "resized"])
def test_scale_that_changes(tiny, oracle, sums):
    """From one group to the next where groups are kept apart, and not within one."""
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "full")

    def turn_down(pipe, index, timestep, tensors):
        pipe.set_ip_adapter_scale(0.5)
        return tensors

    def run():
        pipeline.set_ip_adapter_scale(1.0)
        return adapter_run(tiny, pipeline, callback_on_step_end=turn_down)

    recorder = i2am.record(pipeline, time_groups=1, sums=sums)
    with oracle.gives_up(recorder, ValueError, ".*scale or mask of an adapter must not change"):
        run()
    recorder = i2am.record(pipeline, time_groups=2, sums=sums)
    if sums == "resized":
        with oracle.gives_up(recorder, ValueError, ".*must not change in a recording of"):
            run()
        return
    with recorder:
        run()
    units = recorder.maps().reference_to_generated("time").sum((-2, -1))
    # four layers of 96 or 24 cells, resized to 96: a mean of one unit each, but for the cells
    torch.testing.assert_close(units[:, 1] / units[:, 0], torch.tensor([0.5]), rtol=1e-3, atol=0)


def test_one_scale_of_all_layers_in_resized_sums(tiny):
    pipeline = tiny.ip_adapters(tiny.stable_diffusion(), "full")
    found = []
    for scale in (1.0, 0.3):
        pipeline.set_ip_adapter_scale(scale)
        both = []
        for sums in ("native", "resized"):
            with i2am.record(pipeline, time_groups=2, sums=sums) as recorder:
                adapter_run(tiny, pipeline)
            both.append(recorder.maps().reference_to_generated())
        torch.testing.assert_close(both[1], both[0], rtol=1e-4, atol=1e-7)
        found.append(both[0].sum())
    torch.testing.assert_close(found[1] / found[0], torch.tensor(0.3), rtol=1e-3, atol=0)
