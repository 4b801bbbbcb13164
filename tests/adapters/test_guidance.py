"""Classifier-free guidance in every form: whose rows are recorded."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    LuminaPipeline,
    OmniGenPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback

import i2am
from i2am.adapters import api
from i2am.adapters.branches import Branches
from i2am.adapters.guidance import GuidanceOrder
from i2am.layouts import TokenLayout
from i2am.models import CustomConfiguration

GRID = (4, 3)
REFERENCE = slice(1, 13)
REFERENCE_OF_ADAPTER = slice(1, 17)
SIX_IN_THREE = [0, 0, 1, 1, 2, 2]
ORDERS = {
    "unconditional first": ("unconditional", "conditional"),
    "conditional first": ("conditional", "unconditional"),
    "three parts": ("conditional", "image", "unconditional"),
    "two calls": ("conditional", "unconditional"),
    "off": ("unconditional", "conditional"),
}


def rows_of(branch, form, samples):
    """Truth, from how `ReferenceLoop` builds its batches."""

    def rows(call):
        if form == "two calls":
            return slice(None) if call.denoiser_call == (branch == "unconditional") else None
        if call.rows == samples:
            return slice(None) if branch == "conditional" else None
        part = ORDERS[form].index(branch)
        return slice(part * samples, (part + 1) * samples)

    return rows


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("form", ORDERS)
def test_conditional_rows(tiny, oracle, form, samples):
    loop = tiny.loop()
    layout = TokenLayout.cross_attention(GRID, guidance_order=ORDERS[form])
    with oracle.spy(loop.unet, loop.scheduler) as calls:
        loop(tiny.reference(samples), guidance=form)
    with i2am.record(loop, layout=layout, time_groups=3) as recorder:
        loop(tiny.reference(samples), guidance=form)
    maps = recorder.maps()
    assert maps.provenance["branch"] == "conditional"
    rows = rows_of("conditional", form, samples)
    oracle.assert_maps(maps, calls, groups=SIX_IN_THREE, rows=rows, reference=REFERENCE)


@pytest.mark.parametrize("asked", ["unconditional", "both"])
@pytest.mark.parametrize("form", [form for form in ORDERS if form != "off"])
def test_unconditional_rows_on_request(tiny, oracle, form, asked):
    loop = tiny.loop()
    layout = TokenLayout.cross_attention(GRID, guidance_order=ORDERS[form])
    with oracle.spy(loop.unet, loop.scheduler) as calls:
        loop(tiny.reference(2), guidance=form)
    with i2am.record(loop, layout=layout, time_groups=3, branch=asked) as recorder:
        loop(tiny.reference(2), guidance=form)
    wanted = ["unconditional"] if asked == "unconditional" else ["conditional", "unconditional"]
    assert recorder.maps().provenance["branch"] == wanted[0]
    for branch in wanted:
        maps = recorder.maps(branch)
        assert maps.provenance["branch"] == branch
        rows = rows_of(branch, form, 2)
        oracle.assert_maps(maps, calls, groups=SIX_IN_THREE, rows=rows, reference=REFERENCE)


@pytest.mark.parametrize("form", ["unconditional first", "conditional first", "two calls"])
def test_guidance_cut_off_during_the_run(tiny, oracle, form):
    loop = tiny.loop()
    layout = TokenLayout.cross_attention(GRID, guidance_order=ORDERS[form])
    options = {"guidance": form, "on_step": lambda index: "off" if index == 2 else None}
    with oracle.spy(loop.unet, loop.scheduler) as calls:
        loop(tiny.reference(2), **options)
    assert len({call.rows for call in calls}) == (1 if form == "two calls" else 2)
    with i2am.record(loop, layout=layout, time_groups=3, branch="both") as recorder:
        loop(tiny.reference(2), **options)
    rows = rows_of("conditional", form, 2)
    oracle.assert_maps(recorder.maps(), calls, groups=SIX_IN_THREE, rows=rows, reference=REFERENCE)
    # three of six evaluations had an unconditional half: groups 0 and half of 1
    sums = recorder.maps("unconditional").layer_sums[0].reference_to_generated
    shares = sums.sum((0, 2, 3, 4, 5)) / sums.sum()
    torch.testing.assert_close(shares, torch.tensor([2 / 3, 1 / 3, 0]))


def test_guidance_switched_on_during_the_run(tiny, oracle):
    loop = tiny.loop()
    layout = TokenLayout.cross_attention(GRID)
    options = {
        "guidance": "off",
        "on_step": lambda index: "unconditional first" if index == 1 else None,
    }
    with oracle.spy(loop.unet, loop.scheduler) as calls:
        loop(tiny.reference(2), **options)
    with i2am.record(loop, layout=layout, time_groups=3) as recorder:
        loop(tiny.reference(2), **options)
    oracle.assert_maps(
        recorder.maps(), calls, groups=SIX_IN_THREE, rows=oracle.last(2), reference=REFERENCE
    )


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_stable_diffusion(tiny, oracle, guidance_scale, images):
    pipeline = tiny.stable_diffusion()
    options = {
        **tiny.prompts(),
        "num_inference_steps": 5,
        "guidance_scale": guidance_scale,
        "num_images_per_prompt": images,
        "height": 16,
        "width": 24,
    }
    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        tiny.run(pipeline, **options)
    with i2am.record(pipeline, layout=TokenLayout.cross_attention((2, 3))) as recorder:
        tiny.run(pipeline, **options)
    maps = recorder.maps()
    assert maps.n_samples == images
    oracle.assert_maps(
        maps, calls, groups=[0, 1, 2, 3, 4], rows=oracle.last(images), reference=slice(1, 7)
    )


def test_cutoff_callback_of_diffusers(tiny, oracle):
    pipeline = tiny.stable_diffusion()
    options = {**tiny.prompts(), "num_inference_steps": 5, "height": 16, "width": 16}
    callback = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.4)}
    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        tiny.run(pipeline, **options, **callback)
    first = calls[0].layer
    assert [call.rows for call in calls if call.layer == first] == [2, 2, 2, 1, 1]
    with i2am.record(pipeline, layout=TokenLayout.cross_attention((2, 3))) as recorder:
        tiny.run(pipeline, **options, **callback)
    oracle.assert_maps(
        recorder.maps(),
        calls,
        groups=[0, 1, 2, 3, 4],
        rows=oracle.last(1),
        reference=slice(1, 7),
    )


@pytest.mark.parametrize(
    ("guidance_scale", "order", "conditional"),
    [
        (3.0, ("unconditional", "conditional", "perturbed"), 1),
        # without guidance the batch is the conditional part and its perturbed copy
        (1.0, ("conditional", "perturbed"), 0),
    ],
    ids=["three parts", "two parts"],
)
def test_perturbed_attention_guidance(tiny, oracle, guidance_scale, order, conditional):
    pipeline = tiny.stable_diffusion(StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    options = {**tiny.prompts(), "num_inference_steps": 3, "height": 16, "width": 16}
    options |= {"guidance_scale": guidance_scale, "pag_scale": 2.0}
    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        tiny.run(pipeline, **options)
    assert {call.rows for call in calls} == {2 + (guidance_scale > 1)}
    layout = TokenLayout.cross_attention((2, 3), guidance_order=order)
    with i2am.record(pipeline, layout=layout, time_groups=3) as recorder:
        tiny.run(pipeline, **options)
    oracle.assert_maps(
        recorder.maps(),
        calls,
        groups=[0, 1, 2],
        rows=lambda call: slice(conditional, conditional + 1),
        reference=slice(1, 7),
    )


def test_instruct_pix2pix(tiny, oracle):
    pipeline = tiny.stable_diffusion(StableDiffusionInstructPix2PixPipeline, in_channels=8)
    options = {**tiny.prompts(), "image": tiny.picture(), "num_inference_steps": 3}
    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        tiny.run(pipeline, **options)
    assert {call.rows for call in calls} == {3}
    order = ("conditional", "image", "unconditional")
    layout = TokenLayout.cross_attention((2, 3), guidance_order=order)
    with i2am.record(pipeline, layout=layout, time_groups=3, branch="both") as recorder:
        tiny.run(pipeline, **options)
    for part, branch in ((0, "conditional"), (2, "unconditional")):
        oracle.assert_maps(
            recorder.maps(branch),
            calls,
            groups=[0, 1, 2],
            rows=lambda call, part=part: slice(part, part + 1),
            reference=slice(1, 7),
        )


def test_instruct_pix2pix_with_an_adapter(tiny, oracle):
    """Its layout is found, and knows that the first of three parts has text and image."""
    pipeline = tiny.stable_diffusion(StableDiffusionInstructPix2PixPipeline, in_channels=8)
    tiny.ip_adapters(pipeline, "full")
    options = {"image": tiny.picture(), "ip_adapter_image": tiny.picture(1)}
    options |= {**tiny.prompts(), "num_inference_steps": 3}
    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        plain = tiny.run(pipeline, **options)
    with i2am.record(pipeline, time_groups=3) as recorder:
        assert torch.equal(tiny.run(pipeline, **options), plain)
    maps = recorder.maps()
    assert maps.provenance["guidance_order"] == ["conditional", "image", "unconditional"]
    oracle.assert_maps(
        maps,
        calls,
        groups=[0, 1, 2],
        rows=lambda call: slice(0, 1),
        reference=REFERENCE_OF_ADAPTER,
        call_index=1,
    )


def test_perturbed_attention_with_an_adapter(tiny, oracle):
    pipeline = tiny.ip_adapters(
        tiny.stable_diffusion(StableDiffusionPAGPipeline, pag_applied_layers=["mid"]), "full"
    )
    options = {**tiny.prompts(), "ip_adapter_image": tiny.picture(1), "num_inference_steps": 3}
    options |= {"pag_scale": 2.0, "height": 16, "width": 16}
    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        plain = tiny.run(pipeline, **options)
    assert {call.rows for call in calls} == {3}
    with i2am.record(pipeline, time_groups=3) as recorder:
        assert torch.equal(tiny.run(pipeline, **options), plain)
    oracle.assert_maps(
        recorder.maps(),
        calls,
        groups=[0, 1, 2],
        rows=lambda call: slice(1, 2),
        reference=REFERENCE_OF_ADAPTER,
        call_index=1,
    )
    # without guidance the second of two parts is the perturbed one, which that order does not say
    recorder = i2am.record(pipeline, time_groups=3)
    with oracle.gives_up(recorder, ValueError, ".*must name the 2 parts .* got .*'perturbed'"):
        tiny.run(pipeline, **options, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("cls", "order"),
    [
        (StableDiffusionInstructPix2PixPipeline, "'conditional', 'image', 'unconditional'"),
        (StableDiffusionXLInstructPix2PixPipeline, "'conditional', 'image', 'unconditional'"),
        (StableDiffusionPAGPipeline, "'unconditional', 'conditional', 'perturbed'"),
        (OmniGenPipeline, "'conditional', 'unconditional', 'image'"),
        (LuminaPipeline, "'conditional', 'unconditional'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_order_that_is_not_the_pipelines(tiny, cls, order):
    """Known before the run; also of pipelines that inherit from these."""
    loop = tiny.loop()
    own = {"__init__": lambda self: None, "components": loop.components}
    pipeline = type("Own", (cls,), own)()
    message = rf"guidance_order of the layout must be \({order}\).* for Own, got \('uncond"
    layout = TokenLayout.cross_attention(GRID, guidance_order=("unconditional", "conditional"))
    with pytest.raises(ValueError, match=message):
        i2am.record(pipeline, layout=layout)


@pytest.mark.parametrize(
    ("form", "order", "message"),
    [
        ("three parts", ("unconditional", "conditional"), "name the 3 parts .*6 rows for 2 sam"),
        (
            "unconditional first",
            ("conditional", "image", "unconditional"),
            "name the 2 parts .*4 rows for 2 samples.*, got .*'image'",
        ),
        ("conditional first", ("conditional",), "name the 2 parts"),
    ],
)
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_parts_that_the_order_does_not_name(tiny, oracle, form, order, message, later):
    loop = tiny.loop()
    layout = TokenLayout.cross_attention(GRID, guidance_order=order)
    options = {"guidance": form}
    if later:
        options = {"guidance": "off", "on_step": lambda index: form if index == 2 else None}
    plain = loop(tiny.reference(2), **options)
    with oracle.gives_up(i2am.record(loop, layout=layout), ValueError, f".*{message}"):
        image = loop(tiny.reference(2), **options)
    assert torch.equal(image, plain)


def test_order_of_the_custom_pipeline(tiny, oracle):
    """`i2am.models` puts the conditional half first, and says so in its layout."""
    configuration = CustomConfiguration(
        vae=dict(tiny.vae().config),
        image_encoder={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "mlp_ratio": 1,
            "image_size": 16,
            "patch_size": 4,
        },
        image_proj={"width": 16, "context_width": 16, "tokens": 13, "layers": 2},
        unet=dict(tiny.unet(in_channels=12, sample_size=(12, 8)).config),
        scheduler=type(tiny.stable_diffusion().scheduler),
        scheduler_options=tiny.betas,
        reference_size=(16, 12),
    )
    pipeline = configuration.build(seed=0)
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "image": [tiny.picture(seed, 24, 16) for seed in (0, 1)],
        "mask_image": tiny.Image.new("L", (16, 24), 255),
        "reference_image": [tiny.picture(seed) for seed in (2, 3)],
        "num_inference_steps": 3,
        "num_images_per_prompt": 2,
    }
    with oracle.spy(pipeline.unet, pipeline.scheduler) as calls:
        plain = tiny.run(pipeline, **options)
    with i2am.record(pipeline, time_groups=3) as recorder:
        assert torch.equal(tiny.run(pipeline, **options), plain)
    maps = recorder.maps()
    assert maps.layer_sums[0].site.reference_grid == GRID
    oracle.assert_maps(
        maps, calls, groups=[0, 1, 2], rows=lambda call: slice(0, 4), reference=REFERENCE
    )


@pytest.mark.parametrize("asked", ["conditional", "both"])
def test_first_evaluation_leaves_nothing_behind(tiny, monkeypatch, asked):
    """Whole batches are recorded until the number of samples shows; then that memory is freed."""
    made = []

    class Watched(api.Accumulator):
        def __init__(self, **options):
            super().__init__(**options)
            made.append(weakref.ref(self))

    monkeypatch.setattr(api, "Accumulator", Watched)
    loop = tiny.loop()
    alive = []

    def on_step(index):
        alive.append([ref() for ref in made if ref() is not None and ref().unresolved])

    layout = TokenLayout.cross_attention(GRID, guidance_order=("conditional", "unconditional"))
    with i2am.record(loop, layout=layout, time_groups=1, branch=asked) as recorder:
        loop(tiny.reference(2), guidance="two calls", on_step=on_step)
    assert len(made) >= 3
    assert alive == [[]] * 6
    for branch in ("conditional", "unconditional")[: 1 + (asked == "both")]:
        for layer in recorder.maps(branch).layer_sums:
            assert layer.reference_to_generated.shape[0] == 2
            storage = layer.reference_to_generated.untyped_storage()
            assert storage.nbytes() == layer.reference_to_generated.nbytes


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([2], {(0, "conditional")}),
        ([4], {(0, "conditional"), (0, "unconditional")}),
        ([2, 2], {(0, "conditional"), (1, "unconditional")}),
        ([2, 2, 2], {(0, "conditional"), (1, "unconditional")}),
        ([4, 2], {(0, "conditional"), (0, "unconditional")}),
    ],
    ids=["off", "one batch", "two calls", "a third call", "a call beside"],
)
def test_calls_beside_guidance_are_nobodys(calls, expected):
    """Self-attention guidance calls the denoiser once more."""
    branches = known_branches(first=calls)
    met = set()
    for number, rows in enumerate(calls):
        for part, accumulator in branches.targets(rows):
            [name] = [name for name, made in branches.recorded.items() if made is accumulator]
            met.add((number, name))
            assert part.stop - part.start == 2
    assert met == expected
    assert branches.met == {name for _, name in expected}


def known_branches(first, samples=2):
    """Branches of a run whose first evaluation is over."""
    branches = Branches(
        lambda unresolved: SimpleNamespace(samples=None),
        order=GuidanceOrder(calls=("conditional", "unconditional")),
        wanted=("conditional", "unconditional"),
    )
    for rows in first:
        branches.targets(rows)
    branches.end(samples)
    return branches


def test_windows_are_refused():
    """Several batches of one evaluation: of which one maps would be, nobody can tell."""
    branches = known_branches(first=[4])
    branches.targets(4)
    with pytest.raises(ValueError, match=r"one batch of guidance parts.* got another of 4 rows"):
        branches.targets(4)


@pytest.mark.parametrize(
    ("rows", "samples"), [(3, 2), (2, 4)], ids=["a part of a sample", "fewer rows than samples"]
)
def test_rows_that_are_no_multiple_of_the_samples(rows, samples):
    message = rf"batch must be a multiple of the {samples} samples .* got {rows} rows"
    with pytest.raises(ValueError, match=message):
        known_branches(first=[rows], samples=samples)
    later = known_branches(first=[samples], samples=samples)
    with pytest.raises(ValueError, match=message):
        later.targets(rows)


def test_stable_diffusion_without_guidance_has_no_unconditional_rows(tiny):
    pipeline = tiny.stable_diffusion(StableDiffusionPipeline)
    layout = TokenLayout.cross_attention((2, 3))
    with i2am.record(pipeline, layout=layout, time_groups=1, branch="both") as recorder:
        tiny.run(
            pipeline,
            **tiny.prompts(),
            guidance_scale=1.0,
            num_inference_steps=2,
            height=16,
            width=16,
        )
    recorder.maps("conditional")
    with pytest.raises(RuntimeError, match=r"no unconditional attention .* only conditional rows"):
        recorder.maps("unconditional")
