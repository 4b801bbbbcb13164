"""Attention statistics without the attention matrix. Import this package as ``i2am.kernels``."""

if __name__ == "kernels":
    # A source checkout on sys.path hides Hugging Face's package of this name, which diffusers and
    # transformers probe for: hand the name back to its owner where that package is installed.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _checkout = Path(__file__).resolve().parent.parent
    _others = [entry for entry in sys.path if Path(entry or ".").resolve() != _checkout]
    _spec = PathFinder.find_spec("kernels", _others)
    if _spec is not None and _spec.loader is not None:
        _owner = module_from_spec(_spec)
        sys.modules["kernels"] = _owner
        _spec.loader.exec_module(_owner)
else:
    from i2am.kernels.api import accumulate, attention, attention_statistics
    from i2am.kernels.pooling import Pooling
    from i2am.kernels.probes import Over, Probe
    from i2am.kernels.types import AttentionStatistics, Impl

    __all__ = [
        "AttentionStatistics",
        "Impl",
        "Over",
        "Pooling",
        "Probe",
        "accumulate",
        "attention",
        "attention_statistics",
    ]
