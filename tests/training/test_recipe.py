"""Recipes: every number checked, the same after a round trip, differences named."""

from dataclasses import replace

import pytest

from i2am.training.recipe import (
    PAPER_RECIPE,
    POCKET_RECIPE,
    Autoencoder,
    Denoiser,
    Optimisation,
    Recipe,
    differences,
    with_changes,
)

PLAN = Optimisation(steps=10, batch=2)


@pytest.mark.parametrize("recipe", [POCKET_RECIPE, PAPER_RECIPE], ids=["pocket", "paper"])
def test_json_round_trip(recipe) -> None:
    again = Recipe.from_json(recipe.as_json())
    assert again == recipe
    assert not differences(again, recipe)
    assert again.as_json() == recipe.as_json()


def test_the_papers_numbers() -> None:
    stage = PAPER_RECIPE.denoiser
    plan = stage.optimisation
    assert (plan.steps, plan.batch * plan.accumulate) == (43_680, 16)
    assert (plan.learning_rate, plan.final_rate, plan.warmup) == (1e-5, 1, 0)
    assert (plan.betas, plan.weight_decay) == ((0.9, 0.999), 0.01)
    assert (stage.dropout, stage.dropout_of, stage.trainable) == (0.2, "batch", "paper")
    assert (stage.noisy, stage.outside, stage.inside, stage.precision) == (0, 1, 0, "fp16")
    assert plan.ema is None
    assert PAPER_RECIPE.autoencoder is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(PLAN, steps=0), "steps must be a whole number of 1 or more, got 0"),
        (lambda: replace(PLAN, batch=True), "batch must be a whole number .* got True"),
        (lambda: replace(PLAN, accumulate=1.5), "accumulate must be a whole number .* got 1.5"),
        (lambda: replace(PLAN, warmup=-1), "warmup must be a whole number of 0 or more, got -1"),
        (lambda: replace(PLAN, learning_rate=0), "learning_rate must be above 0 and finite, got 0"),
        (lambda: replace(PLAN, learning_rate=float("inf")), "above 0 and finite, got inf"),
        (lambda: Denoiser(PLAN, attention_tv=float("inf")), "0 or more and finite, got inf"),
        (lambda: Denoiser(PLAN, inside=float("nan")), "inside must be 0 or more and finite"),
        (lambda: replace(PLAN, learning_rate=float("nan")), "learning_rate must be above 0"),
        (lambda: replace(PLAN, final_rate=2), r"final_rate must be in \[0, 1\], got 2"),
        (lambda: replace(PLAN, clip=-1), "clip must be 0 or more and finite, got -1"),
        (lambda: replace(PLAN, betas=(0.9,)), "betas must be two numbers"),
        (lambda: replace(PLAN, ema=(0.9, 1.0)), r"ema must be two numbers of \[0, 1\)"),
        (lambda: Denoiser(PLAN, dropout=1.5), r"dropout must be in \[0, 1\], got 1.5"),
        (lambda: Denoiser(PLAN, dropout_of="row"), "dropout_of must be one of sample, batch"),
        (lambda: Denoiser(PLAN, trainable="some"), "trainable must be one of all, paper, lite"),
        (lambda: Denoiser(PLAN, precision="fp8"), "precision must be one of no, bf16, fp16"),
        (
            lambda: Denoiser(PLAN, attention_tv=-1),
            "attention_tv must be 0 or more and finite, got -1",
        ),
        (lambda: Autoencoder(PLAN, kl=-1), "kl must be 0 or more and finite, got -1"),
        (lambda: Autoencoder(PLAN, precision="fp16"), "precision must be one of no, bf16, got"),
        (lambda: replace(POCKET_RECIPE, scenes=None), "scenes must be given for paper-doll"),
        (lambda: replace(POCKET_RECIPE, scenes=0), "scenes must be a whole number of 1 or more"),
        (lambda: replace(POCKET_RECIPE, seed=-1), "seed must be a whole number of 0 or more"),
        (lambda: Recipe.from_json("{"), "Expecting property name"),
        (lambda: Recipe.from_json("[]"), "this is no recipe of a training"),
        (lambda: Recipe.from_json('{"model": "pocket"}'), "this is no recipe of a training"),
    ],
)
def test_wrong_numbers(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_differences_are_named() -> None:
    other = with_changes(POCKET_RECIPE, seed=3, dropout=0.2, learning_rate=1e-4)
    names = ["denoiser.optimisation.learning_rate", "denoiser.dropout", "seed"]
    assert differences(POCKET_RECIPE, other) == names
    assert differences(POCKET_RECIPE, replace(POCKET_RECIPE, autoencoder=None)) == ["autoencoder"]


def test_changes_of_none_change_nothing() -> None:
    assert with_changes(POCKET_RECIPE, seed=None, batch=None, dropout=None) == POCKET_RECIPE
    with pytest.raises(TypeError, match="colour"):
        with_changes(POCKET_RECIPE, colour=1)
