"""fp32 sums per layer and source, added to call by call: all that a recording keeps.

Per sample, time group, layer, source and head: ``C u`` and ``P v`` on the generated grid and
``W P`` over the reference tokens. The attention matrix is never part of it, and nothing here knows
which model is recorded.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from i2am.attribution.buffers import LayerBuffers, Reading, Words
from i2am.attribution.calls import Tokens, accumulate_call
from i2am.attribution.direction import Direction
from i2am.attribution.grid import Box, Patch, Region, as_regions
from i2am.attribution.pair_sums import PairGrids, as_pairs
from i2am.attribution.pairs import PairMaps
from i2am.attribution.resized import ResizedSums
from i2am.attribution.sums import AttentionSite, LayerSums
from i2am.attribution.time_groups import TimeGroups
from i2am.attribution.weights import as_batch
from i2am.kernels import Impl

UNIFORM = "uniform"
MASK = "mask"
SUMS = ("native", "resized")
VALUES = ("one", "norm")
NORMALISE = ("full", "conditional")

Source = tuple[str, str]
"""Layer and source."""


class Accumulator:
    """Sums of both directions for any number of layers.

    The batch of a call is the samples or, with ``unresolved=True``, rows whose meaning is not known
    yet (the number of guidance halves shows only at the scheduler's step). Then every mask of a
    batch is recorded against every row, and :meth:`resolve` keeps the right ones.

    Args:
        time_groups: Number of groups, at least 1.
        directions: Which directions to record.
        regions: Generated-image regions, weight rows for specific-reference maps: by name, or a
            sequence of :class:`Patch` and :class:`Box`, each called what :func:`str` makes of it.
        mask: Inpainting mask over the generated image, ``[height, width]`` or ``[batch, height,
            width]`` in [0, 1]: adds the row ``"mask"`` (paper eq 17, ``x[i] / (h w)``).
        reference_mask: Mask over the reference image, likewise: adds the votes ``"mask"``. Tokens
            without a reference grid are inside no mask; for such a layer these votes are a
            placeholder, equal to the uniform ones, and :class:`AttributionMaps` refuses to read it.
        keep_keys: Also keep ``C`` of each voting key, computed as published code does it: memory
            O(seqlen_q * seqlen_k), for parity checks only.
        sums: ``"native"`` keeps every layer on its own grid; ``"resized"`` adds all layers up on
            the finest grid of the first evaluation, so that what stays does not grow with them.
        pairs: Also add up every cell of a generated grid against every cell of a reference grid,
            both directions, for :meth:`pairs`: True, the generated grid ``(height, width)``, or
            both grids. What is not given is the layers' finest, halved until it has at most 1024
            cells. Layers without a reference grid do not take part.
        flow: Also keep where on the reference each patch looks, for :meth:`AttributionMaps.flow`.
        values: ``"norm"``: also keep the share with each token counted by a norm that calls give.
        normalise: ``"conditional"``: also keep G2R under the softmax over the reference tokens.
        impl: Implementation of the statistics; see :mod:`i2am.kernels`.
        unresolved: See above.

    Raises:
        ValueError: ``time_groups`` is below 1, no direction is given, a region has a reserved name
            or is none (see :func:`as_regions`), a mask is not ``[(batch,) height, width]`` or is 0
            everywhere, ``sums``, ``values`` or ``normalise`` is unknown or of a direction that is
            not given, keys are to be kept of resized sums, or ``pairs`` is no grid.
    """

    def __init__(
        self,
        *,
        time_groups: int = 5,
        directions: Collection[Direction | str] = tuple(Direction),
        regions: Mapping[str, Region] | Sequence[Patch | Box] | None = None,
        mask: Tensor | None = None,
        reference_mask: Tensor | None = None,
        keep_keys: bool = False,
        sums: str = "native",
        pairs: PairGrids = False,
        flow: bool = False,
        values: str = "one",
        normalise: str = "full",
        impl: Impl | str | None = None,
        unresolved: bool = False,
    ) -> None:
        if time_groups < 1:
            raise ValueError(f"time_groups must be at least 1, got {time_groups}")
        self.directions = tuple(Direction(direction) for direction in directions)
        if not self.directions:
            raise ValueError("directions must name at least one direction, got none")
        self.regions = as_regions(regions)
        for name in self.regions:
            if name in (UNIFORM, MASK):
                raise ValueError(
                    f"regions must not be called {name!r}, which is a weight row's name"
                )
        for name, given, known, needed in (
            ("sums", sums, SUMS, None),
            ("values", values, VALUES, Direction.REFERENCE_TO_GENERATED),
            ("normalise", normalise, NORMALISE, Direction.GENERATED_TO_REFERENCE),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
            if needed and given != known[0] and needed not in self.directions:
                raise ValueError(f"{name}={given!r} needs {needed} among the directions")
        if keep_keys and sums == "resized":
            raise ValueError("keep_keys needs sums='native', got 'resized'")
        self.time_groups = time_groups
        self.mask = as_batch("mask", mask)
        self.reference_mask = as_batch("reference_mask", reference_mask)
        self.keep_keys = keep_keys
        self.flow = flow
        self.values = values
        self.normalise = normalise
        self.sums = sums
        self.impl = impl
        self.unresolved = unresolved
        self._reading = Reading(
            self.directions,
            self.regions,
            self.mask,
            self.reference_mask,
            keep_keys,
            flow,
            norms=values == "norm",
            conditional=normalise == "conditional",
            samples_known=not unresolved,
        )
        self._layers: dict[Source, LayerBuffers] = {}
        self._groups = TimeGroups(time_groups)
        self._pairs = as_pairs(pairs, time_groups)
        # all layers of the first evaluation must be seen before their finest grid is known; until
        # then each has sums of its own
        self._resized: dict[str, ResizedSums] | None = None

    @property
    def votes(self) -> tuple[str, ...]:
        """Names of the votes axis of R2G."""
        return (UNIFORM,) if self.reference_mask is None else (UNIFORM, MASK)

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows axis of G2R."""
        return (UNIFORM, *([] if self.mask is None else [MASK]), *self.regions)

    @property
    def samples(self) -> int | None:
        """Rows of the batch, ``None`` before the first call."""
        layer = next(iter(self._layers.values()), None)
        return None if layer is None else len(layer.calls)

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def begin(self, group: int) -> None:
        """An evaluation is over, and calls from now on belong to a time group. :meth:`add` begins
        one where nobody did; a CUDA graph must be captured, and replayed, after.

        Args:
            group: Time group in ``range(time_groups)``.

        Raises:
            ValueError: There is no such group, or layers to be added up have different numbers of
                heads.
        """
        if self.sums == "resized" and self._layers:
            self._begin_resizing()
        self._change(group)

    def _change(self, group: int) -> None:
        if group == self._groups.current:
            return
        sums: list[Tensor] = []
        if self.sums == "native":
            sums += [each for layer in self._layers.values() for each in layer.sums]
        elif self._layers:
            # what was added until now is of the group that ends
            sums += [
                each for resized in self._begin_resizing().values() for each in resized.tensors
            ]
        if self._pairs is not None:
            sums += self._pairs.tensors
        self._groups.begin(group, sums)

    @torch.no_grad()
    def add(
        self,
        site: AttentionSite,
        query: Tensor,
        key: Tensor,
        *,
        group: int,
        reference: Tokens = slice(None),
        voters: Tokens | None = None,
        words: Words | None = None,
        scale: float | None = None,
        bias: Tensor | None = None,
        query_lse: Tensor | None = None,
        norms: Tensor | None = None,
        rows: slice = slice(None),
        samples: int | None = None,
    ) -> Tensor:
        """Add one attention call of one layer, as far as it goes to one source.

        Args:
            site: The layer and its source; the same at every call.
            query: ``[rows, heads, seqlen_q, head_dim]``: exactly the tokens of the generated grid.
            key: ``[rows, heads, seqlen_k, head_dim]``: all keys of the call.
            group: Time group in ``range(time_groups)``.
            reference: Which keys are the reference tokens: a slice or an index tensor.
            voters: Which keys share the uniform R2G vote; default the reference tokens.
            words: Words among the reference tokens, which then are sources of their own instead.
            scale: Softmax scale, default ``head_dim ** -0.5``.
            bias: Additive or bool mask of the call.
            query_lse: Row log-sum-exp over all keys of the call, where it is known.
            norms: ``[rows, heads, seqlen_k]``, for ``values="norm"``: what each key counts with.
            rows: Which rows of the batch these are.
            samples: Rows of the whole batch; default those of the call.

        Returns:
            The row log-sum-exp, ``[rows, heads, seqlen_q]``, for the next source.

        Raises:
            ValueError: The call does not fit the site, or the site changed since the first call.
        """
        if (norms is None) == (self.values == "norm"):
            given = "none" if norms is None else "some"
            raise ValueError(f"norms must be given for values='norm' and no others, got {given}")
        self._change(group)
        layer = self._layers.get((site.layer, site.source))
        if self.sums == "resized" and layer is not None and not self.unresolved:
            self._begin_resizing()
        if layer is None:
            layer = LayerBuffers.allocate(
                site,
                query,
                key.shape[2],
                self._reading,
                reference=reference,
                voters=voters,
                words=words,
                samples=samples or len(query),
                slots=self.time_groups if self.sums == "native" else 1,
            )
            self._layers[site.layer, site.source] = layer
        elif layer.site != site:
            raise ValueError(f"{site.layer} changed during the run, from {layer.site} to {site}")
        # rows of ragged batches, and calls of a run with caches, have their tokens elsewhere
        keys: Tokens = layer.keys if voters is not None else reference
        norms = None if norms is None else norms[..., keys]
        probes = layer.probes(rows, words, norms, samples_known=not self.unresolved)
        lse = accumulate_call(
            query,
            key,
            probes,
            keys=keys,
            by_head=norms is not None,
            reference=layer.reference,
            pooled=[] if self._pairs is None else self._pairs.probes(layer.site, query),
            alone=layer.conditional(rows),
            scale=scale,
            bias=bias,
            normaliser=query_lse,
            impl=self.impl,
        )
        # on the device, because a replayed graph counts too
        layer.calls[rows, 0] += 1
        layer.add_by_key(query, key, scale, bias, rows)
        if self._resized is not None:
            self._move(layer)
        return lse

    def resolve(self, rows: slice) -> "Accumulator":
        """The rows of an unresolved recording that are samples, each with its own masks."""
        resolved = Accumulator(
            time_groups=self.time_groups,
            directions=self.directions,
            regions=self.regions,
            mask=self.mask,
            reference_mask=self.reference_mask,
            keep_keys=self.keep_keys,
            sums=self.sums,
            flow=self.flow,
            values=self.values,
            normalise=self.normalise,
            impl=self.impl,
        )
        resolved._groups = self._groups.copy()
        resolved._pairs = None if self._pairs is None else self._pairs.resolve(rows)
        resolved._layers = {name: layer.resolve(rows) for name, layer in self._layers.items()}
        return resolved

    def layers(self) -> list[LayerSums]:
        """The sums on their grids, in the order in which layers were first seen, as views while
        time groups are in order; or the mean of the resized ones, as one layer of each source."""
        if self.sums == "resized" and self._layers:
            return [each.mean(self._groups) for each in self._begin_resizing().values()]
        return [
            sums for layer in self._layers.values() for sums in layer.layers(self._groups.ordered)
        ]

    @property
    def records_pairs(self) -> bool:
        """Whether :meth:`pairs` was asked for."""
        return self._pairs is not None

    def pairs(self) -> PairMaps | None:
        """Every patch against every patch, as a copy; ``None`` if that was not asked for, or no
        layer has a reference grid."""
        return None if self._pairs is None else self._pairs.maps(self._groups)

    def _begin_resizing(self) -> dict[str, ResizedSums]:
        """Move what the first evaluation left; from now on layers of one shape share their sums."""
        if self._resized is not None:
            return self._resized
        layers = list(self._layers.values())
        sources: dict[str, list[LayerSums]] = {}
        for layer in layers:
            for sums in layer.layers():
                sources.setdefault(sums.site.source, []).append(sums)
        self._resized = {
            source: ResizedSums.like(found, self.time_groups) for source, found in sources.items()
        }
        for layer in layers:
            self._move(layer)
        shared: dict[tuple[str, torch.Size], Tensor] = {}
        for layer in layers:
            for name, buffer in layer.held.items():
                buffer.sums = shared.setdefault((name, buffer.sums.shape), buffer.sums)
        return self._resized

    def _move(self, layer: LayerBuffers) -> None:
        assert self._resized is not None
        for sums in layer.layers():
            source = sums.site.source
            if source not in self._resized:
                self._resized[source] = ResizedSums.like([sums], self.time_groups)
            self._resized[source].add(sums)
        for each in layer.sums:
            each.zero_()
