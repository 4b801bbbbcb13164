"""What all pipelines must do: guidance, batches, generators, callbacks, outputs, refusals."""

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.utils import BaseOutput
from PIL import Image

from i2am.models import StableVITONPipeline
from i2am.models.sampling import Sampling

SIZE = {"height": 32, "width": 24}


FAMILIES = ["custom", "paint_by_example", "stableviton"]


@pytest.fixture(params=FAMILIES)
def pipeline(request):
    return request.getfixturevalue(request.param)


# every family hands these settings on unchanged (the first test), and then the code is the same
once = pytest.mark.parametrize("pipeline", ["custom"], indirect=True)


def test_every_setting_reaches_the_shared_code(pipeline, inputs, monkeypatch) -> None:
    settings = {
        "num_inference_steps": 7,
        "guidance_scale": 3.5,
        "num_images_per_prompt": 2,
        "eta": 0.25,
        "generator": torch.Generator(),
        "output_type": "np",
        "vae_posterior": "mode",
        "callback_on_step_end": lambda *_: None,
        "callback_on_step_end_tensor_inputs": ["latents"],
    }
    others = {"latents": torch.zeros(2, 4, 16, 12), "return_dict": False}
    seen = []
    monkeypatch.setattr(pipeline, "run", lambda *given, **options: seen.append((given, options)))
    for paste_back in (True, False):
        pipeline(**inputs, **SIZE, **settings, **others, paste_back=paste_back)
    for (given, options), pasted in zip(seen, (True, False), strict=True):
        assert given == (Sampling(**settings),)
        assert options["latents"] is others["latents"]
        assert options["return_dict"] is False
        assert (options["batch"], options["size"]) == (1, (32, 24))
        assert (options["paste_onto"] is not None) == pasted


def evaluation(pipeline) -> int:
    """UNet calls of a step with guidance."""
    return 1 if pipeline.guidance_in_one_batch else 2


def test_guidance_halves_come_in_the_declared_order(pipeline, inputs, run, unet_calls) -> None:
    calls = unet_calls(pipeline)
    run(pipeline, **inputs, guidance_scale=5.0, num_inference_steps=1)
    run(pipeline, **inputs, guidance_scale=1.0, num_inference_steps=1)
    *guided, (single_sample, single_context) = calls
    assert len(guided) == evaluation(pipeline)
    sample, context = (torch.cat(parts) for parts in zip(*guided, strict=True))
    assert torch.equal(sample[0], sample[1])
    assert torch.equal(sample[:1], single_sample)
    source = getattr(pipeline, "image_proj", pipeline.image_encoder)
    expected = {"conditional": single_context[0], "unconditional": source.uncond_vector[0]}
    for half, values in zip(pipeline.guidance_order, context, strict=True):
        torch.testing.assert_close(values, expected[half])
    assert not torch.allclose(expected["conditional"], expected["unconditional"])


def test_guidance_extrapolates_from_the_unconditional_half(
    pipeline, inputs, run, monkeypatch
) -> None:
    outputs = {"conditional": 1.0, "unconditional": 3.0}
    order = iter(pipeline.guidance_order)

    def constant_halves(module, args, kwargs, output):
        return (torch.cat([torch.full_like(row[None], outputs[next(order)]) for row in output[0]]),)

    pipeline.unet.register_forward_hook(constant_halves, with_kwargs=True)
    seen = []
    step = type(pipeline.scheduler).step

    def note(self, model_output, *args, **kwargs):
        seen.append(model_output)
        return step(self, model_output, *args, **kwargs)

    monkeypatch.setattr(type(pipeline.scheduler), "step", note)
    run(pipeline, **inputs, guidance_scale=5.0, num_inference_steps=1)
    assert torch.equal(seen[0], torch.full_like(seen[0], 3 + 5 * (1 - 3)))


def test_a_batch_of_three_equals_three_single_runs(pipeline, batch_inputs, run) -> None:
    together = run(pipeline, **batch_inputs, seeds=(10, 11, 12), eta=0.5)
    assert together.shape == (3, 4, 16, 12)
    for index in range(3):
        one = {name: values[index] for name, values in batch_inputs.items()}
        alone = run(pipeline, **one, seeds=(10 + index,), eta=0.5)
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-4)


