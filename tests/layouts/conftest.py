"""What the layers of a denoiser attend to, and which keys a change of its arguments moves."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from i2am.layouts import AttentionCall, Frame, Sequences, TokenLayout


@dataclass
class Attended:
    """One call of the attention function, and the call of the denoiser in which it was made."""

    call: AttentionCall
    frame: Frame
    key: Tensor
    denoiser_call: int


@dataclass
class Watch(TorchFunctionMode):
    """Every attention call of a denoiser, as a recorder hands it to a layout."""

    denoiser: nn.Module
    seen: list[Attended] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.handles: list[Any] = []
        self.inside: list[list[Any]] = []  # path of the layer and its number of calls
        self.run: dict[Any, Any] = {}
        self.calls = -1

    def __enter__(self) -> "Watch":
        hook = self.denoiser.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.handles.append(hook)
        for name, module in self.denoiser.named_modules():
            if hasattr(module, "get_processor"):
                self.handles += [
                    module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)),
                    module.register_forward_hook(lambda *_: self._leave()),
                ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        # the denoiser takes entries out of dictionaries
        arguments = {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in bound.arguments.items()
        }
        self.frame = Frame(None, arguments, dict(module.config), run=self.run)
        self.calls += 1

    def _enter(self, name: str) -> None:
        self.inside.append([name, 0])

    def _leave(self) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.inside:
            query = kwargs.get("query", args[0] if args else None)
            key = kwargs.get("key", args[1] if len(args) > 1 else None)
            name, index = self.inside[-1]
            call = AttentionCall(name, index, query.shape[-2], key.shape[-2])
            self.seen.append(Attended(call, self.frame, key.clone(), self.calls))
            self.inside[-1][1] += 1
        return func(*args, **kwargs)

    def of(self, layout: TokenLayout) -> list[tuple[Attended, Sequences | None]]:
        """The calls of a layout's layers with the spans that it gives them."""
        return [
            (each, layout.spans(each.call, each.frame))
            for each in self.seen
            if layout.matches(each.call.layer)
        ]


@pytest.fixture(scope="session")
def watch() -> type[Watch]:
    return Watch


Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="session")
def moved() -> Callable[..., list[int]]:
    """Positions of the keys of a layer's call that a change of the denoiser's arguments moves."""

    @torch.no_grad()
    def keys(denoiser: nn.Module, arguments: Mapping[str, Any], layer: str, index: int) -> Tensor:
        torch.manual_seed(0)
        with Watch(denoiser) as watching:
            denoiser(**{k: dict(v) if isinstance(v, dict) else v for k, v in arguments.items()})
        return next(
            each.key
            for each in watching.seen
            if (each.call.layer, each.call.call_index) == (layer, index)
        )

    def compare(
        denoiser: nn.Module,
        arguments: dict[str, Any],
        change: Change,
        layer: str = "transformer_blocks.0.attn",
        index: int = 0,
        row: int = 0,
    ) -> list[int]:
        before = keys(denoiser, arguments, layer, index)[row]
        after = keys(denoiser, change(dict(arguments)), layer, index)[row]
        return ((before - after).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist()

    return compare


@pytest.fixture(scope="session")
def noise() -> Callable[..., Change]:
    """A change of some tokens ``[:, start:stop]`` of an argument."""

    def make(name: str, start: int, stop: int) -> Change:
        def change(arguments: dict[str, Any]) -> dict[str, Any]:
            value = arguments[name].clone()
            generator = torch.Generator().manual_seed(9)
            value[:, start:stop] += torch.randn(value[:, start:stop].shape, generator=generator)
            return arguments | {name: value}

        return change

    return make
