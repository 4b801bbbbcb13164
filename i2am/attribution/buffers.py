"""The buffers of one layer and source: for every probe of its calls the sums that it adds to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from i2am.attribution import weights
from i2am.attribution.calls import Tokens, softmax_over_queries
from i2am.attribution.direction import Direction
from i2am.attribution.grid import Region
from i2am.attribution.layers import ON_REFERENCE, layer_sums
from i2am.attribution.sums import AttentionSite, LayerSums
from i2am.attribution.time_groups import refuse_capture
from i2am.attribution.weights import Own
from i2am.kernels import Over, Probe

NORM, CONDITIONAL = "attention_norm", "generated_to_reference_conditional"
"""Fields of :class:`LayerSums` that are recorded on request, by probes that differ from others."""


@dataclass(frozen=True)
class Reading:
    """What is read of every call: weights over the queries and over the keys.

    Attributes:
        directions: Which directions are recorded.
        regions: Generated-image regions.
        mask: ``[batch, height, width]`` over the generated image, or None.
        reference_mask: Likewise over the reference image.
        keep_keys: Whether ``C`` is kept of each voting key.
        flow: Whether the places that are looked at are kept.
        norms: Whether shares are kept by the norms of values too.
        conditional: Whether G2R is kept under the softmax over the reference tokens too.
        samples_known: Whether the batch of a call is the samples, see :class:`Accumulator`.
    """

    directions: tuple[Direction, ...]
    regions: dict[str, Region]
    mask: Tensor | None
    reference_mask: Tensor | None
    keep_keys: bool
    flow: bool
    norms: bool
    conditional: bool
    samples_known: bool


@dataclass(eq=False)
class Words:
    """Words of the prompts among the keys that are read.

    Attributes:
        names: Their names.
        weights: ``[prompts, words, keys]``: 1 on the tokens of each word.
    """

    names: tuple[str, ...]
    weights: Tensor
    _vectors: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def vectors(self, samples: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Votes and groups ``[samples or 1, words, keys]``, see :func:`weights.words`."""
        if samples not in self._vectors:
            votes, groups = weights.words(self.weights, samples=samples)
            self._vectors[samples] = votes.to(device), groups.to(device)
        return self._vectors[samples]


@dataclass
class Buffer:
    """One probe, and the sums it adds to.

    Attributes:
        over: Which softmax.
        left: ``W`` ``[batch or 1, rows, seqlen_q]``, or None.
        right: ``V`` ``[batch or 1, groups, keys]``, or None.
        sums: ``[batch, slots, heads, rows or groups, tokens]``; calls add to slot 0.
        own: Which rows or groups belong to one sample each.
    """

    over: Over
    left: Tensor | None
    right: Tensor | None
    sums: Tensor
    own: Own

    def probe(self, rows: slice, norms: Tensor | None = None) -> Probe:
        """What adds to some rows of the batch; ``norms`` ``[rows, heads, keys]`` multiply ``V``."""
        left, right = (
            side if side is None or len(side) == 1 else side[rows]
            for side in (self.left, self.right)
        )
        if norms is not None:
            assert right is not None
            right = right[:, None] * norms[:, :, None]
        return Probe(self.over, self.sums[rows, 0], left=left, right=right)

    def resolve(self, rows: slice, samples: int) -> "Buffer":
        """A copy of the rows that are samples, each with its own vectors."""
        left, right = (
            side if side is None else self.own.keep(side, samples, 1)
            for side in (self.left, self.right)
        )
        sums = self.own.keep(self.sums[rows], samples, 3).clone()
        return replace(self, left=left, right=right, sums=sums)


