"""One door to all pipelines: a built-in name, or a folder in diffusers layout."""

import errno
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from i2am.models.base import ReferencePipeline

# name -> module and function that builds it
BUILT_IN = {"pocket": ("i2am.models.pocket", "pocket_pipeline")}
# _class_name in model_index.json -> module of the class
PIPELINES = {
    "CustomPipeline": "i2am.models.custom",
    "DCIVTONPipeline": "i2am.models.dci_vton",
    "PaintByExamplePipeline": "i2am.models.paint_by_example",
    "StableVITONPipeline": "i2am.models.stableviton",
}


def load_pipeline(
    name_or_folder: str | os.PathLike[str],
    *,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> "ReferencePipeline":
    """A pipeline, ready to be called with ``image=, mask_image=, reference_image=``.

    Args:
        name_or_folder: A built-in name, or a folder that holds a model_index.json. A folder whose
            name is a built-in one is given as a path, "./pocket".
        torch_dtype: Floating dtype of all weights; None keeps float32.
        variant: Middle part of a folder's weight files, for example "fp16".

    Raises:
        FileNotFoundError: The folder, or a file in it, is missing.
        ValueError: Neither a known name nor a folder, a pipeline class that is not known, a
            variant of a built-in model, or weights that are damaged or do not fit.
    """
    name = os.fspath(name_or_folder)
    if name in BUILT_IN:
        if variant is not None:
            raise ValueError(f"variant must be None for the built-in model {name}, got {variant!r}")
        pipeline = _lookup(*BUILT_IN[name])()
        return pipeline if torch_dtype is None else pipeline.to(torch_dtype)
    if not Path(name).exists():
        *names, last = PIPELINES
        raise ValueError(
            f"model must be a built-in name ({', '.join(BUILT_IN)}) or a folder of a "
            f"{', '.join(names)} or {last}, got {name!r}"
        )

    from i2am.models.folders import read_index

    class_name = read_index(name)["_class_name"]
    if class_name not in PIPELINES:
        raise ValueError(f"{name} holds a {class_name}; known pipelines are {', '.join(PIPELINES)}")
    pipeline_class = _lookup(PIPELINES[class_name], class_name)
    return pipeline_class.from_pretrained(name, torch_dtype=torch_dtype, variant=variant)


class ModelRejected(ValueError):
    """A model cannot be loaded, or not for what it is wanted; the message is one sentence."""


def load_offline(
    name_or_folder: str | os.PathLike[str], *, dtype: str = "float32", messages: bool = False
) -> "ReferencePipeline":
    """`load_pipeline` for programs: says nothing by itself, fails in one way.

    Args:
        name_or_folder: As for `load_pipeline`.
        dtype: Name of the floating dtype of all weights.
        messages: Whether diffusers and transformers may write messages of their own.

    Raises:
        ModelRejected: It cannot be loaded, for whatever reason that lies in the model.
        OSError: The disk failed.
        MemoryError: There is too little memory.
    """
    import diffusers
    import transformers

    if not messages:
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    weights = None if dtype == "float32" else getattr(torch, dtype)
    try:
        return load_pipeline(name_or_folder, torch_dtype=weights)
    except Exception as error:
        # a folder of files may fail in any way; only the disk and the memory are not its fault
        disk = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)
        if disk or isinstance(error, MemoryError):
            raise
        raise ModelRejected(f"model {name_or_folder} cannot be loaded: {error}") from error


def _lookup(module: str, attribute: str) -> Any:
    return getattr(import_module(module), attribute)
