"""The published samplers: their grids, their number of calls, and what they leave alone."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from i2am.models import CustomModelDDIMScheduler, pocket_pipeline, samplers
from i2am.models.configuration import STABLE_DIFFUSION_BETAS

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)
DDIM_50 = list(range(981, 0, -20))
# PLMS evaluates the second grid point twice, as the corrector of its first step
PLMS_50 = [981, 961, *range(961, 0, -20)]
PLMS_100 = [991, 981, *range(981, 0, -10)]
CUSTOM_50 = [999, *range(980, 0, -20)]

PUBLISHED = {
    "paint-by-example paper": (samplers.PAINT_BY_EXAMPLE["paper"], DDIM_50, 50, 5.0),
    "paint-by-example official": (samplers.PAINT_BY_EXAMPLE["official"], PLMS_50, 50, 5.0),
    "dci-vton paper": (samplers.DCI_VTON["paper"], DDIM_50, 50, 1.0),
    "dci-vton official": (samplers.DCI_VTON["official"], PLMS_100, 100, 1.0),
    "stableviton paper": (samplers.STABLEVITON["paper"], DDIM_50, 50, 5.0),
    "stableviton official": (samplers.STABLEVITON["official"], PLMS_50, 50, 1.0),
    "custom paper": (samplers.CUSTOM["paper"], CUSTOM_50, 50, 5.0),
    "custom official": (samplers.CUSTOM["official"], CUSTOM_50, 50, 5.0),
}


@pytest.mark.parametrize(
    ("sampler", "grid", "steps", "guidance"), PUBLISHED.values(), ids=PUBLISHED.keys()
)
def test_grids_and_settings_are_the_published_ones(sampler, grid, steps, guidance) -> None:
    scheduler = sampler.build(DDIMScheduler(**STABLE_DIFFUSION_BETAS))
    arguments = sampler.arguments()
    assert arguments == {"num_inference_steps": steps, "guidance_scale": guidance, "eta": 0.0}
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == grid
    assert scheduler.init_noise_sigma == 1
    assert not scheduler.config.get("clip_sample")
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ALPHAS, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["paper", "official"])
def test_known_noise_is_taken_out_down_to_the_signal_of_step_0(name) -> None:
    # where the network always names the true noise every sampler walks the same line; this grid's
    # last step lands on the signal of training step 0, not on the clean sample
    sampler = samplers.PAINT_BY_EXAMPLE[name]
    scheduler = sampler.build(DDIMScheduler(**STABLE_DIFFUSION_BETAS))
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=generator)
    sample = ALPHAS[981] ** 0.5 * clean + (1 - ALPHAS[981]) ** 0.5 * noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(noise, timestep, sample, return_dict=False)[0]
    expected = ALPHAS[0] ** 0.5 * clean + (1 - ALPHAS[0]) ** 0.5 * noise
    torch.testing.assert_close(sample, expected, rtol=0, atol=2e-3)
    assert (sample - clean).abs().max() > 0.05


def test_what_the_weights_were_trained_with_stays() -> None:
    # the pocket model predicts velocities; a public folder may have another schedule of noise
    trained = EulerDiscreteScheduler(
        num_train_timesteps=500, beta_start=0.001, beta_end=0.02, prediction_type="v_prediction"
    )
    made = samplers.CUSTOM["paper"].build(trained)
    assert type(made) is CustomModelDDIMScheduler
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"):
        assert made.config[name] == trained.config[name]
    assert made.config.prediction_type == "v_prediction"


def test_a_pipeline_takes_a_sampler_by_name(pipeline, inputs, run, unet_calls) -> None:
    calls = unet_calls(pipeline)
    for name, count in (("paper", 50), ("official", len(_grid(pipeline)))):
        calls.clear()
        arguments = pipeline.use_sampler(name)
        latents = run(pipeline, **inputs, **{**arguments, "guidance_scale": 1.0})
        assert len(calls) == count == pipeline.num_timesteps
        assert latents.isfinite().all()
        assert pipeline.components["scheduler"] is pipeline.scheduler


def _grid(pipeline) -> list[int]:
    return CUSTOM_50 if type(pipeline).__name__ == "CustomPipeline" else PLMS_50


def test_the_sampler_is_saved_with_the_pipeline(paint_by_example, tmp_path) -> None:
    paint_by_example.use_sampler("official")
    paint_by_example.save_pretrained(tmp_path)
    loaded = type(paint_by_example).from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, PNDMScheduler)
    assert loaded.scheduler.config.skip_prk_steps


def test_an_unknown_sampler_is_refused(pipeline) -> None:
    before = pipeline.scheduler
    with pytest.raises(ValueError, match="sampler must be one of paper, official, got 'fast'"):
        pipeline.use_sampler("fast")
    assert pipeline.scheduler is before


@pytest.mark.parametrize(
    ("sampler", "most"), [(None, 1000), ("paper", 500), ("official", 500)], ids=str
)
def test_steps_that_a_scheduler_cannot_make_are_refused(sampler, most) -> None:
    pipe = pocket_pipeline()
    pipe.sampling_defaults(sampler)
    before = dict(vars(pipe.scheduler))
    assert [pipe.check_steps(steps) for steps in (1, 2, most)] == [1, 2, most]
    for steps in (0, most + 1, 1001, 10**12):
        with pytest.raises(ValueError, match=f"Scheduler cannot make {steps} steps: "):
            pipe.check_steps(steps)
    assert {name: vars(pipe.scheduler)[name] for name in before} == before


def test_plms_makes_no_step_twice() -> None:
    pipe = pocket_pipeline()
    pipe.register_modules(scheduler=samplers.STABLEVITON["official"].build(pipe.scheduler))
    assert pipe.check_steps(1000) == 1000
    with pytest.raises(ValueError, match="PNDMScheduler cannot make 1001 steps: the training had"):
        pipe.check_steps(1001)
