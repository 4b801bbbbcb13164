"""The tiny pipelines and the oracle of the tests of the adapters, for situations that users met."""

import importlib.util
import sys
from pathlib import Path

_SHARED = Path(__file__).parent.parent / "adapters" / "conftest.py"
_spec = importlib.util.spec_from_file_location("tests_adapters_shared", _SHARED)
_shared = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _shared
_spec.loader.exec_module(_shared)

tiny, oracle = _shared.tiny, _shared.oracle
