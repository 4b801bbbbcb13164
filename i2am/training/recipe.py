"""Everything that decides what a training computes, as plain numbers with their units."""

import math
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Self

from i2am.files import parse_json, readable_json

PRECISIONS = ("no", "bf16", "fp16")
TRAINABLE = ("all", "paper", "lite")
DROPOUTS = ("sample", "batch")


@dataclass(frozen=True)
class Optimisation:
    """AdamW with a warm-up, an optional cosine decay, clipping and an average of the weights.

    Args:
        steps: Optimiser steps of the whole schedule.
        batch: Scenes per process and backward pass.
        accumulate: Backward passes per optimiser step.
        learning_rate: Peak learning rate.
        warmup: Steps of linear warm-up.
        final_rate: Learning rate at the end as a share of the peak, reached by a cosine; 1 keeps
            it constant.
        betas: AdamW's decay of the first and second moment.
        weight_decay: AdamW's decoupled weight decay.
        clip: Largest norm of the gradient; 0 does not clip.
        ema: Decay per step of the averaged weights at the beginning and at the end, None for no
            average.

    Raises:
        ValueError: A number is out of its range.
    """

    steps: int
    batch: int
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 150
    final_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: tuple[float, float] | None = (0.995, 0.999)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            _whole(name, getattr(self, name), least=1)
        _whole("warmup", self.warmup, least=0)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        _share("final_rate", self.final_rate)
        for name in ("weight_decay", "clip"):
            _weight(name, getattr(self, name))
        for name, pair in (("betas", self.betas), ("ema", self.ema)):
            if pair is None:
                continue
            # JSON has lists only
            object.__setattr__(self, name, tuple(pair))
            if len(pair) != 2 or not all(0 <= value < 1 for value in pair):
                raise ValueError(f"{name} must be two numbers of [0, 1), got {pair!r}")


@dataclass(frozen=True)
class Autoencoder:
    """Stage 1: the autoencoder of a model that is built from scratch.

    The loss is mean absolute + `squared` * mean squared error + `edges` * mean absolute error of
    the differences of neighbouring pixels, all on [-1, 1], + `kl` * the divergence of the
    posterior from a normal distribution per latent number, in nats.

    Args:
        optimisation: Its schedule.
        squared: Weight of the mean squared error.
        edges: Weight of the error of the gradients.
        kl: Weight of the divergence.
        precision: "no" for fp32, or "bf16".
    """

    optimisation: Optimisation
    squared: float = 2.0
    edges: float = 0.5
    kl: float = 1e-3
    precision: str = "bf16"

    def __post_init__(self) -> None:
        for name in ("squared", "edges", "kl"):
            _weight(name, getattr(self, name))
        _choice("precision", self.precision, ("no", "bf16"))


