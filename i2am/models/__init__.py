"""Reference-guided pipelines on diffusers and transformers building blocks.

All are called with ``image=, mask_image=, reference_image=`` and know their token layout:

    pipe = i2am.models.load_pipeline("pocket")
    with i2am.record(pipe) as recorder:
        result = pipe(image=person, mask_image=mask, reference_image=garment)

Every name is imported when it is first used: diffusers and transformers are slow to import.
"""

from typing import TYPE_CHECKING

from i2am.lazy import lazy

# for type checkers, who cannot follow __getattr__
# ruff: noqa: F401
if TYPE_CHECKING:
    from i2am.models.configuration import FULL_SIZE, CustomConfiguration
    from i2am.models.custom import CustomPipeline
    from i2am.models.dci_vton import DCIVTONPipeline
    from i2am.models.loading import BUILT_IN, load_pipeline
    from i2am.models.paint_by_example import PaintByExamplePipeline
    from i2am.models.paint_by_example_encoder import PaintByExampleImageEncoder
    from i2am.models.pocket import POCKET, pocket_pipeline, pocket_weights, save_pocket_weights
    from i2am.models.projection import ReferenceProjection
    from i2am.models.schedulers import CustomModelDDIMScheduler
    from i2am.models.stableviton import StableVITONPipeline
    from i2am.models.stableviton_unet import StableVITONUNet

_MODULES = {
    "BUILT_IN": "loading",
    "FULL_SIZE": "configuration",
    "POCKET": "pocket",
    "CustomConfiguration": "configuration",
    "CustomModelDDIMScheduler": "schedulers",
    "CustomPipeline": "custom",
    "DCIVTONPipeline": "dci_vton",
    "PaintByExampleImageEncoder": "paint_by_example_encoder",
    "PaintByExamplePipeline": "paint_by_example",
    "ReferenceProjection": "projection",
    "StableVITONPipeline": "stableviton",
    "StableVITONUNet": "stableviton_unet",
    "load_pipeline": "loading",
    "pocket_pipeline": "pocket",
    "pocket_weights": "pocket",
    "save_pocket_weights": "pocket",
}

__all__ = sorted(_MODULES)

__getattr__, __dir__ = lazy(__name__, _MODULES)
