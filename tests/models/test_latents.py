"""Where runs start: noised images instead of noise, hints that are encoded once, two calls."""

import functools

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

# sqrt of the signal that is left at the last of 1000 training steps, from the published betas
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SIGNAL = float((1 - BETAS).prod())


@pytest.fixture(params=["custom", "paint_by_example"])
def pipeline(request):
    """Those that start from noise and give no hints, of themselves."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def start_from(pipeline, monkeypatch):
    """Makes every run of the pipeline start from given pixels."""

    def start(pixels: torch.Tensor) -> None:
        run = functools.partial(type(pipeline).run, pipeline, start_from=pixels)
        monkeypatch.setattr(pipeline, "run", run)

    return start


def pixels(batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_run_starts_from_the_noised_latents(
    pipeline, inputs, run, unet_calls, start_from
) -> None:
    calls = unet_calls(pipeline)
    noise = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(3))
    start_from(pixels())
    run(pipeline, **inputs, latents=noise, vae_posterior="mode", num_inference_steps=1)
    with torch.no_grad():
        clean = pipeline.vae.encode(pixels()).latent_dist.mode() * 0.18215
    assert SIGNAL**0.5 == pytest.approx(0.0683, abs=5e-5)
    expected = SIGNAL**0.5 * clean + (1 - SIGNAL) ** 0.5 * noise
    torch.testing.assert_close(calls[0][0][:1, :4], expected, rtol=0, atol=1e-5)


def test_noise_is_drawn_first_and_the_starts_posterior_next(
    pipeline, inputs, run, unet_calls, start_from
) -> None:
    calls = unet_calls(pipeline)
    start_from(pixels())
    run(pipeline, **inputs, seeds=7, num_inference_steps=1)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(1, 4, 16, 12, generator=generator)
    with torch.no_grad():
        clean = pipeline.vae.encode(pixels()).latent_dist.sample(generator) * 0.18215
    expected = SIGNAL**0.5 * clean + (1 - SIGNAL) ** 0.5 * noise
    torch.testing.assert_close(calls[0][0][:1, :4], expected, rtol=0, atol=1e-5)


def test_every_sample_has_its_own_start(pipeline, inputs, run, unet_calls, start_from) -> None:
    calls = unet_calls(pipeline)
    settings = {**inputs, "num_inference_steps": 1, "guidance_scale": 1.0}
    # one image serves all: the seeds alone make the difference
    start_from(pixels())
    run(pipeline, **settings, num_images_per_prompt=2, seeds=(1, 2))
    run(pipeline, **settings, seeds=(2,))
    torch.testing.assert_close(calls[0][0][1:], calls[1][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(calls[0][0][:1, :4], calls[0][0][1:, :4], atol=0.1)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, EDMEulerScheduler])
def test_schedulers_without_that_noise_are_refused(
    pipeline, inputs, run, unet_calls, start_from, scheduler
) -> None:
    calls = unet_calls(pipeline)
    pipeline.scheduler = scheduler()
    start_from(pixels())
    with pytest.raises(ValueError, match=f"scheduler must have .* got {scheduler.__name__}"):
        run(pipeline, **inputs)
    assert not calls


def test_two_calls_predict_what_one_batch_does(pipeline, inputs, run, unet_calls) -> None:
    together = run(pipeline, **inputs, guidance_scale=5.0)
    calls = unet_calls(pipeline)
    type_ = type(pipeline)
    pipeline.__class__ = type(
        type_.__name__,
        (type_,),
        {"guidance_in_one_batch": False, "guidance_order": ("conditional", "unconditional")},
    )
    apart = run(pipeline, **inputs, guidance_scale=5.0)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)
    assert [len(sample) for sample, _ in calls] == [1] * 6
    source = getattr(pipeline, "image_proj", pipeline.image_encoder)
    torch.testing.assert_close(calls[1][1], source.uncond_vector.detach())


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_hints_are_encoded_once_and_given_to_every_call(
    pipeline, inputs, run, monkeypatch, guidance_scale
) -> None:
    hint, seen, encoded = pixels(seed=5), [], []
    forward, encode = pipeline.unet.forward, pipeline.vae.encode

    def noting_forward(*args, hint, **kwargs):
        seen.append(hint)
        return forward(*args, **kwargs)

    def noting_encode(values, *args, **kwargs):
        encoded.append(torch.equal(values, hint))
        return encode(values, *args, **kwargs)

    monkeypatch.setattr(pipeline.unet, "forward", noting_forward)
    monkeypatch.setattr(pipeline.vae, "encode", noting_encode)
    hinted = functools.partial(type(pipeline).run, pipeline, hints={"hint": hint})
    monkeypatch.setattr(pipeline, "run", hinted)
    run(pipeline, **inputs, guidance_scale=guidance_scale, num_images_per_prompt=2)
    assert sum(encoded) == 1
    halves = 2 if guidance_scale > 1 else 1
    assert [tuple(values.shape) for values in seen] == [(2 * halves, 4, 16, 12)] * 3
    assert all(torch.equal(values, seen[0]) for values in seen)
    assert torch.equal(seen[0][:2], seen[0][-2:])
