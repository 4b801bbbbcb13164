"""Which classes have a layout, and which have none."""

from importlib import import_module
from types import SimpleNamespace

import diffusers
import pytest
from torch import nn

from i2am.layouts import TokenLayout, register_layout, registry
from i2am.layouts.registry import known_layout

OURS = {"cross_attention", "ip_adapter", "reference_unet", "spatial", "text", "wan"}
# of published code that is not in diffusers
AUTHORS = {
    "CatVTONPipeline",
    "CatVTONPix2PixPipeline",
    "OotdPipeline",
    "UNetVton2DConditionModel",
}


@pytest.mark.parametrize("table", ["_PIPELINES", "_DENOISERS"])
def test_every_entry_is_a_class_and_a_function(table):
    entries = {
        name: entry.partition(":")
        for name, entry in getattr(registry, table).items()
        if entry.partition(":")[0] in OURS
    }
    assert entries
    for name, (module, _, function) in entries.items():
        assert callable(getattr(import_module(f"i2am.layouts.{module}"), function))
        assert (name in AUTHORS) != hasattr(diffusers, name), name


@pytest.mark.parametrize(
    "name",
    [
        "AnimateDiffPipeline",  # rows are frames, and motion modules have layers of these names
        "StableVideoDiffusionPipeline",
        "TextToVideoZeroPipeline",
        "MarigoldDepthPipeline",
        "StableDiffusionImageVariationPipeline",
        "StableUnCLIPImg2ImgPipeline",
        "KandinskyV22Pipeline",
        "UnCLIPPipeline",
        "WanAnimatePipeline",
    ],
)
def test_not_vouched_for(name):
    pipe, denoiser = type(name, (), {})(), nn.Linear(1, 1)
    assert known_layout(pipe, denoiser) is None


def test_registered_layout_goes_first(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    mine = TokenLayout.same_grid()
    register_layout("StableDiffusionPipeline", lambda pipe, denoiser: mine)
    pipe = type("StableDiffusionPipeline", (SimpleNamespace,), {})()
    assert known_layout(pipe, nn.Linear(1, 1)) is mine
