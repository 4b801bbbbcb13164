"""Hooks on tokenizers and on methods that encode prompts."""

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

from i2am.adapters.hooks import replace_method


def around(owner: Any, name: str, context: Callable[..., Any]) -> Callable[[], None]:
    """Call a method of an instance inside ``context(*arguments)``, which is told the result."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with context(*args, **kwargs) as done:
            result = original(*args, **kwargs)
            done(result)
        return result

    return replace_method(owner, name, watched)


_LISTENERS: weakref.WeakKeyDictionary[Any, list[Callable[..., None]]] = weakref.WeakKeyDictionary()


def _listening(own: type) -> type:
    """A tokenizer's class whose calls are told: Python looks ``__call__`` up in classes alone."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = own.__call__(self, *args, **kwargs)
        text = args[0] if args else kwargs.get("text")
        for note in _LISTENERS.get(self, ()):
            # what is not called as we know it stays unknown
            with contextlib.suppress(AttributeError, TypeError, ValueError):
                note(self, text, result)
        return result

    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        own.__name__, (own,), {"__call__": functools.wraps(own.__call__)(__call__), **names}
    )


def listen(tokenizer: Any, note: Callable[..., None]) -> Callable[[], None]:
    """Tell ``note(tokenizer, text, result)`` of the calls of a tokenizer."""
    if tokenizer not in _LISTENERS:
        tokenizer.__class__ = _listening(type(tokenizer))
    _LISTENERS.setdefault(tokenizer, []).append(note)

    def put_back() -> None:
        notes = _LISTENERS[tokenizer]
        notes.remove(note)
        if not notes:
            del _LISTENERS[tokenizer]
            tokenizer.__class__ = type(tokenizer).__mro__[1]

    return put_back
