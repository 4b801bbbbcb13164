"""Networks built from configurations that came with weights: never larger than the weights."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import formatannotation, signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedConfig

from i2am.models.weights import stored_values

Network = TypeVar("Network", bound=nn.Module)

# a few weights may be missing, which is said by name later, and some are made again while loading
_TIMES = 2
_MORE_VALUES = 1 << 20
_MORE_TENSORS = 1000


@dataclass
class _Build:
    """What a thread is building, and the weights that it is for."""

    held_values: int = 0
    held_tensors: int = 0
    values: int = 0
    tensors: int = 0
    is_empty: bool = False

    def check(self) -> None:
        for what, count, held, more in (
            ("values", self.values, self.held_values, _MORE_VALUES),
            ("tensors", self.tensors, self.held_tensors, _MORE_TENSORS),
        ):
            most = _TIMES * held + more
            if count > most:
                raise ValueError(
                    f"it describes a network of more than {most:,} {what}, and its weight files "
                    f"hold {held:,}"
                )


_now = threading.local()


@contextmanager
def no_larger_than(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Stops this thread from building a network that is much larger than its weights.

    Args:
        state: The weights.

    Raises:
        ValueError: The network has more than twice as many values or tensors, beyond an allowance
            for small ones.
    """
    build = _Build(stored_values(state), len(state))
    with _building(build):
        yield
        # again, for what builds it may catch what is raised in it
        build.check()


def build_empty(build: Callable[[], Network], state: Mapping[str, Tensor]) -> Network:
    """A network whose parameters have no values yet (torch's meta), for weights to be put in.

    Args:
        build: Makes it.
        state: The weights that it is for.

    Raises:
        ValueError: It is larger than they are.
        Exception: What `build` raises.
    """
    # where nothing takes memory; the buffers of the second have their values
    with no_larger_than(state), torch.device("meta"):
        build()
    with _building(_Build(is_empty=True)):
        return build()


def configuration_of(
    cls: Any, content: Mapping[str, Any], state: Mapping[str, Tensor]
) -> PreTrainedConfig:
    """A configuration of transformers, of which only the architecture is taken.

    What else a file says could name code of a hub, other files, or ways to quantise.

    Args:
        cls: Its class.
        content: The file's.
        state: The weights that it is for.

    Raises:
        ValueError: It has more layers than there are weights.
        Exception: What the class raises.
    """
    layers = content.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(state):
        raise ValueError(
            f"it has {layers:,} layers, and its weight files hold {len(state)} tensors"
        )
    settings = settings_of(cls, content, but=PreTrainedConfig)
    return cls(**settings, attn_implementation="sdpa")


def settings_of(
    cls: type, content: Mapping[str, Any], *, but: type | None = None
) -> dict[str, Any]:
    """The arguments of a class that a configuration file has; nothing else in it has a meaning.

    Args:
        cls: The class.
        content: The file's.
        but: Arguments that this class has are left out too.

    Raises:
        ValueError: A value is of none of the types that the class asks for, or negative.
    """
    left_out = signature(but).parameters if but is not None else ()
    settings = {}
    for name, parameter in signature(cls).parameters.items():
        if name in content and name not in left_out and not name.startswith("_"):
            if parameter.annotation is not parameter.empty:
                _check_setting(name, content[name], formatannotation(parameter.annotation))
            settings[name] = content[name]
    return settings


def _check_setting(name: str, value: Any, types: str) -> None:
    for leaf in _leaves(value):
        if isinstance(leaf, int) and leaf < 0:
            raise ValueError(f"{name} must not be negative, got {leaf}")
        kind = type(leaf).__name__
        if leaf is not None and kind not in types and not (kind == "int" and "float" in types):
            raise ValueError(f"{name} must be {types}, got {repr(leaf)[:100]}")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


@contextmanager
def _building(build: _Build) -> Iterator[None]:
    before = getattr(_now, "build", None)
    _now.build = build
    try:
        yield
    finally:
        _now.build = before


def _registered(module: nn.Module, name: str, tensor: Tensor | None) -> Any:
    """torch calls it before a module gets a parameter or buffer, and takes what it returns."""
    build: _Build | None = getattr(_now, "build", None)
    if build is None or tensor is None:
        return None
    if build.is_empty:
        is_parameter = isinstance(tensor, nn.Parameter)
        return (
            nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad) if is_parameter else None
        )
    earlier = module._parameters.get(name, module._buffers.get(name))
    build.values += tensor.numel() - (0 if earlier is None else earlier.numel())
    build.tensors += earlier is None
    build.check()
    return None


# once and for all threads: adding and removing them would disturb others that build networks
register_module_parameter_registration_hook(_registered)
register_module_buffer_registration_hook(_registered)
