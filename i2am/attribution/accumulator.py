"""fp32 sums per layer, added to call by call: all that a recording keeps.

Per sample, time group, layer and head: ``C u`` on the generated grid and ``W P`` over the reference
tokens. The attention matrix is never part of it, and nothing here knows which model is recorded.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from i2am.attribution import weights
from i2am.attribution.direction import Direction
from i2am.attribution.grid import Box, Patch, Region, as_regions
from i2am.attribution.joint import JointMaps
from i2am.attribution.joint_sums import JointGrids, as_joint
from i2am.attribution.resized import ResizedSums
from i2am.attribution.sums import AttentionSite, LayerSums
from i2am.attribution.time_groups import TimeGroups, refuse_capture
from i2am.attribution.weights import as_batch, own_mask
from i2am.kernels import Impl, Over, Probe, accumulate

UNIFORM = "uniform"
MASK = "mask"
SUMS = ("native", "resized")


@dataclass
class _Layer:
    site: AttentionSite
    reference: slice | Tensor
    key_weights: Tensor  # [B or 1, U, N]
    key_groups: Tensor  # [B or 1, U, N]
    query_weights: Tensor  # [B or 1, R, M]
    r2g: Tensor | None  # [B, slots, H, U, M]; a single slot where sums are resized
    share: Tensor | None  # [B, slots, H, U, M]
    g2r: Tensor | None  # [B, slots, H, R, N]
    voters: slice | Tensor
    by_key: Tensor | None  # [B, slots, H, M, voters]
    calls: Tensor  # [B, slots]

    @property
    def sums(self) -> list[Tensor]:
        sums = (self.r2g, self.share, self.g2r, self.by_key, self.calls)
        return [each for each in sums if each is not None]


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
        joint: Also add up every cell of a generated grid against every cell of a reference grid,
            both directions, for :meth:`joint`: True, the generated grid ``(height, width)``, or
            both grids. What is not given is the layers' finest, halved until it has at most 1024
            cells. Layers without a reference grid do not take part.
        impl: Implementation of the statistics; see :mod:`i2am.kernels`.
        unresolved: See above.

    Raises:
        ValueError: ``time_groups`` is below 1, no direction is given, a region has a reserved name
            or is none (see :func:`as_regions`), a mask is not ``[(batch,) height, width]`` or is 0
            everywhere, ``sums`` is unknown, keys are to be kept of resized sums, or ``joint`` is no
            grid.
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
        joint: JointGrids = False,
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
        if sums not in SUMS:
            raise ValueError(f"sums must be one of {', '.join(SUMS)}, got {sums!r}")
        if keep_keys and sums == "resized":
            raise ValueError("keep_keys needs sums='native', got 'resized'")
        self.time_groups = time_groups
        self.mask = as_batch("mask", mask)
        self.reference_mask = as_batch("reference_mask", reference_mask)
        self.keep_keys = keep_keys
        self.sums = sums
        self.impl = impl
        self.unresolved = unresolved
        self._layers: dict[str, _Layer] = {}
        self._groups = TimeGroups(time_groups)
        self._joint = as_joint(joint, time_groups)
        # all layers of the first evaluation must be seen before their finest grid is known; until
        # then each has sums of its own
        self._resized: ResizedSums | None = None

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
        sums = next((sums for layer in self._layers.values() for sums in layer.sums), None)
        return None if sums is None else len(sums)

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
            sums += self._begin_resizing().tensors
        if self._joint is not None:
            sums += self._joint.tensors
        self._groups.begin(group, sums)

    @torch.no_grad()
    def add(
        self,
        site: AttentionSite,
        query: Tensor,
        key: Tensor,
        *,
        group: int,
        reference: slice | Tensor = slice(None),
        voters: slice | Tensor | None = None,
        scale: float | None = None,
        bias: Tensor | None = None,
        query_lse: Tensor | None = None,
    ) -> None:
        """Add one attention call of one layer.

        Args:
            site: The layer; the same at every call.
            query: ``[batch, heads, seqlen_q, head_dim]``: exactly the tokens of the generated grid.
            key: ``[batch, heads, seqlen_k, head_dim]``: all keys of the call.
            group: Time group in ``range(time_groups)``.
            reference: Which keys are the reference tokens: a slice or an index tensor.
            voters: Which keys share the uniform R2G vote; default the reference tokens.
            scale: Softmax scale, default ``head_dim ** -0.5``.
            bias: Additive or bool mask of the call.
            query_lse: Row log-sum-exp where the attention call returned it.

        Raises:
            ValueError: The call does not fit the site, the site changed since the first call, or
                layers to be added up have different numbers of heads.
        """
        self._change(group)
        layer = self._layers.get(site.layer)
        if self.sums == "resized" and layer is not None and not self.unresolved:
            self._begin_resizing()
        if layer is None:
            layer = self._allocate(site, query, key, reference, voters)
            self._layers[site.layer] = layer
        elif layer.site != site:
            raise ValueError(f"{site.layer} changed during the run, from {layer.site} to {site}")
        probes = []
        if layer.g2r is not None:
            probes.append(Probe(Over.KEYS, layer.g2r[:, 0], left=layer.query_weights))
        if layer.r2g is not None:
            probes.append(Probe(Over.QUERIES, layer.r2g[:, 0], right=layer.key_weights))
        if layer.share is not None:
            probes.append(Probe(Over.KEYS, layer.share[:, 0], right=layer.key_groups))
        joint = [] if self._joint is None else self._joint.probes(site, query)
        if isinstance(layer.reference, slice) and layer.reference == slice(None):
            probes += joint
            joint = []
        lse, _ = accumulate(
            query, key, probes, scale=scale, bias=bias, normaliser=query_lse, impl=self.impl
        )
        if joint:
            some = layer.reference
            if bias is not None and bias.ndim and bias.shape[-1] > 1:
                bias = bias[..., some]
            accumulate(
                query,
                key[:, :, some],
                joint,
                scale=scale,
                bias=bias,
                normaliser=lse,
                impl=self.impl,
            )
        # on the device, because a replayed graph counts too
        layer.calls[:, 0] += 1
        if layer.by_key is not None:
            over_queries = _softmax_over_queries(query, key, scale, bias)
            layer.by_key[:, 0] += over_queries[..., layer.voters]
        if self._resized is not None:
            self._move(layer)

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
            impl=self.impl,
        )
        resolved._groups = self._groups.copy()
        resolved._joint = None if self._joint is None else self._joint.resolve(rows)
        samples = len(range(self.samples or 0)[rows])
        for name, layer in self._layers.items():
            r2g = layer.r2g if layer.r2g is None else layer.r2g[rows]
            share = layer.share if layer.share is None else layer.share[rows]
            g2r = layer.g2r if layer.g2r is None else layer.g2r[rows]
            resolved._layers[name] = _Layer(
                layer.site,
                layer.reference,
                own_mask(layer.key_weights[:, :, None], self.reference_mask, samples, 1)[:, :, 0],
                own_mask(layer.key_groups[:, :, None], self.reference_mask, samples, 1)[:, :, 0],
                own_mask(layer.query_weights[:, :, None], self.mask, samples, 1)[:, :, 0],
                None if r2g is None else own_mask(r2g, self.reference_mask, samples, 3).clone(),
                None if share is None else own_mask(share, self.reference_mask, samples, 3).clone(),
                None if g2r is None else own_mask(g2r, self.mask, samples, 3).clone(),
                layer.voters,
                None if layer.by_key is None else layer.by_key[rows].clone(),
                layer.calls[rows].clone(),
            )
        return resolved

    def layers(self) -> list[LayerSums]:
        """The sums on their grids, in the order in which layers were first seen, as views while
        time groups are in order; or the mean of the resized ones, as one layer.

        Raises:
            ValueError: Layers to be added up have different numbers of heads.
        """
        if self.sums == "resized" and self._layers:
            return [self._begin_resizing().mean(self._groups)]
        return [self._sums(layer) for layer in self._layers.values()]

    @property
    def records_joint(self) -> bool:
        """Whether :meth:`joint` was asked for."""
        return self._joint is not None

    def joint(self) -> JointMaps | None:
        """Every patch against every patch, as a copy; ``None`` if that was not asked for, or no
        layer has a reference grid."""
        return None if self._joint is None else self._joint.maps(self._groups)

    def _begin_resizing(self) -> ResizedSums:
        """Move what the first evaluation left; from now on layers of one shape share their sums."""
        if self._resized is not None:
            return self._resized
        layers = list(self._layers.values())
        self._resized = ResizedSums.like([self._sums(layer) for layer in layers], self.time_groups)
        for layer in layers:
            self._move(layer)
        shared: dict[tuple[str, torch.Size], Tensor] = {}
        for layer in layers:
            if layer.share is not None:
                layer.share = shared.setdefault(("share", layer.share.shape), layer.share)
            if layer.r2g is not None:
                layer.r2g = shared.setdefault(("r2g", layer.r2g.shape), layer.r2g)
            if layer.g2r is not None:
                layer.g2r = shared.setdefault(("g2r", layer.g2r.shape), layer.g2r)
        return self._resized

    def _move(self, layer: _Layer) -> None:
        assert self._resized is not None
        self._resized.add(self._sums(layer))
        for sums in layer.sums:
            sums.zero_()

    def _sums(self, layer: _Layer) -> LayerSums:
        generated = layer.site.generated_grid
        r2g, share, g2r, by_key, calls = (
            sums if sums is None or self.sums == "resized" else self._groups.ordered(sums)
            for sums in (layer.r2g, layer.share, layer.g2r, layer.by_key, layer.calls)
        )
        if r2g is not None:
            r2g = r2g.unflatten(-1, generated)
        if share is not None:
            share = share.unflatten(-1, generated)
        if by_key is not None:
            by_key = by_key.mT.unflatten(-1, generated)
        if g2r is not None and layer.site.reference_grid is not None:
            g2r = g2r[..., layer.reference].unflatten(-1, layer.site.reference_grid)
        return LayerSums(layer.site, r2g, g2r, by_key, share, calls)

    def _allocate(
        self,
        site: AttentionSite,
        query: Tensor,
        key: Tensor,
        reference: slice | Tensor,
        voters: slice | Tensor | None,
    ) -> _Layer:
        batch, heads, seqlen_q, _ = query.shape
        seqlen_k = key.shape[2]
        height, width = site.generated_grid
        tokens = len(torch.arange(seqlen_k)[reference])
        if (heads, seqlen_q, tokens) != (site.heads, height * width, site.reference_tokens):
            raise ValueError(
                f"{site.layer} must have {site.heads} heads, {height}x{width} generated and "
                f"{site.reference_tokens} reference tokens, got {heads}, {seqlen_q} and {tokens}"
            )
        grid = site.reference_grid
        if grid is not None and grid[0] * grid[1] != tokens:
            raise ValueError(
                f"reference_grid of {site.layer} must hold {tokens} tokens, got {grid[0]}x{grid[1]}"
            )
        statistics = torch.promote_types(query.dtype, torch.float32)
        refuse_capture(query)
        # tensors born in inference mode could not be updated outside of it later
        with torch.inference_mode(False):
            samples = None if self.unresolved else batch
            key_weights = weights.votes(
                seqlen_k,
                reference,
                voters,
                grid=grid,
                mask=self.reference_mask,
                samples=samples,
            )
            key_groups = weights.groups(
                seqlen_k, reference, grid=grid, mask=self.reference_mask, samples=samples
            )
            query_weights = weights.rows(
                site.generated_grid, self.regions.values(), mask=self.mask, samples=samples
            )
            shape = (batch, self.time_groups if self.sums == "native" else 1, heads)
            r2g = share = g2r = by_key = None
            voters = reference if voters is None else voters
            if Direction.REFERENCE_TO_GENERATED in self.directions:
                r2g = torch.zeros(
                    *shape, key_weights.shape[1], seqlen_q, dtype=statistics, device=query.device
                )
                share = torch.zeros_like(r2g)
                if self.keep_keys:
                    n_voters = len(torch.arange(seqlen_k)[voters])
                    by_key = torch.zeros(
                        *shape, seqlen_q, n_voters, dtype=statistics, device=query.device
                    )
            if Direction.GENERATED_TO_REFERENCE in self.directions and grid is not None:
                g2r = torch.zeros(
                    *shape, query_weights.shape[1], seqlen_k, dtype=statistics, device=query.device
                )
            return _Layer(
                site,
                reference if isinstance(reference, slice) else reference.to(query.device),
                key_weights.to(query.device, statistics),
                key_groups.to(query.device, statistics),
                query_weights.to(query.device, statistics),
                r2g,
                share,
                g2r,
                voters,
                by_key,
                torch.zeros(shape[:2], dtype=statistics, device=query.device),
            )


def _softmax_over_queries(
    query: Tensor, key: Tensor, scale: float | None, bias: Tensor | None
) -> Tensor:
    """``C`` ``[batch, heads, seqlen_q, seqlen_k]`` in the published order of fp32 operations."""
    compute = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(compute) @ key.to(compute).mT
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias
    # a key that no query may attend to spreads nothing: its softmax would be NaN
    unseen = scores.isneginf().all(-2, keepdim=True)
    return scores.softmax(-2).masked_fill(unseen, 0)