def test_images_per_prompt_are_input_major(pipeline, batch_inputs, run) -> None:
    two = {name: values[:2] for name, values in batch_inputs.items()}
    together = run(pipeline, **two, num_images_per_prompt=2, seeds=(20, 21, 22, 23))
    assert len(together) == 4
    for sample in range(4):
        one = {name: values[sample // 2] for name, values in batch_inputs.items()}
        alone = run(pipeline, **one, seeds=(20 + sample,))
        torch.testing.assert_close(together[sample], alone[0], rtol=1e-4, atol=1e-4)


def test_one_input_serves_a_batch(pipeline, batch_inputs, inputs, run) -> None:
    mixed = {**inputs, "reference_image": batch_inputs["reference_image"]}
    together = run(pipeline, **mixed, seeds=(1, 2, 3))
    last = run(pipeline, **{**inputs, "reference_image": mixed["reference_image"][2]}, seeds=(3,))
    torch.testing.assert_close(together[2], last[0], rtol=1e-4, atol=1e-4)


@once
def test_same_seed_same_image_and_global_noise_untouched(pipeline, inputs, run) -> None:
    before = torch.random.get_rng_state()
    first, second, other = (run(pipeline, **inputs, seeds=seed) for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_posterior_mode_leaves_the_start_as_the_only_noise(pipeline, inputs, run) -> None:
    start = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(3))
    options = {**inputs, "latents": start}
    mode = [run(pipeline, **options, seeds=s, vae_posterior="mode") for s in (1, 2)]
    drawn = [run(pipeline, **options, seeds=s, vae_posterior="sample") for s in (1, 2)]
    assert torch.equal(mode[0], mode[1])
    assert not torch.equal(drawn[0], drawn[1])


@once
def test_input_kinds_agree(pipeline, inputs, run) -> None:
    arrays = {name: np.array(values) for name, values in inputs.items()}
    floats = {name: values.astype(np.float32)[None] / 255 for name, values in arrays.items()}
    tensors = {
        "image": torch.from_numpy(floats["image"]).movedim(-1, 1),
        "mask_image": torch.from_numpy(floats["mask_image"]),
        "reference_image": torch.from_numpy(floats["reference_image"]).movedim(-1, 1),
    }
    expected = run(pipeline, **arrays)
    for kind in (floats, tensors, {**inputs, "reference_image": arrays["reference_image"]}):
        torch.testing.assert_close(run(pipeline, **kind), expected, rtol=0, atol=1e-4)


@once
@pytest.mark.parametrize(
    ("output_type", "kind", "shape"),
    [
        ("pil", list, None),
        ("np", np.ndarray, (2, 32, 24, 3)),
        ("pt", torch.Tensor, (2, 3, 32, 24)),
        ("latent", torch.Tensor, (2, 4, 16, 12)),
    ],
)
def test_output_types(pipeline, inputs, run, output_type, kind, shape) -> None:
    images = run(pipeline, **inputs, **SIZE, num_images_per_prompt=2, output_type=output_type)
    assert isinstance(images, kind)
    if shape is None:
        assert [image.size for image in images] == [(24, 32)] * 2
        assert all(isinstance(image, Image.Image) for image in images)
    else:
        assert tuple(images.shape) == shape
        assert output_type == "latent" or (images.min() >= 0 and images.max() <= 1)


@once
def test_return_dict_false_gives_a_tuple(pipeline, inputs) -> None:
    settings = {"num_inference_steps": 1, **inputs}
    (images,) = pipeline(**settings, return_dict=False)
    result = pipeline(**settings)
    assert isinstance(result, BaseOutput)
    assert len(images) == len(result.images) == 1


@once
def test_paste_back_keeps_the_pixels_outside_the_mask(pipeline, inputs, run) -> None:
    person = np.array(inputs["image"]).astype(np.float32) / 255
    keep = np.array(inputs["mask_image"]) == 0
    settings = {**inputs, "output_type": "np"}
    pasted = run(pipeline, **settings, paste_back=True)[0]
    plain = run(pipeline, **settings)[0]
    np.testing.assert_allclose(pasted[keep], person[keep], atol=1e-6)
    np.testing.assert_array_equal(pasted[~keep], plain[~keep])
    assert np.abs(plain[keep] - person[keep]).max() > 0.05


@once
@pytest.mark.parametrize(("height", "width"), [(32, 24), (36, 20), (22, 46)], ids=str)
def test_sizes(pipeline, inputs, run, height, width) -> None:
    images = run(pipeline, **inputs, height=height, width=width, output_type="np")
    assert images.shape == (1, height, width, 3)


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        (PNDMScheduler(skip_prk_steps=True, steps_offset=1), 5),
        (HeunDiscreteScheduler(), 7),
        (EulerAncestralDiscreteScheduler(), 4),
        (DPMSolverMultistepScheduler(), 4),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Scheduler"),
)
def test_samplers(pipeline, inputs, run, unet_calls, scheduler, calls) -> None:
    pipeline.scheduler = scheduler
    seen = unet_calls(pipeline)
    settings = {**inputs, "num_inference_steps": 4}
    if isinstance(pipeline, StableVITONPipeline) and scheduler.init_noise_sigma != 1:
        # it starts from a noised image, not from noise
        with pytest.raises(ValueError, match=f"got {type(scheduler).__name__}"):
            run(pipeline, **settings)
        return
    first, second = (run(pipeline, **settings) for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert pipeline.num_timesteps == calls
    assert len(seen) == 2 * calls * evaluation(pipeline)


@pytest.mark.parametrize("pipeline", ["custom", "paint_by_example"], indirect=True)
def test_noise_is_scaled_as_the_scheduler_wants_it(pipeline, inputs, run, unet_calls) -> None:
    calls = unet_calls(pipeline)
    pipeline.scheduler = scheduler = EulerAncestralDiscreteScheduler()
    start = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(3))
    run(pipeline, **inputs, latents=start)
    sigma = scheduler.init_noise_sigma
    assert sigma > 10
    torch.testing.assert_close(calls[0][0][:1, :4], start * sigma / (sigma**2 + 1) ** 0.5)


@once
def test_latents_are_shifted_and_scaled_by_the_vaes_configuration(pipeline) -> None:
    pipeline.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    image = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = pipeline.encode_image(image, 1, Sampling(vae_posterior="mode"))
        plain = pipeline.vae.encode(image).latent_dist.mode()
        torch.testing.assert_close(latents, (plain - 0.25) * 0.5)
        decoded = pipeline.decode_latents(latents)
        torch.testing.assert_close(decoded, pipeline.vae.decode(plain).sample, rtol=0, atol=1e-5)


@once
def test_callback_sees_and_replaces_latents(pipeline, inputs, run) -> None:
    seen = []

    def replace(pipe, index, timestep, tensors):
        assert pipe is pipeline
        seen.append((index, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 2 else {}

    result = run(pipeline, **inputs, callback_on_step_end=replace)
    assert seen == [(0, 667), (1, 334), (2, 1)]
    assert torch.equal(result, torch.zeros_like(result))


def test_guidance_can_end_in_mid_run(pipeline, inputs, run, unet_calls) -> None:
    calls = unet_calls(pipeline)

    def end_guidance(pipe, index, timestep, tensors):
        assert pipe.guidance_scale == (5.0 if index == 0 else 1.0)
        pipe._guidance_scale = 1.0

    run(pipeline, **inputs, guidance_scale=5.0, callback_on_step_end=end_guidance)
    first = [2] if pipeline.guidance_in_one_batch else [1, 1]
    assert [len(sample) for sample, _ in calls] == [*first, 1, 1]


@once
def test_interrupt_leaves_out_the_rest(pipeline, inputs, run, unet_calls) -> None:
    calls = unet_calls(pipeline)

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = True

    run(pipeline, **inputs, callback_on_step_end=stop)
    assert len(calls) == evaluation(pipeline)
    assert pipeline.interrupt
    run(pipeline, **inputs)
    assert len(calls) == evaluation(pipeline) * (1 + 3)


@once
def test_progress_bar_counts_steps(pipeline, inputs, capsys) -> None:
    pipeline.set_progress_bar_config(disable=False)
    pipeline.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    pipeline(**inputs, num_inference_steps=4)
    assert "4/4" in capsys.readouterr().err


def test_half_precision_runs(pipeline, inputs, run) -> None:
    start = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(3))
    settings = {**inputs, "latents": start, "vae_posterior": "mode", "output_type": "pt"}
    full = run(pipeline, **settings)
    pipeline.to(torch.bfloat16)
    half = run(pipeline, **settings)
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.03


def test_offloaded_modules_give_the_same_image(pipeline, inputs, run) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = run(pipeline, **inputs)
    for name in pipeline.component_classes:
        if name != "scheduler":
            accelerate.cpu_offload(getattr(pipeline, name), torch.device("cpu"))
    assert pipeline.unet.conv_in.weight.device.type == "meta"
    assert torch.equal(run(pipeline, **inputs), expected)


GREY = Image.new("RGB", (24, 32))
WHITE = Image.new("L", (24, 32), 255)
WRONG = {
    "no image": ({"image": None}, ValueError, "^image must be given"),
    "no mask": ({"mask_image": None}, ValueError, "mask_image must be given"),
    "no reference": ({"reference_image": None}, ValueError, "reference_image must be given"),
    "path": ({"image": "person.png"}, TypeError, "image must be a PIL image.* got str"),
    "empty list": ({"reference_image": []}, ValueError, "reference_image must hold at least one"),
    "two channels": (
        {"image": np.zeros((32, 24, 2), np.uint8)},
        ValueError,
        r"image must have shape \[height, width, 3\].* got \[32, 24, 2\]",
    ),
    "five channels": (
        {"image": torch.zeros(1, 5, 32, 24)},
        ValueError,
        r"image must have shape .*, got \[1, 5, 32, 24\]",
    ),
    "range": (
        {"image": torch.full((3, 32, 24), 255.0)},
        ValueError,
        r"image must have values in \[0, 1\], got 255 to 255",
    ),
    "not a number": (
        {"reference_image": torch.full((3, 8, 8), torch.nan)},
        ValueError,
        "reference_image must have values in",
    ),
    "mask range": (
        {"mask_image": torch.full((32, 24), 2.0)},
        ValueError,
        r"mask_image must hold values in \[0, 1\]",
    ),
    "mask shape": (
        {"mask_image": torch.ones(1, 2, 32, 24)},
        ValueError,
        r"mask_image must have shape \[height, width\].* got \[1, 2, 32, 24\]",
    ),
    "mask size": (
        {"mask_image": Image.new("L", (32, 24))},
        ValueError,
        r"mask_image must have the size of image, 32 x 24 \(height x width\), got 24 x 32",
    ),
    "height": ({"height": 31}, ValueError, "height must be a positive multiple of 2, got 31"),
    "width": ({"width": 0}, ValueError, "width must be a positive multiple of 2, got 0"),
    "mask count": (
        {"image": [GREY] * 3, "mask_image": [WHITE] * 2},
        ValueError,
        "mask_image must hold 1 image or 3, as many as image, got 2",
    ),
    "reference count": (
        {"image": [GREY] * 3, "reference_image": [GREY] * 2},
        ValueError,
        "reference_image must hold 1 image or 3, as many as image, got 2",
    ),
    "generators": (
        {"generator": [torch.Generator()] * 2},
        ValueError,
        "generator must be one generator or a list of 1, .* got 2",
    ),
    "latents": (
        {"latents": torch.zeros(1, 4, 8, 8)},
        ValueError,
        r"latents must have shape \[1, 4, 16, 12\], got \[1, 4, 8, 8\]",
    ),
    "steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be .* got 0"),
    "steps kind": ({"num_inference_steps": 2.5}, ValueError, "must be an integer .* got 2.5"),
    "images per prompt": ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
    "guidance": ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be a finite"),
    "eta": ({"eta": 2.0}, ValueError, r"eta must lie in \[0, 1\], got 2.0"),
    "output type": ({"output_type": "jpg"}, ValueError, "output_type must be one of .* 'jpg'"),
    "posterior": ({"vae_posterior": "mean"}, ValueError, "vae_posterior must be one of .* 'mean'"),
    "callback": ({"callback_on_step_end": 3}, TypeError, "must be callable, got int"),
    "callback tensors": (
        {"callback_on_step_end_tensor_inputs": ["noise_pred"]},
        ValueError,
        r"may name only 'latents', got \['noise_pred'\]",
    ),
    "paste latents": (
        {"paste_back": True, "output_type": "latent"},
        ValueError,
        "paste_back needs an output_type other than 'latent'",
    ),
}


# what reading pictures and `Sampling` refuse is refused alike for all; the rest a family may miss
SHARED = {"two channels", "five channels", "range", "not a number", "mask range", "mask shape"}
SHARED |= {"steps", "steps kind", "images per prompt", "guidance", "output type", "posterior"}
SHARED |= {"callback", "callback tensors"}


@pytest.mark.parametrize(
    ("pipeline", "case"),
    [
        (family, case)
        for case in WRONG
        for family in FAMILIES[: 1 if case in SHARED else len(FAMILIES)]
    ],
    indirect=["pipeline"],
)
def test_bad_input(pipeline, inputs, unet_calls, case) -> None:
    change, error, message = WRONG[case]
    calls = unet_calls(pipeline)
    with pytest.raises(error, match=message) as caught:
        pipeline(**{**inputs, "num_inference_steps": 1, **change})
    assert "\n" not in str(caught.value)
    assert not calls


@once
def test_eta_is_refused_where_the_scheduler_has_none(pipeline, inputs) -> None:
    pipeline.scheduler = PNDMScheduler(skip_prk_steps=True)
    with pytest.raises(ValueError, match="eta must be 0 for PNDMScheduler"):
        pipeline(**inputs, num_inference_steps=1, eta=0.5)


def test_unet_of_another_family_is_refused(pipeline, inputs) -> None:
    wanted = pipeline.unet.config.in_channels
    pipeline.unet.register_to_config(in_channels=4)
    with pytest.raises(ValueError, match=f"unet must take {wanted} input channels.* has 4"):
        pipeline(**inputs, num_inference_steps=1)
