"""Whose calls a recorder takes, and what they are called: known by the context they come from.

A context (:mod:`contextvars`) is a thread's or a task's own. Tasks and ``asyncio.to_thread`` get a
copy; a plain thread begins with an empty one, so two threads that share a denoiser do not mix.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import nn

from i2am.adapters.hooks import replace_method
from i2am.layouts.token_layout import CONDITIONAL, UNCONDITIONAL

_Names = ContextVar[Mapping[int, str | None]]

_TAKEN: ContextVar[frozenset[int]] = ContextVar("i2am_taken", default=frozenset())
_MARKED: _Names = ContextVar("i2am_marked", default={})  # noqa: B039 - is never changed in place
_CACHED: _Names = ContextVar("i2am_cached", default={})  # noqa: B039 - is never changed in place

# of pipelines, and of the guiders of modular ones
_CACHE_CONTEXTS: dict[str, str | None] = {
    "cond": CONDITIONAL,
    "pred_cond": CONDITIONAL,
    "uncond": UNCONDITIONAL,
    "pred_uncond": UNCONDITIONAL,
    "cond_uncond": None,
}


class Calls:
    """The calls that one recorder takes.

    Args:
        key: Number of the recorder.
    """

    def __init__(self, key: int) -> None:
        self._key = key
        self._thread: int | None = None

    def take(self, *, thread: bool) -> None:
        """From now on, those of this context and of its copies; with ``thread`` also those of any
        context of this thread, as a notebook gives every cell one of its own."""
        self._thread = threading.get_ident() if thread else None
        _TAKEN.set(_TAKEN.get() | {self._key})

    def leave(self) -> None:
        """From now on none."""
        self._thread = None
        _TAKEN.set(_TAKEN.get() - {self._key})

    def here(self) -> bool:
        """Whether a call from here is one of them."""
        return self._key in _TAKEN.get() or self.of_this_thread

    @property
    def of_this_thread(self) -> bool:
        """Whether all calls of this thread are."""
        return self._thread == threading.get_ident()

    @property
    def name(self) -> str | None:
        """What a call from here is called: by :meth:`mark`, or else by its ``cache_context``."""
        marked = _MARKED.get()
        return marked[self._key] if self._key in marked else _CACHED.get().get(self._key)

    def mark(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Call the calls of a block so."""
        return _naming(_MARKED, self._key, name)

    def name_by_cache_context(self, denoiser: nn.Module) -> Callable[[], None]:
        """Let ``denoiser.cache_context(name)`` name the calls inside; returns what undoes it."""
        original = getattr(denoiser, "cache_context", None)
        if original is None:
            return lambda: None
        key = self._key

        @functools.wraps(original)
        @contextlib.contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            called = _CACHE_CONTEXTS.get(name, name)
            with _naming(_CACHED, key, called), original(name, *args, **kwargs) as given:
                yield given

        ours = _CacheContext(cache_context, denoiser)
        return replace_method(denoiser, "cache_context", ours)


class _CacheContext:
    """A denoiser's ``cache_context`` as ours; a copy of the denoiser has its own."""

    def __init__(self, function: Callable[..., Any], denoiser: nn.Module) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._denoiser = denoiser

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._denoiser, "cache_context")


@contextlib.contextmanager
def _naming(names: _Names, key: int, name: str | None) -> Iterator[None]:
    token = names.set({**names.get(), key: name})
    try:
        yield
    finally:
        names.reset(token)
