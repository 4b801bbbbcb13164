"""What a recorder must have seen: every attention call of a plain run, as fp64 softmaxes.

Nothing of i2am's is used here but the maps that are compared.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(eq=False)
class Call:
    """One attention call of one layer."""

    layer: str
    index: int  # among those of one call of the layer
    evaluation: int  # steps of the scheduler before
    denoiser_call: int  # within the evaluation
    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float

    @property
    def rows(self) -> int:
        return len(self.query)

    @property
    def seqlen_q(self) -> int:
        return self.query.shape[2]

    @property
    def seqlen_k(self) -> int:
        return self.key.shape[2]

    def logits(self, row: int) -> Tensor:
        """``[heads, seqlen_q, seqlen_k]`` in fp64; keys that nobody may see are -inf."""
        logits = self.query[row].double() @ self.key[row].double().mT * self.scale
        if self.mask is None:
            return logits
        mask = self.mask.expand(self.rows, *self.mask.shape[1:])[row]
        if mask.dtype == torch.bool:
            return logits.masked_fill(~mask, -torch.inf)
        # diffusers adds -10000 where nobody may look
        return (logits + mask.double()).masked_fill(mask < -5000, -torch.inf)


class _Mode(TorchFunctionMode):
    def __init__(self, note: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._note(
                dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def spied(denoisers: Sequence[nn.Module], scheduler: Any) -> Iterator[list[Call]]:
    """Lists every attention call of some denoisers in a run that nobody records."""
    calls: list[Call] = []
    inside: list[list[Any]] = []  # path of the layer, and how often it attended
    at = SimpleNamespace(evaluation=0, denoiser_call=-1)

    def note(given: dict[str, Any]) -> None:
        if not inside:
            return
        layer, made = inside[-1]
        inside[-1][1] += 1
        query, key, mask = (given.get(name) for name in ("query", "key", "attn_mask"))
        assert not given.get("is_causal")
        calls.append(
            Call(
                layer,
                made,
                at.evaluation,
                at.denoiser_call,
                query.detach().clone(),
                key.detach().clone(),
                None if mask is None else mask.detach().clone(),
                given.get("scale") or query.shape[-1] ** -0.5,
            )
        )

    def enter(name: str, *_: Any) -> None:
        inside.append([name, 0])

    def call_denoiser(*_: Any) -> None:
        at.denoiser_call += 1

    step = scheduler.step

    @functools.wraps(step)
    def count_step(*args: Any, **kwargs: Any) -> Any:
        at.evaluation, at.denoiser_call = at.evaluation + 1, -1
        return step(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for denoiser in denoisers:
            stack.callback(denoiser.register_forward_pre_hook(call_denoiser).remove)
            for name, module in denoiser.named_modules():
                if not hasattr(module, "get_processor"):
                    continue
                begin = functools.partial(enter, name)
                stack.callback(module.register_forward_pre_hook(begin).remove)
                stack.callback(
                    module.register_forward_hook(lambda *_: inside.pop() and None).remove
                )
        scheduler.step = count_step
        stack.callback(lambda: delattr(scheduler, "step"))
        stack.enter_context(_Mode(note))
        yield calls


@dataclass(frozen=True)
class Keys:
    """Tokens of one reference among the keys."""

    positions: Sequence[int]
    grid: tuple[int, int] | None = None
    weight: float = 1.0  # by which an adapter multiplies its branch


@dataclass(frozen=True)
class Tokens:
    """What the tokens of a row of a call are."""

    generated: Sequence[int]  # among the queries
    grid: tuple[int, ...]
    references: Mapping[int, Keys] = field(default_factory=dict)  # by number
    words: Mapping[str, Sequence[int]] = field(default_factory=dict)


Source = int | str
"""Number of a reference, or a word."""


@dataclass(eq=False)
class Sums:
    """Sums over the calls of a layer to a source, ``[samples, groups, heads, tokens]``."""

    grid: tuple[int, ...]
    reference_grid: tuple[int, int] | None
    share: Tensor
    spread: Tensor
    received: Tensor
    calls: Tensor  # [samples, groups]


def expected(
    calls: Sequence[Call],
    of: Callable[[Call], Sequence[tuple[int, Tokens]] | None],
    groups: Sequence[int],
) -> dict[tuple[str, Source], Sums]:
    """The sums of every layer and source, from the whole attention matrices.

    Args:
        calls: All calls of a run.
        of: The row of every sample in a call and what its tokens are; None for calls that are not
            recorded.
        groups: Time group of every evaluation.
    """
    found: dict[tuple[str, Source], Sums] = {}
    for call in calls:
        rows = of(call)
        if rows is None:
            continue
        group, heads = groups[call.evaluation], call.query.shape[1]
        for sample, (row, tokens) in enumerate(rows):
            generated = torch.as_tensor(tokens.generated)
            logits = call.logits(row)[:, generated]
            over_keys = logits.softmax(-1)
            over_queries = logits.softmax(-2).nan_to_num(0)
            sources: dict[Source, Keys] = {**tokens.references}
            sources |= {word: Keys(positions) for word, positions in tokens.words.items()}
            for source, keys in sources.items():
                at = torch.as_tensor(keys.positions, dtype=torch.long)
                if (call.layer, source) not in found:

                    def zeros(n: int, heads: int = heads, rows: Any = rows) -> Tensor:
                        shape = len(rows), max(groups) + 1, heads, n
                        return torch.zeros(shape, dtype=torch.float64)

                    n, n_keys = len(generated), len(at) if keys.grid else 0
                    one = zeros(1)[:, :, 0, 0]
                    found[call.layer, source] = Sums(
                        tokens.grid, keys.grid, zeros(n), zeros(n), zeros(n_keys), one
                    )
                sums = found[call.layer, source]
                where = sample, group
                sums.share[where] += keys.weight * over_keys[..., at].sum(-1)
                if len(at):  # a word that a sample lacks spreads nothing
                    sums.spread[where] += keys.weight * over_queries[..., at].mean(-1)
                if keys.grid:
                    sums.received[where] += keys.weight * over_keys[..., at].mean(-2)
                sums.calls[where] += 1
    return found


def assert_close(recorded: Tensor, wanted: Tensor, what: str) -> None:
    """Equal to 1e-5 of the largest value."""
    assert recorded.shape == wanted.shape, f"{what}: {recorded.shape} is not {wanted.shape}"
    largest = wanted.abs().max()
    if not largest:  # a word that no sample has
        assert not recorded.any(), f"{what} is not 0"
        return
    error = (recorded.double() - wanted).abs().max() / largest
    assert error <= 1e-5, f"{what}: off by {error:.1e} of its maximum"


def assert_maps(maps: Any, wanted: Mapping[tuple[str, Source], Sums]) -> None:
    """Every map of every layer and source is that of the sums, and there are no others."""
    names: dict[Source, str] = dict(enumerate(references(maps))) | {w: w for w in maps.words}
    recorded = {(layer.site.layer, layer.site.source) for layer in maps.layer_sums}
    assert recorded == {(layer, names[source]) for layer, source in wanted}
    for (layer, source), sums in wanted.items():
        of_layer = maps.select(layers=layer, source=names[source])
        (site,) = (each.site for each in of_layer.layer_sums)
        assert site.reference_grid == sums.reference_grid
        axes = ("time", "head", "frame") if len(sums.grid) == 3 else ("time", "head")

        def shaped(of: Tensor, grid: tuple[int, ...] = sums.grid) -> Tensor:
            return of.unflatten(-1, grid)

        for measure, total in (
            ("share", sums.share / sums.calls.clamp_min(1)[..., None, None]),
            ("spread", sums.spread),
        ):
            read = of_layer.reference_to_generated(axes, source=names[source], measure=measure)
            assert_close(read, shaped(total), f"{measure} of {names[source]!r} in {layer}")
        if sums.reference_grid is not None:
            read = of_layer.generated_to_reference(("time", "head"), source=names[source])
            total = sums.received.unflatten(-1, sums.reference_grid)
            assert_close(read, total, f"attention received by {names[source]!r} in {layer}")


def averaged(wanted: Mapping[tuple[str, Source], Sums], source: Source) -> dict[str, Tensor]:
    """What is left of a source where layers and heads are not kept apart: maps on the finest grid,
    ``[samples, groups, (frames), height, width]``, and the calls of a layer."""
    layers = [sums for (_, name), sums in wanted.items() if name == source]

    def mean(of: str, grids: Sequence[tuple[int, ...]]) -> Tensor:
        finest = max((grid[-2:] for grid in grids), key=lambda grid: grid[0] * grid[1])
        found = []
        for sums, grid in zip(layers, grids, strict=True):
            maps = getattr(sums, of).mean(2).unflatten(-1, grid)
            resized = F.interpolate(maps.flatten(0, -3)[:, None], finest, mode="bilinear")
            found.append(resized[:, 0].unflatten(0, maps.shape[:-2]))
        return torch.stack(found).mean(0)

    made = {of: mean(of, [sums.grid for sums in layers]) for of in ("share", "spread")}
    places = [sums.reference_grid for sums in layers if sums.reference_grid is not None]
    if len(places) == len(layers):
        made["received"] = mean("received", places)
    made["calls"] = torch.stack([sums.calls for sums in layers]).mean(0)
    return made


def assert_averaged(maps: Any, wanted: Mapping[tuple[str, Source], Sums]) -> None:
    """Maps over all layers and heads are the average of whole softmaxes."""
    names = {**dict(enumerate(references(maps))), **{word: word for word in maps.words}}
    frames = ("frame",) if maps.frames > 1 else ()
    for source, name in names.items():
        made = averaged(wanted, source)
        calls = made["calls"].view(*made["calls"].shape, *[1] * (made["share"].ndim - 2))
        for per in ((), ("time",)):
            timed = "time" in per
            share, spread = made["share"], made["spread"]
            share = share / calls if timed else share.sum(1) / calls.sum(1)
            for measure, total in (("share", share), ("spread", spread)):
                total = total.sum(1) if measure == "spread" and not timed else total
                read = maps.reference_to_generated((*per, *frames), source=name, measure=measure)
                assert_close(read, total, f"{measure} of {name!r} per {per}")
            if "received" in made:
                read = maps.generated_to_reference(per, source=name)
                total = made["received"] if timed else made["received"].sum(1)
                assert_close(read, total, f"attention received by {name!r} per {per}")


def references(maps: Any) -> list[str]:
    return [name for name in maps.sources if name not in maps.words]