@dataclass
class LayerBuffers:
    """What is kept of the calls of one layer to one source, or to the words of a prompt.

    Attributes:
        site: The layer and its source, the first of several words.
        names: The sources: one, or the words.
        keys: Which keys of a call are read.
        reference: Which of those are the reference tokens.
        held: Buffers by the field of :class:`LayerSums`.
        by_key: ``[batch, slots, heads, seqlen_q, voters]``, on request.
        voters: Which keys share the uniform vote.
        calls: ``[batch, slots]``.
    """

    site: AttentionSite
    names: tuple[str, ...]
    keys: Tokens
    reference: Tokens
    held: dict[str, Buffer]
    voters: Tokens
    by_key: Tensor | None
    calls: Tensor

    @classmethod
    def allocate(
        cls,
        site: AttentionSite,
        query: Tensor,
        seqlen_k: int,
        reading: Reading,
        *,
        reference: Tokens,
        voters: Tokens | None,
        words: Words | None,
        samples: int,
        slots: int,
    ) -> "LayerBuffers":
        """Zeros for a layer that is called for the first time.

        Args:
            site: The layer and its source.
            query: ``[rows, heads, seqlen_q, head_dim]``.
            seqlen_k: Keys of the call.
            reading: What is read.
            reference: Which keys are the reference tokens.
            voters: Which keys share the uniform vote; default the reference tokens.
            words: Names of words instead of one source.
            samples: Rows of the whole batch.
            slots: Time groups that are kept apart.

        Raises:
            ValueError: The call does not fit the site.
            RuntimeError: A CUDA graph is being captured.
        """
        heads, seqlen_q = query.shape[1:3]
        tokens = len(torch.arange(seqlen_k)[reference])
        height, width = site.generated_grid
        if (heads, seqlen_q) != (site.heads, site.cells) or (
            words is None and tokens != site.reference_tokens
        ):
            raise ValueError(
                f"{site.layer} must have {site.heads} heads, {height}x{width} generated and "
                f"{site.reference_tokens} reference tokens, got {heads}, {seqlen_q} and {tokens}"
            )
        grid = site.reference_grid
        if grid is not None and grid[0] * grid[1] != tokens:
            raise ValueError(
                f"reference_grid of {site.layer} must hold {tokens} tokens, got {grid[0]}x{grid[1]}"
            )
        refuse_capture(query)
        statistics = torch.promote_types(query.dtype, torch.float32)
        # all keys where others vote as well, else those of the source alone
        keys: Tokens = reference if voters is None else slice(None)
        n_keys = tokens if voters is None else seqlen_k
        inside: Tokens = slice(None) if voters is None else reference
        # tensors born in inference mode could not be updated outside of it later
        with torch.inference_mode(False):
            known = samples if reading.samples_known else None
            made = _probes(site, reading, n_keys, inside, voters, words, known)

            def zeros(*shape: int) -> Tensor:
                return torch.zeros(samples, slots, *shape, dtype=statistics, device=query.device)

            def on_device(side: Tensor | None) -> Tensor | None:
                return None if side is None else side.to(query.device, statistics)

            held = {}
            for name, over, left, right, own in made:
                side = left if left is not None else right
                assert side is not None
                n_tokens = n_keys if left is not None else seqlen_q
                if name == CONDITIONAL:
                    n_tokens = tokens
                sums = zeros(heads, side.shape[1], n_tokens)
                if reading.samples_known:
                    own = replace(own, count=0)
                held[name] = Buffer(over, on_device(left), on_device(right), sums, own)
            by_key = None
            voters = reference if voters is None else voters
            if reading.keep_keys and "reference_to_generated" in held:
                by_key = zeros(heads, seqlen_q, len(torch.arange(seqlen_k)[voters]))
            if isinstance(keys, Tensor):
                keys = keys.to(query.device)
            names = (site.source,) if words is None else words.names
            return cls(site, names, keys, inside, held, voters, by_key, zeros())

    @property
    def sums(self) -> list[Tensor]:
        """All tensors ``[batch, slots, ...]``."""
        kept = [buffer.sums for buffer in self.held.values()]
        return [*kept, *([] if self.by_key is None else [self.by_key]), self.calls]

    def probes(
        self, rows: slice, words: Words | None, norms: Tensor | None, *, samples_known: bool
    ) -> list[Probe]:
        """What adds a call of some rows of the batch.

        Args:
            rows: The rows.
            words: The words among the keys of this call; the prompts of other rows may be longer.
            norms: ``[rows, heads, keys]``, of the values of those that are read.
            samples_known: Whether the batch is the samples.
        """
        if words is not None and words.names != self.names:
            raise ValueError(
                f"words must not change during a run, got {words.names} after {self.names}"
            )
        if words is not None and self.held:
            samples = len(self.calls) if samples_known else None
            votes, groups = words.vectors(samples, self.calls.device)
            self.held["reference_to_generated"].right = votes.to(self.calls.dtype)
            for name in ("attention_share", NORM):
                if name in self.held:
                    self.held[name].right = groups.to(self.calls.dtype)
        return [
            buffer.probe(rows, norms if name == NORM else None)
            for name, buffer in self.held.items()
            if name != CONDITIONAL
        ]

    def conditional(self, rows: slice) -> list[Probe]:
        """What adds a call's reference tokens under a softmax of their own, if anything."""
        return [self.held[CONDITIONAL].probe(rows)] if CONDITIONAL in self.held else []

    def add_by_key(
        self, query: Tensor, key: Tensor, scale: float | None, bias: Tensor | None, rows: slice
    ) -> None:
        """Add ``C`` of each voter, where it is kept."""
        if self.by_key is not None:
            over_queries = softmax_over_queries(query, key, scale, bias)
            self.by_key[rows, 0] += over_queries[..., self.voters]

    def resolve(self, rows: slice) -> "LayerBuffers":
        """A copy of the rows that are samples."""
        samples = len(range(len(self.calls))[rows])
        return replace(
            self,
            held={name: each.resolve(rows, samples) for name, each in self.held.items()},
            by_key=None if self.by_key is None else self.by_key[rows].clone(),
            calls=self.calls[rows].clone(),
        )

    def layers(self, ordered: Callable[[Tensor], Tensor] = lambda sums: sums) -> list[LayerSums]:
        """The sums on their grids: one layer, or one for every word.

        Args:
            ordered: Puts the slots in order.
        """
        shape, grid = self.site.generated_shape, self.site.reference_grid
        fields = {name: ordered(each.sums) for name, each in self.held.items()}
        if self.by_key is not None:
            fields["reference_to_generated_by_key"] = ordered(self.by_key).mT
        for name, sums in fields.items():
            if name not in ON_REFERENCE:
                fields[name] = sums.unflatten(-1, shape)
                continue
            assert grid is not None
            sums = sums if name == CONDITIONAL else sums[..., self.reference]
            fields[name] = sums.unflatten(-1, grid)
        fields["calls"] = ordered(self.calls)
        if self.site.role != "text":
            return [layer_sums(self.site, fields)]
        each = len(self.names)
        return [
            layer_sums(
                replace(self.site, source=name),
                {
                    field: sums if field == "calls" else sums[:, :, :, number::each]
                    for field, sums in fields.items()
                },
            )
            for number, name in enumerate(self.names)
        ]


