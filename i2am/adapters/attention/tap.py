"""A tap hands query, key, bias and log-sum-exp of a network's attention layers to a listener.

Recorders, the attention loss of training and benchmarks use it. Detached, also after an exception,
it leaves processors and hooks as they were.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from i2am.adapters.attention.attending import Attend, attend_beside
from i2am.adapters.attention.sites import LISTENERS, NUMBERS, Listener, Record, Site
from i2am.adapters.contexts import Calls
from i2am.adapters.guard import UNGUARDED
from i2am.adapters.hooks import around_calls


@dataclass(frozen=True, eq=False)
class TappedLayer:
    """An attention layer that is lent.

    Args:
        network: Index of its network among those that are tapped.
        path: Where it is in the network.
        module: The layer itself.
    """

    network: int
    path: str
    module: Any


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One attention call of a layer.

    Args:
        layer: Which one.
        index: The how many-th call of one pass through the layer, from 0.
        query: ``[batch, heads, seqlen_q, head_dim]``, as the scores are made of it: normalised, and
            rotated by its position.
        key: ``[batch, heads, seqlen_k, head_dim]``.
        bias: Additive or bool mask as the model gave it, which has to broadcast to
            ``[batch, heads, seqlen_q, seqlen_k]``.
        scale: Of the softmax; ``None`` for ``head_dim ** -0.5``.
        query_lse: ``[batch, heads, seqlen_q]``, the log-sum-exp over keys, where the call yields
            it.
        multiplier: ``[1 or seqlen_q]``, what the layer multiplies the output by; ``None`` for 1.
        value: ``[batch, heads, seqlen_k, features]``, where it was asked for.
    """

    layer: TappedLayer
    index: int
    query: Tensor
    key: Tensor
    bias: Tensor | None
    scale: float | None
    query_lse: Tensor | None
    multiplier: Tensor | None
    value: Tensor | None = None


