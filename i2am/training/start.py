"""The pipeline that a training begins with."""

import math

import torch
from torch import Tensor, nn

from i2am.models.custom import CustomPipeline
from i2am.training.recipe import Recipe


def starting_pipeline(recipe: Recipe) -> CustomPipeline:
    """The untrained pocket model, or the custom model of a folder.

    Raises:
        FileNotFoundError: The folder is incomplete.
        ValueError: It holds no custom model, or one without an autoencoder is asked for.
    """
    if recipe.autoencoder is not None and recipe.model != "pocket":
        raise ValueError(
            f"autoencoder must be None for a model that comes with one, such as {recipe.model}"
        )
    if recipe.model == "pocket" and recipe.autoencoder is not None:
        from i2am.models.pocket import POCKET

        pipeline = POCKET.build(recipe.seed)
        initialise(pipeline, recipe.seed)
        return pipeline
    from i2am.models.loading import load_pipeline

    loaded = load_pipeline(recipe.model)
    if not isinstance(loaded, CustomPipeline):
        raise ValueError(f"model must be a custom model, {recipe.model} is a {type(loaded)}")
    return loaded


@torch.no_grad()
def initialise(pipeline: CustomPipeline, seed: int) -> None:
    """Better beginnings than the default for a model that is trained from nothing.

    - Position embeddings of the reference encoder: sines and cosines of row and column, so that
      places are comparable from the first step. That is what correspondence is learned from.
    - Its patch projection: as torch would, since transformers' 0.02 leaves small patches too faint
      beside the positions.
    - Variance of the autoencoder's posterior: small, so that it restores from the first step.
    """
    embeddings = pipeline.image_encoder.embeddings
    table = embeddings.position_embeddings
    side = math.isqrt(table.shape[1] - 1)
    table[0, 1:] = 0.3 * position_table(side, table.shape[2]).to(table)
    projection = embeddings.patch_embeddings.projection
    bound = 1 / math.sqrt(projection.weight[0].numel())
    draws = torch.Generator().manual_seed(seed)
    projection.weight.copy_(nn.init.uniform_(projection.weight.cpu(), -bound, bound, draws))
    convolution = pipeline.vae.quant_conv
    if convolution is not None:
        convolution.bias[pipeline.vae.config.latent_channels :] -= 6


def position_table(side: int, width: int) -> Tensor:
    """Sines and cosines of the places of a square grid, ``[side * side, width]``.

    A quarter of the channels each: sine and cosine of the row, sine and cosine of the column, with
    wavelengths from twice the side down to two cells.
    """
    count = width // 4
    waves = math.pi / side * (side ** torch.linspace(0, 1, count))
    places = torch.arange(side) + 0.5
    angles = places[:, None] * waves
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = one[:, None].expand(side, side, -1)
    columns = one[None].expand(side, side, -1)
    table = torch.zeros(side, side, width)
    table[..., : 4 * count] = torch.cat([rows, columns], dim=-1)
    return table.flatten(0, 1)
