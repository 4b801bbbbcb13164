"""Modules with the contents of diffusers' own, in which attention is another function."""

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

_DISPATCH, _SDPA = "dispatch_attention_fn", "scaled_dot_product_attention"


class StandIn:
    """A module with the contents of another one, in which attention is recorded.

    It is in ``sys.modules`` while a layer is recorded by it: compilers look up the globals of a
    function by the name of its module.

    Args:
        source: The other one.
        dispatch: Takes the place of its ``dispatch_attention_fn``.
        attend: Takes the place of its ``F.scaled_dot_product_attention``.
    """

    def __init__(
        self, source: types.ModuleType, *, dispatch: Callable[..., Any], attend: Callable[..., Any]
    ) -> None:
        self._source = source
        self._own = types.ModuleType(f"{__name__}.of.{source.__name__}")
        self._users = 0
        # the garbage collector may detach a lost recorder in between, in the same thread
        self._lock = threading.RLock()
        ours = vars(self._own)
        self._replaced: dict[str, Any] = {"__name__": ours["__name__"], "__spec__": None}
        if hasattr(source, _DISPATCH):
            self._replaced[_DISPATCH] = dispatch
        if getattr(source, "F", None) is F:
            functional = types.ModuleType(f"{self._own.__name__}.F")
            contents = {_SDPA: attend, "__name__": functional.__name__, "__spec__": None}
            vars(functional).update(vars(F) | contents)
            self._replaced["F"] = functional
        self._helpers = {
            name: (function, self.rebind(function))
            for name, function in vars(source).items()
            if self.attends(function)
        }
        self._refresh()

    def attends(self, function: Any) -> bool:
        """Whether a function of the module attends, itself or by other functions of it."""
        return self._attends(function, set())

    def _attends(self, function: Any, seen: set[Any]) -> bool:
        of_source = vars(self._source)
        if not isinstance(function, types.FunctionType) or function.__globals__ is not of_source:
            return False
        if function in seen:
            return False
        seen.add(function)
        names = _names(function.__code__)
        if _DISPATCH in names & self._replaced.keys():
            return True
        if _SDPA in names and "F" in names & self._replaced.keys():
            return True
        return any(self._attends(of_source.get(name), seen) for name in names)

    def rebind(self, function: types.FunctionType) -> types.FunctionType:
        """The same code with the globals of the stand-in."""
        bound = types.FunctionType(
            function.__code__,
            vars(self._own),
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        bound.__kwdefaults__ = function.__kwdefaults__
        bound.__module__, bound.__qualname__ = self._own.__name__, function.__qualname__
        return bound

    def enter(self) -> None:
        """A layer begins to be recorded."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._refresh()
                for module in self._modules:
                    sys.modules[module.__name__] = module

    def leave(self) -> None:
        """A layer is recorded no more."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for module in self._modules:
                    sys.modules.pop(module.__name__, None)

    @property
    def _modules(self) -> list[types.ModuleType]:
        functional = self._replaced.get("F")
        return [self._own] if functional is None else [self._own, functional]

    def _refresh(self) -> None:
        """Copy what was patched in the other module."""
        of_source = vars(self._source)
        helpers = {
            name: rebound
            for name, (function, rebound) in self._helpers.items()
            if of_source.get(name) is function
        }
        vars(self._own).update(of_source | self._replaced | helpers)


def _names(code: types.CodeType) -> set[str]:
    """The global names and attributes that a function uses, also inside of its own functions."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
