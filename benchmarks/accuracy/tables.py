"""The result as Markdown."""

import re
from typing import Any

from accuracy.places import PERCENT
from accuracy.reading import ALL

SCORES = {
    "imacs_r": "IMACS_r",
    "g2r_share_on_garment": "G2R on the garment",
    "imacs_g": "IMACS_g, uniform votes",
    "imacs_g_share": "IMACS_g, share of attention",
    "imacs_g_mask_votes": "IMACS_g, garment votes",
    "r2g_share_uniform_votes": "R2G in the mask, uniform votes",
    "r2g_share_mask_votes": "R2G in the mask, garment votes",
}
AREA_OF = {
    "g2r_share_on_garment": "garment",
    "r2g_share_uniform_votes": "mask",
    "r2g_share_mask_votes": "mask",
}


def tables(result: dict[str, Any]) -> str:
    """Everything that a reader asks first; the file has the rest."""
    models = result["models"]
    parts = [_accuracy(result), _scores(models, result["areas"]), _pictures(models), _paint(models)]
    return "\n\n".join("\n".join(part) for part in parts)


def short(layer: str) -> str:
    """``up_blocks.1.attentions.0.transformer_blocks.0.attn2`` is up_blocks.1.0 in a table."""
    return re.sub(r"\.attentions\.(\d+)\.transformer_blocks\.\d+\.attn2", r".\1", layer)


def _accuracy(result: dict[str, Any]) -> list[str]:
    scenes = result["settings"]["scenes"]
    lines = [_head("specific-reference map", "peak @5", "@10", "centroid @5", "@10")]
    for name, model in result["models"].items():
        best = f"layer {model['best_layer']}"
        for view, of in model["accuracy"].items():
            if view.startswith("layer ") and " head " in view:
                continue
            title = short(view) if view != ALL else "all layers"
            title = f"{name}, {title}{' (best)' if view == best else ''}"
            figures = [of[how][percent] for how in ("peak", "centroid") for percent in PERCENT]
            lines.append(_row(title, *figures))
    for name, of in result["baselines"].items():
        lines.append(_row(f"guess: {name}", *(of[percent] for percent in PERCENT), "", ""))
    cells = next(iter(result["models"].values()))["query_cells"]
    return [f"PCK on {scenes} scenes, {cells} cells of the shirt:", "", *lines]


def _scores(models: dict[str, Any], areas: dict[str, float]) -> list[str]:
    lines = [_head("all layers / best layer", *models)]
    for score, title in SCORES.items():
        # results of earlier versions lack the younger ones
        if any(score not in model["scores"][ALL] for model in models.values()):
            continue
        figures = []
        for model in models.values():
            both = [model["scores"][layer][score] for layer in (ALL, model["best_layer"])]
            shown = " / ".join(f"{figure:.3f}" for figure in both)
            if score in AREA_OF:
                times = " / ".join(f"{figure / areas[AREA_OF[score]]:.2f}" for figure in both)
                shown += f" ({times} x its area)"
            figures.append(shown)
        lines.append(_row(title, *figures))
    lines += [
        "",
        f"The mask covers {areas['mask']:.3f} of the image, "
        f"the garment {areas['garment']:.3f} of its own.",
    ]
    return lines


def _pictures(models: dict[str, Any]) -> list[str]:
    lines = [_head("on the shirt", *(f"{name}: L1 / SSIM" for name in models))]
    for picture in next(iter(models.values()))["pictures"]:
        scores = [model["pictures"][picture] for model in models.values()]
        lines.append(_row(picture, *(f"{of['l1']:.3f} / {of['ssim']:.3f}" for of in scores)))
    return lines


def _paint(models: dict[str, Any]) -> list[str]:
    lines = [
        _head("spot at", "change at the patch", "on the shirt", "rank on the shirt", "largest near")
    ]
    for name, model in models.items():
        for place in ("peak", "true", "random"):
            lines.append(_row(f"{name}, {place} place", *model["paint"][place].values()))
    ratios = [
        f"{name} {model['paint']['ratio_peak_to_random']:.1f}" for name, model in models.items()
    ]
    return [*lines, "", f"Change at the patch, peak to random place: {', '.join(ratios)}."]


def _head(*titles: str) -> str:
    return f"| {' | '.join(titles)} |\n| {' | '.join('---' for _ in titles)} |"


def _row(title: str, *figures: float | str) -> str:
    cells = [figure if isinstance(figure, str) else f"{figure:.3f}" for figure in figures]
    return f"| {' | '.join([title, *cells])} |"