_Probes = Iterable[tuple[str, Over, Tensor | None, Tensor | None, Own]]


def _probes(
    site: AttentionSite,
    reading: Reading,
    n_keys: int,
    reference: Tokens,
    voters: Tokens | None,
    words: Words | None,
    samples: int | None,
) -> _Probes:
    """Field, softmax, weights over queries and over keys, and whose they are."""
    grid = site.reference_grid
    if Direction.REFERENCE_TO_GENERATED in reading.directions:
        if words is not None:
            votes, groups = words.vectors(samples, torch.device("cpu"))
            own = Own(0, len(words.weights), len(words.names))
        else:
            mask = reading.reference_mask
            given: dict[str, Any] = {"grid": grid, "mask": mask, "samples": samples}
            votes = weights.votes(n_keys, reference, voters, **given)
            groups = weights.groups(n_keys, reference, **given)
            own = Own(1, 0 if mask is None else len(mask))
        yield "reference_to_generated", Over.QUERIES, None, votes, own
        yield "attention_share", Over.KEYS, None, groups, own
        if reading.norms:
            yield NORM, Over.KEYS, None, groups, own
        if reading.flow and grid is not None:
            values = weights.places(n_keys, reference, grid)
            yield "places", Over.KEYS, None, values, Own(3, 0)
    if Direction.GENERATED_TO_REFERENCE in reading.directions and grid is not None:
        mask = reading.mask
        given = {"mask": mask, "samples": samples, "frames": site.frames}
        rows = weights.rows(site.generated_grid, reading.regions.values(), **given)
        own = Own(1, 0 if mask is None else len(mask))
        yield "generated_to_reference", Over.KEYS, rows, None, own
        if reading.conditional and not site.alone:
            rows = weights.rows(site.generated_grid, [], **given)
            yield CONDITIONAL, Over.KEYS, rows, None, own