class Tap:
    """Hands every attention call of some layers to a listener, between ``attach`` and ``detach``.

    Args:
        networks: One or several; a compiled one as ``torch.compile`` returned it.
        layers: Which layers, by their path in the network.
        listen: ``listen(layer, call_index, query, key, bias, scale, query_lse, multiplier,
            value)``, the layer by its index in :attr:`layers`, the rest as in :class:`LayerCall`.
        before: ``before(network, args, kwargs)`` before every call of a network, by its index.
        after: ``after(network)`` behind it, also after an exception.
        attend: How the layers attend meanwhile.
        guard: What listening and attending are inside of, but in compiled code.
        here: Whether the calls that come from here are handed on.
        graph: Hand query and key over with their graph, so that gradients flow back; otherwise they
            are detached, and compiled code keeps the handing over.
        values: Hand the values over too, which are ``None`` otherwise.

    Raises:
        ValueError: No attention layer matches.
        NotImplementedError: ``graph`` is asked of a compiled network.
    """

    def __init__(
        self,
        networks: nn.Module | Sequence[nn.Module],
        *,
        layers: Callable[[str], bool],
        listen: Listener,
        before: Callable[[int, tuple[Any, ...], dict[str, Any]], None] | None = None,
        after: Callable[[int], None] | None = None,
        attend: Attend = attend_beside,
        guard: AbstractContextManager[Any] = UNGUARDED,
        here: Callable[[], bool] = lambda: True,
        graph: bool = False,
        values: bool = False,
    ) -> None:
        self._networks = [networks] if isinstance(networks, nn.Module) else list(networks)
        insides = [*map(inside, self._networks)]
        known = [
            TappedLayer(index, path, module)
            for index, network in enumerate(insides)
            for path, module in attention_layers(network).items()
        ]
        self.layers = tuple(layer for layer in known if layers(layer.path))
        if not self.layers:
            names = " and ".join(type(network).__name__ for network in insides)
            raise ValueError(
                f"layers must match an attention layer of {names}, but matches none of "
                f"{len(known)}: {', '.join(layer.path for layer in known[:4])}, ..."
            )
        if graph and any(_is_compiled(network) for network in self._networks):
            raise NotImplementedError(
                "networks must not be compiled where graph=True: compiled code hands over no "
                "tensors with their graph"
            )
        self._listen = listen
        self._before = before
        self._after = after
        self._attend = attend
        self._guard = guard
        self._here = here
        self._graph = graph
        self._values = values
        self._key = next(NUMBERS)
        self._restore: list[Callable[[], None]] = []
        self._installed: dict[TappedLayer, Any] = {}

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @property
    def attached(self) -> bool:
        """Whether the layers are lent at the moment."""
        return bool(self._restore)

    def attach(self) -> None:
        """Borrow the layers, until :meth:`detach`.

        Raises:
            RuntimeError: They are borrowed already.
            NotImplementedError: The attention of a layer is spread over devices.
        """
        from i2am.adapters.attention.processors import install

        if self.attached:
            raise RuntimeError("this tap must be detached before it is attached again")
        if not self._graph:
            LISTENERS[self._key] = self._hear
        try:
            for index, layer in enumerate(self.layers):
                record = self._record(index)
                self._restore.append(install(layer.module, record, self._attend, self._guard))
                self._installed[layer] = layer.module.processor
            if self._before is not None or self._after is not None:
                for number, network in enumerate(self._networks):
                    before = partial(self._before or _nothing, number)
                    after = partial(self._after or _nothing, number)
                    self._restore.append(around_calls(network, before, after))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Give everything back; does nothing the second time."""
        LISTENERS.pop(self._key, None)
        # layers of another network's may share a processor: the last one first
        while self._restore:
            self._restore.pop()()
        self._installed.clear()

    def lost(self) -> dict[TappedLayer, Any]:
        """Layers whose processor was replaced meanwhile, and what they have now."""
        return {
            layer: layer.module.processor
            for layer, installed in self._installed.items()
            if layer.module.processor is not installed
        }

    def _hear(self, *call: Any) -> None:
        if self._here():  # compiled layers do not check before
            self._listen(*call)

    def _record(self, index: int) -> Record:
        if self._graph:
            return _Direct(self._listen, index, self._here, self._values)
        return Site(self._key, index, self._here, values=self._values)


@contextlib.contextmanager
def tap(
    networks: nn.Module | Sequence[nn.Module],
    *,
    layers: Callable[[str], bool] = lambda path: True,
    listen: Callable[[LayerCall], None],
    graph: bool = False,
    values: bool = False,
) -> Iterator[Tap]:
    """See the attention of some layers inside a block; calls of other threads are left out.

    Args:
        networks: See :class:`Tap`.
        layers: Which layers, by their path in the network; all by default.
        listen: Told every call.
        graph: See :class:`Tap`.
        values: See :class:`Tap`.

    Raises:
        ValueError: No attention layer matches.
        NotImplementedError: See :class:`Tap`.

    Example:
        >>> with tap(pipe.transformer, listen=calls.append):  # doctest: +SKIP
        ...     pipe(prompt="a shirt", image=person)
    """
    calls = Calls(next(NUMBERS))

    def hear(layer: int, *call: Any) -> None:
        listen(LayerCall(lent.layers[layer], *call))

    lent = Tap(networks, layers=layers, listen=hear, here=calls.here, graph=graph, values=values)
    calls.take(thread=False)
    try:
        with lent:
            yield lent
    finally:
        calls.leave()


def inside(network: nn.Module) -> nn.Module:
    """torch.compile wraps a module; its layers are inside, its calls come from outside."""
    return getattr(network, "_orig_mod", network)


def attention_layers(network: nn.Module) -> dict[str, Any]:
    """The modules of a network that attend by a processor, by path."""
    return {
        path: module
        for path, module in network.named_modules()
        # MochiAttention has but the attribute
        if hasattr(module, "get_processor") or callable(getattr(module, "processor", None))
    }


class _Direct:
    """The ``record`` callable of one layer that detaches nothing."""

    def __init__(
        self, listen: Listener, layer: int, here: Callable[[], bool], values: bool
    ) -> None:
        self._listen = listen
        self._layer = layer
        self.here = here
        self.values = values

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        bias: Tensor | None = None,
        scale: float | None = None,
        query_lse: Tensor | None = None,
        call_index: int = 0,
        multiplier: Tensor | None = None,
        value: Tensor | None = None,
    ) -> None:
        call = (query, key, bias, scale, query_lse, multiplier, value)
        self._listen(self._layer, call_index, *call)


def _is_compiled(network: nn.Module) -> bool:
    return hasattr(network, "_orig_mod") or any(
        module._compiled_call_impl is not None for module in network.modules()
    )


def _nothing(*args: Any) -> None:
    return None