@dataclass(frozen=True)
class Denoiser:
    """Stage 2: the UNet, the projection and, where it is small, the reference encoder.

    Args:
        optimisation: Its schedule.
        noisy: Share of the timesteps drawn from ``999 * (1 - .7 u^2)``, which prefers noise; the
            others are uniform.
        outside: Weight of the loss outside the mask; inside it is `outside` + `inside`.
        inside: What the mask adds to the weight of the loss.
        dropout: Probability that the reference is replaced by the learned unconditional context.
        dropout_of: "sample" decides per sample, "batch" for the whole batch at once.
        trainable: Which parameters learn: "all", or the sets "paper" and "lite" of the paper's
            code.
        attention_tv: Weight of the total variation of attention centres; 0 leaves it out.
        precision: Mixed precision: "no", "bf16" or "fp16".
    """

    optimisation: Optimisation
    noisy: float = 0.0
    outside: float = 1.0
    inside: float = 0.0
    dropout: float = 0.1
    dropout_of: str = "sample"
    trainable: str = "all"
    attention_tv: float = 0.0
    precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("noisy", "dropout"):
            _share(name, getattr(self, name))
        for name in ("outside", "inside", "attention_tv"):
            _weight(name, getattr(self, name))
        _choice("dropout_of", self.dropout_of, DROPOUTS)
        _choice("trainable", self.trainable, TRAINABLE)
        _choice("precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class Recipe:
    """One training from beginning to end.

    Args:
        model: "pocket", built from scratch, or a folder of a custom model in diffusers layout.
        data: "paper-doll", or a folder in VITON-HD layout.
        denoiser: Stage 2.
        autoencoder: Stage 1, None for a model that comes with its autoencoder.
        scenes: Training scenes to use; None takes all of a folder.
        seed: Seed of the weights, the order of the data and all noise.

    Raises:
        ValueError: A number is out of its range, or "paper-doll" without a number of scenes.
    """

    model: str
    data: str
    denoiser: Denoiser
    autoencoder: Autoencoder | None = None
    scenes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scenes is not None:
            _whole("scenes", self.scenes, least=1)
        elif self.data == "paper-doll":
            raise ValueError("scenes must be given for paper-doll, which has no end, got None")
        _whole("seed", self.seed, least=0)

    def as_json(self) -> str:
        """The recipe as indented JSON, the same text for the same recipe."""
        return readable_json(asdict(self)).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads `as_json` again.

        Raises:
            ValueError: It is no such text, or a number in it is out of its range.
        """
        try:
            content = parse_json(text, "the recipe")
            stages = {"denoiser": Denoiser, "autoencoder": Autoencoder}
            for name, stage in stages.items():
                if content.get(name) is not None:
                    schedule = Optimisation(**content[name].pop("optimisation"))
                    content[name] = stage(optimisation=schedule, **content[name])
            return cls(**content)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is no recipe of a training: {error}") from error


def differences(first: Any, second: Any, prefix: str = "") -> list[str]:
    """Names of the numbers in which two recipes differ, as "denoiser.dropout"."""
    if is_dataclass(first) and type(first) is type(second):
        found = []
        for each in fields(first):
            pair = getattr(first, each.name), getattr(second, each.name)
            found += differences(*pair, f"{prefix}.{each.name}" if prefix else each.name)
        return found
    return [] if first == second else [prefix]


def with_changes(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some numbers replaced, those that are not None.

    Args:
        recipe: Where to begin.
        **changes: Fields of `Recipe`, of its denoiser or of the denoiser's optimisation, by name.
    """
    wanted = {name: value for name, value in changes.items() if value is not None}
    names = {each.name for each in fields(Optimisation)}
    schedule = {name: wanted.pop(name) for name in list(wanted) if name in names}
    names = {each.name for each in fields(Denoiser)}
    stage = {name: wanted.pop(name) for name in list(wanted) if name in names}
    optimisation = replace(recipe.denoiser.optimisation, **schedule)
    denoiser = replace(recipe.denoiser, optimisation=optimisation, **stage)
    return replace(recipe, denoiser=denoiser, **wanted)


def _whole(name: str, value: Any, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")


def _weight(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be 0 or more and finite, got {value}")


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


POCKET_RECIPE = Recipe(
    model="pocket",
    data="paper-doll",
    scenes=12288,
    autoencoder=Autoencoder(
        optimisation=Optimisation(
            steps=3600,
            batch=8,
            learning_rate=1.5e-3,
            warmup=50,
            final_rate=0.02,
            weight_decay=0.0,
            ema=(0.99, 0.998),
        ),
    ),
    denoiser=Denoiser(
        optimisation=Optimisation(steps=4000, batch=16),
        noisy=0.5,
        outside=0.25,
        inside=1.0,
    ),
)

# the settings of the published training; "pocket" and "paper-doll" are replaced by the folders
PAPER_RECIPE = Recipe(
    model="pocket",
    data="paper-doll",
    scenes=11_647,
    denoiser=Denoiser(
        optimisation=Optimisation(
            steps=43_680,
            batch=16,
            learning_rate=1e-5,
            warmup=0,
            final_rate=1.0,
            betas=(0.9, 0.999),
            clip=0.0,
            ema=None,
        ),
        dropout=0.2,
        dropout_of="batch",
        trainable="paper",
        precision="fp16",
    ),
)
