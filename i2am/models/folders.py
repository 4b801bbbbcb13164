"""Pipelines from folders in diffusers layout: offline, strict, no module imported on their word."""

import os
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin

from i2am.files import read_json
from i2am.models import schedulers
from i2am.models.base import ReferencePipeline
from i2am.models.weights import check_keys, in_one_sentence, weight_files

Pipeline = TypeVar("Pipeline", bound=ReferencePipeline)
INDEX = "model_index.json"


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The folder's model_index.json.

    Raises:
        FileNotFoundError: There is no such folder, or no index in it.
        ValueError: The index is not a JSON object that names a pipeline class.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; pipelines are loaded from local folders")
    index = _read_json(path / INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{path / INDEX} does not name a pipeline: it has no _class_name")
    return index


def load_folder(
    cls: type[Pipeline],
    folder: str | os.PathLike[str],
    *,
    torch_dtype: torch.dtype | None,
    variant: str | None,
    replacements: Mapping[str, Any],
) -> Pipeline:
    """Builds a pipeline from a folder; see `ReferencePipeline.from_pretrained`."""
    path = Path(folder)
    index = read_index(path)
    options = [name for name in signature(cls).parameters if name not in cls.component_classes]
    unknown = set(replacements) - set(cls.component_classes) - set(options)
    if unknown:
        raise TypeError(
            f"{cls.__name__}.from_pretrained takes torch_dtype, variant, "
            f"{', '.join([*cls.component_classes, *options])}, got {', '.join(sorted(unknown))}"
        )
    if index["_class_name"] != cls.__name__:
        raise ValueError(f"{path} holds a {index['_class_name']}, not a {cls.__name__}")

    settings: dict[str, Any] = {name: index[name] for name in options if name in index}
    component_class: Any
    for name, component_class in cls.component_classes.items():
        if name in replacements:
            continue
        declared = index.get(name)
        if not (isinstance(declared, list) and len(declared) == 2 and isinstance(declared[1], str)):
            raise ValueError(f"{path / INDEX} does not declare the component {name}")
        if component_class is SchedulerMixin:
            settings[name] = _load_scheduler(path / name, declared[1])
            continue
        choices = component_class if isinstance(component_class, tuple) else (component_class,)
        chosen = [choice for choice in choices if choice.__name__ == declared[1]]
        if not chosen:
            known = " or a ".join(choice.__name__ for choice in choices)
            raise ValueError(
                f"{name} of a {cls.__name__} must be a {known}, "
                f"{path / INDEX} declares a {declared[1]}"
            )
        settings[name] = _load_model(chosen[0], path / name, torch_dtype, variant)
    with in_one_sentence(f"{path} cannot be loaded as {cls.__name__}"):
        pipeline = cls(**{**settings, **replacements})
    pipeline.register_to_config(_name_or_path=str(path))
    return pipeline


def _load_model(
    model_class: Any, folder: Path, dtype: torch.dtype | None, variant: str | None
) -> torch.nn.Module:
    _read_json(folder / "config.json")
    files = weight_files(folder, variant)
    if "from_pretrained" in vars(model_class):  # one of ours, strict by itself
        return model_class.from_pretrained(folder, dtype=dtype, variant=variant)
    dtype_name = "torch_dtype" if issubclass(model_class, ModelMixin) else "dtype"
    what = (
        f"{folder / 'config.json'} and {files[0].name} cannot be loaded as {model_class.__name__}"
    )
    with in_one_sentence(what):
        model, report = model_class.from_pretrained(
            folder,
            variant=variant,
            local_files_only=True,
            use_safetensors=files[0].suffix == ".safetensors",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **{dtype_name: dtype or torch.float32},
        )
    check_keys(
        f"{model_class.__name__} in {folder}",
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        misshapen=[
            f"{key} ({list(found)} for {list(wanted)})"
            for key, found, wanted in report["mismatched_keys"]
        ],
    )
    return model.eval()


def _load_scheduler(folder: Path, class_name: str) -> SchedulerMixin:
    _read_json(folder / "scheduler_config.json")
    found = getattr(schedulers, class_name, None) or getattr(diffusers, class_name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"{folder.parent / INDEX} declares an unknown scheduler, {class_name}")
    scheduler_class: Any = found
    with in_one_sentence(f"{folder / 'scheduler_config.json'} cannot be loaded as {class_name}"):
        return scheduler_class.from_pretrained(folder, local_files_only=True)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content
