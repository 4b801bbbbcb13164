"""Latents of any shape: every layer finds its own grid, or is left out aloud."""

import warnings

import pytest
import torch
from torch import nn

import i2am
from i2am.layouts import TokenLayout

PATCHES = TokenLayout.cross_attention((4, 3))
SIZES = [(33, 25), (37, 50), (13, 7), (9, 65), (5, 11), (16, 16), (1, 8), (2, 1)]


def run_once(unet, size, reference, layout=PATCHES):
    """Records one denoiser call; also the size that every attention layer really saw."""
    seen = {}

    def note(name):
        def hook(module, arguments):
            seen[f"{name}.transformer_blocks.0.attn2"] = tuple(arguments[0].shape[-2:])

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in unet.named_modules()
        if type(module).__name__ == "Transformer2DModel"
    ]
    with i2am.record(unet, layout=layout, num_inference_steps=1, time_groups=1) as recorder:
        torch.manual_seed(0)
        with torch.no_grad():
            unet(torch.randn(1, 4, *size), 10, reference)
    for hook in hooks:
        hook.remove()
    return recorder, seen


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_four_levels(tiny, size):
    recorder, seen = run_once(tiny.unet(4), size, tiny.reference())
    maps = recorder.maps()
    grids = {layer.site.layer: layer.site.generated_grid for layer in maps.layer_sums}
    assert len(grids) == 10
    assert grids == seen
    # maps are read on the finest of these grids, or on any
    assert maps.reference_to_generated().shape[-2:] == size
    assert maps.generated_to_reference(size=(7, 5)).shape == (1, 7, 5)


@pytest.mark.parametrize("size", [(13, 22), (9, 14), (7, 30)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_levels_that_round_down(tiny, size):
    unet = tiny.unet(3, downsample_padding=0)
    recorder, seen = run_once(unet, size, tiny.reference())
    grids = {layer.site.layer: layer.site.generated_grid for layer in recorder.maps().layer_sums}
    assert len(grids) == 7
    assert grids == seen
    assert ((size[0] + 1) // 2, (size[1] + 1) // 2) not in grids.values()


class HalfTheTokens(nn.Module):
    """What token merging does to a layer: fewer queries than its grid has cells."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, states, *args, **kwargs):
        output = self.attention(states[:, ::5], *args, **kwargs)
        return output.repeat_interleave(5, dim=1)[:, : states.shape[1]]


def test_layer_without_a_fitting_grid_is_left_out_aloud(tiny):
    unet = tiny.unet()
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2 = HalfTheTokens(block.attn2)
    layout = TokenLayout.cross_attention((4, 3), layers=r"attn2(\.attention)?$")
    recorder, _ = run_once(unet, (16, 10), tiny.reference(), layout)
    with pytest.warns(UserWarning, match="1 of 4 layers made no attention call") as warned:
        maps = recorder.maps()
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.attention" in str(warned[0].message)
    assert len(maps.layers) == 3
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per run is enough
        assert recorder.maps().layers == maps.layers
