"""The diffusion loss: what is drawn, what is predicted, what is dropped, what learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from i2am.training.latents import LatentScenes, encode
from i2am.training.objective import DenoiserStage, draw_kept, draw_timesteps, noise_errors
from i2am.training.recipe import Denoiser, Optimisation
from i2am.training.scenes import to_bytes
from i2am.training.start import initialise

PLAN = Optimisation(steps=4, batch=3)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _scenes(count: int = 5, *, region: bool = True) -> LatentScenes:
    draws = np.random.default_rng(0)
    arrays = {
        name: draws.standard_normal((count, 4, 16, 12)).astype(np.float16)
        for name in ("image", "agnostic", "pose")
    }
    arrays["garment"] = draws.integers(0, 256, (count, 3, 16, 12), dtype=np.uint8)
    arrays["mask"] = draws.integers(0, 256, (count, 16, 12), dtype=np.uint8)
    if region:
        arrays["garment_region"] = np.full((count, 32, 24), 255, dtype=np.uint8)
    return LatentScenes(arrays)


@pytest.fixture
def make(build):
    """Makes a stage; arguments replace numbers of its recipe."""

    def stage(prediction: str = "v_prediction", *, region: bool = True, **changes) -> DenoiserStage:
        pipeline = build()
        initialise(pipeline, 0)
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, prediction_type=prediction
        )
        scenes = _scenes(region=region)
        recipe = replace(Denoiser(optimisation=PLAN), **changes)
        return DenoiserStage(pipeline, recipe, scenes, scenes.read(range(4)), seed=0)

    return stage


def test_uniform_timesteps() -> None:
    drawn = draw_timesteps(100_000, 0.0, _generator())
    assert drawn.dtype == torch.int64
    assert (drawn.min(), drawn.max()) == (0, 999)
    # mean of 0..999, within five standard errors
    assert abs(float(drawn.float().mean()) - 499.5) < 5 * 289 / 100_000**0.5


def test_timesteps_that_prefer_noise() -> None:
    drawn = draw_timesteps(100_000, 1.0, _generator()).float()
    assert drawn.min() >= 299
    # E[1 - .7 u^2] = 1 - .7 / 3
    assert abs(float(drawn.mean()) / 1000 - (1 - 0.7 / 3)) < 0.005
    # half of each is the mean of both
    half = draw_timesteps(100_000, 0.5, _generator()).float()
    assert abs(float(half.mean()) / 1000 - (0.5 + 1 - 0.7 / 3) / 2) < 0.005


def test_dropout_per_sample() -> None:
    kept = draw_kept(100_000, 0.1, "sample", _generator())
    assert kept.dtype == torch.bool
    # five standard errors
    assert abs(1 - float(kept.float().mean()) - 0.1) < 5 * (0.09 / 100_000) ** 0.5
    assert draw_kept(50, 0.0, "sample", _generator()).all()
    assert not draw_kept(50, 1.0, "sample", _generator()).any()


def test_dropout_per_batch() -> None:
    batches = [draw_kept(4, 0.3, "batch", _generator(seed)) for seed in range(2000)]
    assert all(kept.shape == (4,) and len(set(kept.tolist())) == 1 for kept in batches)
    share = sum(not kept[0] for kept in batches) / 2000
    assert abs(share - 0.3) < 5 * (0.21 / 2000) ** 0.5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_restores_the_latents(make, prediction) -> None:
    stage = make(prediction)
    batch = stage.scenes.read(range(3))
    noise = torch.randn(3, 4, 16, 12, generator=_generator())
    timesteps = torch.tensor([10, 500, 900])
    kept = torch.ones(3, dtype=torch.bool)
    _, target = stage._predict(stage.networks, batch, noise, timesteps, kept)
    restored = stage.restore(batch["image"], noise, timesteps, target)
    torch.testing.assert_close(restored, batch["image"], atol=2e-4, rtol=0)


def test_the_mask_weighs(make) -> None:
    # weight and error are independent of each other here: the loss is the sum of the two parts
    losses = {
        (outside, inside): stage.loss(stage.networks, 0, 0, 0, 1)
        for outside, inside in [(1.0, 0.0), (0.0, 1.0), (0.25, 2.0)]
        if (stage := make(outside=outside, inside=inside))
    }
    plain, masked, both = (loss for loss, _ in losses.values())
    torch.testing.assert_close(both, 0.25 * plain + 2 * masked)
    assert torch.equal(plain, losses[1.0, 0.0][1]["error"])


def test_a_dropped_reference_is_not_seen(make) -> None:
    stage = make(dropout=1.0)
    stage.loss(stage.networks, 0, 0, 0, 1)[0].backward()
    encoder = stage.pipeline.image_encoder
    assert all(not x.grad.any() for x in encoder.parameters() if x.requires_grad)
    assert stage.pipeline.image_proj.uncond_vector.grad.any()
    stage = make(dropout=0.0)
    stage.loss(stage.networks, 0, 0, 0, 1)[0].backward()
    # in the graph of every step, which several processes need, but without effect
    assert not stage.pipeline.image_proj.uncond_vector.grad.any()
    assert stage.pipeline.image_encoder.embeddings.patch_embeddings.projection.weight.grad.any()


def test_a_step_is_a_function_of_its_place(make) -> None:
    losses = []
    for _ in range(2):
        stage = make()
        torch.rand(3)
        losses.append(stage.loss(stage.networks, 3, 0, 0, 1)[0].item())
    assert losses[0] == losses[1]
    stage = make()
    others = [stage.loss(stage.networks, *place, 2)[0] for place in [(3, 0, 0), (3, 0, 1)]]
    assert others[0].item() != others[1].item()


def test_noise_errors_tell_a_garment_that_is_used(make) -> None:
    stage = make()
    errors = noise_errors(stage)
    assert errors.keys() == {"x0_error", "x0_error_wrong"}
    assert all(0 < value < 10 for value in errors.values())
    # a model that ignores the garment errs the same with any
    with torch.no_grad():
        for values in stage.pipeline.image_proj.proj.parameters():
            values.zero_()
    errors = noise_errors(stage)
    assert errors["x0_error"] == errors["x0_error_wrong"]


def test_attention_total_variation_is_added(make) -> None:
    plain = make()
    error = plain.loss(plain.networks, 0, 0, 0, 1)[0]
    stage = make(attention_tv=0.5)
    loss, numbers = stage.loss(stage.networks, 0, 0, 0, 1)
    assert numbers["attention_tv"].item() > 0
    torch.testing.assert_close(loss, error + numbers["attention_tv"])
    stage.close()
    with pytest.raises(ValueError, match="attention_tv needs scenes with a garment_region"):
        make(attention_tv=0.5, region=False)


def test_an_unknown_prediction_is_refused(make) -> None:
    with pytest.raises(ValueError, match=r"prediction_type must be one of epsilon, .* got 'flow'"):
        make("flow")


def test_encoding_is_that_of_the_pipeline(build) -> None:
    pipeline = build()
    images = torch.rand(2, 3, 32, 24, generator=_generator())
    batch = {name: images for name in ("image", "agnostic", "pose")}
    batch |= {"garment": torch.rand(2, 3, 32, 24), "mask": torch.ones(2, 32, 24)}
    batch["mask"][:, :16] = 0
    encoded = encode(pipeline, batch)
    with torch.no_grad():
        latents = (pipeline.vae.encode(images * 2 - 1).latent_dist.mode() - 0.1) * 0.5
    assert torch.equal(encoded["image"], latents.half())
    assert encoded["garment"].shape == (2, 3, 16, 12)
    assert encoded["mask"][:, :8].eq(0).all()
    assert encoded["mask"][:, 8:].eq(1).all()
    torch.testing.assert_close(
        LatentScenes({"image": latents.half().numpy(), "mask": to_bytes(encoded["mask"])}).read(
            [1]
        ),
        {"image": latents[1:].half().float(), "mask": encoded["mask"][1:]},
    )
