"""Pipelines from folders in diffusers layout: offline, strict, no module imported on their word."""

import os
import re
from collections.abc import Container, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin

from i2am.files import read_json
from i2am.models import schedulers
from i2am.models.base import ReferencePipeline
from i2am.models.building import build_empty, configuration_of, no_larger_than, settings_of
from i2am.models.offline import no_hub
from i2am.models.weights import (
    check_keys,
    load_strictly,
    own_copy,
    read_state_dict,
)
from i2am.wording import in_one_sentence

Pipeline = TypeVar("Pipeline", bound=ReferencePipeline)
INDEX = "model_index.json"
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_MOST_STEPS = 1_000_000  # of a scheduler, which makes arrays of them


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
    with no_hub():
        settings |= _load_components(
            cls, path, index, replacements, torch_dtype or torch.float32, variant
        )
        with in_one_sentence(f"{path} cannot be loaded as {cls.__name__}"):
            pipeline = cls(**{**settings, **replacements})
    pipeline.register_to_config(_name_or_path=str(path))
    return pipeline


def _load_components(
    cls: type[Pipeline],
    path: Path,
    index: Mapping[str, Any],
    replaced: Container[str],
    dtype: torch.dtype,
    variant: str | None,
) -> dict[str, Any]:
    """All components of a folder that are not replaced."""
    components: dict[str, Any] = {}
    component_class: Any
    for name, component_class in cls.component_classes.items():
        if name in replaced:
            continue
        declared = index.get(name)
        if not (isinstance(declared, list) and len(declared) == 2 and isinstance(declared[1], str)):
            raise ValueError(f"{path / INDEX} does not declare the component {name}")
        if component_class is SchedulerMixin:
            components[name] = _load_scheduler(path / name, declared[1])
            continue
        choices = component_class if isinstance(component_class, tuple) else (component_class,)
        chosen = [choice for choice in choices if choice.__name__ == declared[1]]
        if not chosen:
            known = " or a ".join(choice.__name__ for choice in choices)
            raise ValueError(
                f"{name} of a {cls.__name__} must be a {known}, "
                f"{path / INDEX} declares a {declared[1]}"
            )
        components[name] = _load_model(chosen[0], path / name, dtype, variant)
    return components


def _load_model(
    model_class: Any, folder: Path, dtype: torch.dtype, variant: str | None
) -> torch.nn.Module:
    content = _read_json(folder / "config.json")
    if "from_pretrained" in vars(model_class):  # one of ours, strict by itself
        return model_class.from_pretrained(folder, dtype=dtype, variant=variant)
    state = read_state_dict(folder, variant, dtype=dtype)
    what = f"{model_class.__name__} in {folder}"
    cannot = f"{folder / 'config.json'} cannot be loaded as {model_class.__name__}"
    if issubclass(model_class, ModelMixin):
        with in_one_sentence(cannot):
            settings = settings_of(model_class, content)
            model = build_empty(lambda: model_class(**settings), state)
        state = {_current_name(key): values for key, values in state.items()}
        load_strictly(model, state, what=what, dtype=dtype)
        return model.eval()
    with in_one_sentence(cannot), no_larger_than(state):
        # the tensors, not the folder: transformers reads no file, and knows their older names
        model, report = model_class.from_pretrained(
            None,
            config=configuration_of(model_class.config_class, content, state),
            state_dict={key: own_copy(values, dtype) for key, values in state.items()},
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_keys(
        what,
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        misshapen=[
            f"{key} ({list(found)} for {list(wanted)})"
            for key, found, wanted in report["mismatched_keys"]
        ],
    )
    return model.eval()


def _current_name(key: str) -> str:
    """Of a tensor; diffusers called those of attention otherwise before 0.18."""
    found = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", key)
    if not found:
        return key
    block, layer, leaf = found.groups()
    return f"{block}.{_ATTENTION[layer]}.{leaf}"


def _load_scheduler(folder: Path, class_name: str) -> SchedulerMixin:
    content = _read_json(folder / "scheduler_config.json")
    found = getattr(schedulers, class_name, None) or getattr(diffusers, class_name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"{folder.parent / INDEX} declares an unknown scheduler, {class_name}")
    for name, value in content.items():
        if isinstance(value, int) and abs(value) > _MOST_STEPS:
            raise ValueError(
                f"{name} in {folder / 'scheduler_config.json'} must be at most {_MOST_STEPS:,}, "
                f"got {f'{value:,}'[:40]}"
            )
    scheduler_class: Any = found
    with in_one_sentence(f"{folder / 'scheduler_config.json'} cannot be loaded as {class_name}"):
        return scheduler_class.from_config(content)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content
