"""One attention call: as it is, recorded, and its maps formed in full.

pytest benchmarks/test_operator.py --shapes 512x384
"""

from typing import Any

import operators
import pytest
from harness import Settings
from shapes import AttentionShape


@pytest.mark.parametrize("way", operators.WAYS)
def test_call(benchmark: Any, settings: Settings, shape: AttentionShape, way: str) -> None:
    operators.measure(benchmark, settings, shape, way)
