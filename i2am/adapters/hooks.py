"""Hooks: code around the calls of a module or a method, put back as it was; weak callbacks."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A bound method that does not keep its object, and does nothing once that is gone."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        if (bound := reference()) is not None:
            bound(*args)

    return call


def replace_method(owner: Any, name: str, ours: Any) -> Callable[[], None]:
    """Set a method of one object.

    Args:
        owner: The object, whose class stays as it is.
        name: Of the method.
        ours: What is called instead.

    Returns:
        A function that puts the former method back, unless another one was set since.
    """
    own = vars(owner).get(name)
    setattr(owner, name, ours)

    def put_back() -> None:
        if vars(owner).get(name) is not ours:
            return
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)

    return put_back


def around_calls(
    module: nn.Module,
    before: Callable[[tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[], None],
) -> Callable[[], None]:
    """Call ``before(args, kwargs)`` and, also after an exception, ``after()`` around every call.

    Both run outside of compiled code: hooks of a module that was compiled in place would be traced
    with it, so there the compiled callable is wrapped instead.

    Returns:
        A function that takes them away again.
    """
    compiled = module._compiled_call_impl
    if compiled is None:
        opening = _Hook(lambda module, args, kwargs: before(args, kwargs))
        closing = _Hook(lambda module, args, output: after())
        hooks = [
            module.register_forward_pre_hook(opening, with_kwargs=True),
            module.register_forward_hook(closing, always_call=True),
        ]

        def remove() -> None:
            for hook in hooks:
                hook.remove()

        return remove

    def call(*args: Any, **kwargs: Any) -> Any:
        before(args, kwargs)
        try:
            return compiled(*args, **kwargs)
        finally:
            after()

    module._compiled_call_impl = call

    def put_back() -> None:
        if module._compiled_call_impl is call:
            module._compiled_call_impl = compiled

    return put_back


class _Hook:
    """A hook of ours; copied or pickled with its module, it does nothing."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_idle,)


def _idle(*args: Any) -> None:
    return None
