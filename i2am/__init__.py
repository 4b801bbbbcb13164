"""Image-to-image attribution maps of diffusion pipelines.

    with i2am.record(pipe) as recorder:
        image = pipe(...).images[0]
    maps = recorder.maps()

Every name and package below is imported when it is first used, so ``import i2am`` costs nothing.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from i2am.lazy import lazy

if TYPE_CHECKING:
    from i2am import (  # noqa: F401 - for type checkers, who cannot follow __getattr__
        adapters,
        attribution,
        data,
        evaluation,
        files,
        kernels,
        layouts,
        metrics,
        models,
        plots,
        training,
        viewer,
    )
    from i2am.adapters import Recorder, record, release
    from i2am.attribution import AttributionMaps, Direction, Patch, load_maps
    from i2am.layouts import TokenLayout
    from i2am.metrics import IMACS, imacs

__version__ = "0.1.0"

__all__ = [
    "IMACS",
    "AttributionMaps",
    "Direction",
    "Patch",
    "Recorder",
    "TokenLayout",
    "__version__",
    "imacs",
    "load_maps",
    "record",
    "release",
]

_NAMES = {
    "IMACS": "metrics",
    "AttributionMaps": "attribution",
    "Direction": "attribution",
    "Patch": "attribution",
    "Recorder": "adapters",
    "TokenLayout": "layouts",
    "imacs": "metrics",
    "load_maps": "attribution",
    "record": "adapters",
    "release": "adapters",
}

_ROOMS = (
    "adapters",
    "attribution",
    "data",
    "evaluation",
    "files",
    "kernels",
    "layouts",
    "metrics",
    "models",
    "plots",
    "training",
    "viewer",
)

# a checkout that was never installed: kernels/ lies beside i2am/, not inside it
_checkout = Path(__file__).resolve().parent.parent
if find_spec(f"{__name__}.kernels") is None and (_checkout / "kernels" / "api.py").is_file():
    __path__.append(str(_checkout))
del _checkout

__getattr__, __dir__ = lazy(__name__, _NAMES, _ROOMS)
