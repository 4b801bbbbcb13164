"""One denoising step of a whole UNet, recorded and not: all cross-attentions, both directions.

pytest benchmarks/test_unet_step.py --unet sd15 --batch 1
"""

from typing import Any

import pytest
import unet_steps
from harness import Settings


@pytest.mark.parametrize("guidance", [False, True], ids=["plain", "cfg"])
@pytest.mark.parametrize("way", unet_steps.WAYS)
def test_step(
    benchmark: Any, settings: Settings, size: str, batch: int, way: str, guidance: bool
) -> None:
    unet_steps.measure(benchmark, settings, size, batch, way, guidance)
