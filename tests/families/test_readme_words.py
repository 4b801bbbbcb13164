"""README's lines on words, as they stand."""

import re
from pathlib import Path

import family_words
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
(LINES,) = (
    block
    for block in re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    if 'words=["shirt", "logo"]' in block
)


class Small(FluxKontextPipeline):
    def __call__(self, **given):
        size = {"height": 32, "width": 32, "max_area": 32 * 32, "_auto_resize": False}
        return super().__call__(num_inference_steps=2, **size, **given)


def test_lines_on_words():
    pipe = family_words.flux().pipe
    pipe.__class__ = Small
    names = {"pipe": pipe, "reference": Image.new("RGB", (40, 24), "red")}
    exec("import i2am\n" + LINES, names)
    maps = names["maps"]
    assert maps.sources == ("reference", "shirt", "logo")
    shares = [maps.reference_to_generated(source=name) for name in maps.sources]
    assert torch.equal(maps.reference_to_generated(), shares[0])
    assert torch.equal(maps.words["shirt"], shares[1])
    assert 0 < sum(shares).min() <= sum(shares).max() < 1
    assert maps.generated_to_reference().shape[1:] == maps.layer_sums[0].site.reference_grid
