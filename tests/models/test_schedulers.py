"""The custom model's grid and steps against closed-form numbers."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from i2am.models import FULL_SIZE, POCKET, CustomModelDDIMScheduler
from i2am.models.configuration import STABLE_DIFFUSION_BETAS

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)


def scheduler(steps: int = 50, **options: object) -> CustomModelDDIMScheduler:
    made = CustomModelDDIMScheduler(**{**STABLE_DIFFUSION_BETAS, **options})
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize(
    ("steps", "grid"),
    [
        (50, [999, *range(980, 0, -20)]),
        (100, [999, *range(990, 0, -10)]),
        (1, [999]),
        (3, [999, 667, 333]),
        (500, [999, *range(998, 0, -2)]),
    ],
    ids=str,
)
def test_grid(steps: int, grid: list[int]) -> None:
    assert scheduler(steps).timesteps.tolist() == grid


def test_published_settings() -> None:
    full, pocket = (size.scheduler(**size.scheduler_options) for size in (FULL_SIZE, POCKET))
    full.set_timesteps(50)
    pocket.set_timesteps(50)
    assert full.timesteps[:2].tolist() == [999, 980]
    assert full.timesteps[-1] == 20
    assert pocket.timesteps.tolist() == list(range(981, 0, -20))
    # the published value of the signal that is left at the noisiest step
    assert full.alphas_cumprod[999].sqrt() == pytest.approx(0.0683, abs=5e-5)


def test_steps_with_known_noise_sum_up_in_closed_form() -> None:
    # in y = x / sqrt(a) and s = sqrt((1 - a) / a) a DDIM step is y' = y + (s' - s) * noise
    made = scheduler()
    grid = made.timesteps.tolist()
    ratio = [float(((1 - ALPHAS[t]) / ALPHAS[t]) ** 0.5) for t in grid] + [0.0]
    noises = [float(torch.tensor(k * 0.7).sin()) for k in range(len(grid))]
    sample = torch.full((1, 1, 2, 2), 0.3, dtype=torch.float64)
    expected = 0.3 / float(ALPHAS[999]) ** 0.5 + sum(
        (after - before) * noise
        for (before, after), noise in zip(pairwise(ratio), noises, strict=True)
    )
    for timestep, noise in zip(grid, noises, strict=True):
        sample = made.step(torch.full_like(sample, noise), timestep, sample).prev_sample
    # the scheduler's tables are fp32: at t = 20 they hold 1 - a with an error of 1e-5 of it
    assert sample.flatten().tolist() == pytest.approx([expected] * 4, abs=2e-4)


def test_first_step_goes_to_980_and_the_last_returns_the_clean_sample() -> None:
    made = scheduler()
    clean, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=seeded())

    def noisy(alpha: torch.Tensor) -> torch.Tensor:
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    first = made.step(noise, torch.tensor(999), noisy(ALPHAS[999])).prev_sample
    torch.testing.assert_close(first, noisy(ALPHAS[980]), rtol=0, atol=1e-5)
    assert (first - noisy(ALPHAS[979])).abs().max() > 1e-3

    last = made.step(noise, 20, noisy(ALPHAS[20]))
    torch.testing.assert_close(last.prev_sample, clean, rtol=0, atol=1e-5)
    assert torch.equal(last.prev_sample, last.pred_original_sample)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_says_the_same(prediction_type: str) -> None:
    clean, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=seeded())
    signal, sigma = ALPHAS[500].sqrt(), (1 - ALPHAS[500]).sqrt()
    output = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean}
    result, predicted = scheduler(prediction_type=prediction_type).step(
        output[prediction_type], 500, signal * clean + sigma * noise, return_dict=False
    )
    torch.testing.assert_close(predicted, clean, rtol=0, atol=1e-5)
    expected = ALPHAS[480].sqrt() * clean + (1 - ALPHAS[480]).sqrt() * noise
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_eta_adds_noise_of_the_ddim_variance() -> None:
    made = scheduler()
    sample, output = torch.randn(2, 2, 4, 8, 8, generator=seeded())
    generators = [seeded(3), seeded(4)]
    plain = made.step(output, 500, sample).prev_sample
    noisy = made.step(output, 500, sample, eta=1.0, generator=generators).prev_sample
    before, after = ALPHAS[500], ALPHAS[480]
    deviation = float((((1 - after) / (1 - before)) * (1 - before / after)) ** 0.5)
    drawn = torch.cat([torch.randn(1, 4, 8, 8, generator=seeded(seed)) for seed in (3, 4)])
    shift = float((1 - after - deviation**2) ** 0.5 - (1 - after) ** 0.5) * output
    torch.testing.assert_close(noisy - plain, deviation * drawn + shift, rtol=0, atol=1e-5)


def test_agrees_with_diffusers_where_the_grids_do() -> None:
    # 980 -> 960 is a step of both when stock DDIM is offset by 0
    ours = scheduler(clip_sample=True, clip_sample_range=0.8)
    stock = DDIMScheduler.from_config(ours.config)
    stock.set_timesteps(50)
    sample, output = torch.randn(2, 1, 4, 8, 8, generator=seeded())
    for eta in (0.0, 0.5):
        results = [
            one.step(output, 980, sample, eta=eta, generator=seeded(5)) for one in (ours, stock)
        ]
        torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample)
        torch.testing.assert_close(results[0].pred_original_sample, results[1].pred_original_sample)


def test_configuration_round_trip(tmp_path) -> None:
    made = scheduler(prediction_type="v_prediction")
    made.save_pretrained(tmp_path)
    loaded = CustomModelDDIMScheduler.from_pretrained(tmp_path)
    for key, value in made.config.items():
        assert key.startswith("_") or loaded.config[key] == value
    assert torch.equal(loaded.alphas_cumprod, made.alphas_cumprod)
    converted = DDIMScheduler.from_config(made.config)
    assert converted.config.beta_end == 0.012


@pytest.mark.parametrize("steps", [0, 501, 1000])
def test_too_many_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and 500.* got {steps}"):
        scheduler(steps)


def test_misuse_is_refused() -> None:
    zeros = torch.zeros(1, 4, 8, 8)
    with pytest.raises(RuntimeError, match="set_timesteps"):
        CustomModelDDIMScheduler().step(zeros, 999, zeros)
    with pytest.raises(ValueError, match=r"entry of the grid .* got 979"):
        scheduler().step(zeros, 979, zeros)
    with pytest.raises(ValueError, match="prediction_type must be"):
        scheduler(prediction_type="flow").step(zeros, 980, zeros)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
