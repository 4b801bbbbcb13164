"""What the layers of a run attend to: the references and words among the keys of a call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from i2am.adapters.pictures import Pictures
from i2am.adapters.prompts.words import PromptWords
from i2am.attribution.accumulator import Accumulator
from i2am.attribution.buffers import Words
from i2am.attribution.grid import Grid
from i2am.attribution.sums import AttentionSite
from i2am.layouts.spans import Sequences, Span
from i2am.layouts.token_layout import AttentionCall, Frame, TokenLayout


@dataclass(frozen=True)
class Source:
    """One reference, or the words of the prompts, among the keys of a call."""

    site: AttentionSite
    keys: slice | Tensor
    """Its tokens in the sequence of keys, ``slice(None)`` for all."""
    words: Words | None = None
    misfits: tuple[ValueError | None, ...] = ()
    """Of words, for each prompt why this cannot be its text."""


@dataclass(frozen=True)
class Rows:
    """Rows of a call whose tokens are the same."""

    rows: slice
    generated: slice | Tensor
    """The generated tokens in the sequence of queries."""
    sources: tuple[Source, ...]

    def check(self, part: slice) -> None:
        """Refuse rows that turn out to be samples and to have another text than their prompt.

        Args:
            part: The rows of the call that are samples.

        Raises:
            ValueError: Words are not where they should be.
        """
        for misfits in {source.misfits for source in self.sources if any(source.misfits)}:
            for row in range(max(self.rows.start, part.start), min(self.rows.stop, part.stop)):
                misfit = misfits[(row - part.start) * len(misfits) // (part.stop - part.start)]
                if misfit is not None:
                    raise misfit


class Sources:
    """Asks the layout, once for every kind of call of a denoiser's call.

    Args:
        layout: The layout.
        pictures: Learns which tokens masks belong to.
        words: Finds the words of the prompts, ``None`` where none are wanted.

    Attributes:
        misfits: Layers whose queries are not the cells of their level's grid: how many, and that
            grid.
        beside: Whether any call had keys beside those of the references.
    """

    def __init__(self, layout: TokenLayout, pictures: Pictures, words: PromptWords | None) -> None:
        self._layout, self._pictures, self._words = layout, pictures, words
        self._frame: Frame | None = None
        self._rows = 0
        self._found: dict[tuple[AttentionCall, int], tuple[Rows, ...]] = {}
        self._moved: dict[Span, Span] = {}
        self._weights: dict[Any, tuple[Words, tuple[ValueError | None, ...]]] = {}
        self.misfits: dict[str, tuple[int, Grid]] = {}
        self.beside = False
        # of the first evaluation, whose samples are not known yet
        self._unchecked: list[tuple[Rows, Accumulator]] = []

    def open(self, frame: Frame, rows: int) -> None:
        """A denoiser is called with so many rows."""
        self._frame, self._rows = frame, rows
        self._found.clear()

    def of(self, call: AttentionCall, heads: int, device: torch.device) -> tuple[Rows, ...]:
        """The rows of a call and what they attend to; nothing where it is not to be recorded.

        Raises:
            ValueError: The layout or the masks do not fit the call.
        """
        if (call, heads) not in self._found:
            self._found[call, heads] = self._ask(call, heads, device)
        return self._found[call, heads]

    def check(self, rows: Rows, part: slice, accumulator: Accumulator) -> None:
        """Refuse words in another text than their prompt: at once where the rows of `part` are
        known to be samples, else once they are, see :meth:`reveal`.

        Raises:
            ValueError: Words are not where they should be.
        """
        if not any(any(source.misfits) for source in rows.sources):
            return
        if accumulator.unresolved:
            self._unchecked.append((rows, accumulator))
        else:
            rows.check(part)

    def reveal(self, revealed: Sequence[tuple[slice, Accumulator]]) -> None:
        """Rows of unresolved accumulators that turned out to be samples.

        Raises:
            ValueError: As :meth:`check` does.
        """
        unchecked, self._unchecked = self._unchecked, []
        for rows, accumulator in unchecked:
            for part, owner in revealed:
                if owner is accumulator:
                    rows.check(part)

    def _ask(self, call: AttentionCall, heads: int, device: torch.device) -> tuple[Rows, ...]:
        frame = self._frame
        assert frame is not None
        if not self._layout.ragged:
            answers: list[tuple[slice, Sequences | None]] = [
                (slice(0, self._rows), self._layout.spans(call, frame))
            ]
        else:
            answers = []
            for row in range(self._rows):
                spans = self._layout.spans(call, replace(frame, row=row))
                if answers and answers[-1][1] == spans:
                    answers[-1] = slice(answers[-1][0].start, row + 1), spans
                else:
                    answers.append((slice(row, row + 1), spans))
        found = []
        for rows, sequences in answers:
            if sequences is None:
                own = frame.own_grid(call.layer)
                if own is not None and own[0] * own[1] != call.seqlen_q:
                    self.misfits[call.layer] = call.seqlen_q, own
                continue
            self._pictures.meet(sequences, frame.size)
            sources = self._sources(call, heads, sequences, device)
            if sources:
                generated = self._on(sequences.generated, device).index
                found.append(Rows(rows, generated, sources))
        return _alike(found) if self._layout.ragged else tuple(found)

    def _sources(
        self, call: AttentionCall, heads: int, sequences: Sequences, device: torch.device
    ) -> tuple[Source, ...]:
        generated, references = sequences.generated, sequences.keys_of("reference")
        if generated.place is None:
            raise ValueError(f"layout {self._layout.name!r} must give the generated tokens a grid")
        names = [span.name for span in references]
        if len(set(names)) < len(names):
            raise ValueError(f"references must have names of their own, got {', '.join(names)}")
        site = AttentionSite(
            call.layer,
            heads=heads,
            generated_grid=generated.place,
            reference_grid=None,
            reference_tokens=0,
            informative=call.seqlen_k > 1,
            frames=generated.frames,
            tags=self._layout.tags(call.layer),
            measure="share" if sequences.keys_of("generated") else "spread",
        )
        sources = []
        for span in references:
            self.beside |= span.count < call.seqlen_k
            of_span = replace(
                site,
                reference_grid=span.place if span.frames == 1 else None,
                reference_tokens=span.count,
                source=span.name,
                alone=span.count == call.seqlen_k,
            )
            sources.append(Source(of_span, self._keys([span], call, device)))
        texts = sequences.keys_of("text")
        if self._words is not None and texts:
            words, misfits = self._words_of(texts)
            of_words = replace(
                site,
                reference_tokens=int(words.weights.sum(-1).max()),
                source=words.names[0],
                role="text",
                measure="share",
            )
            sources.append(Source(of_words, self._keys(texts, call, device), words, misfits))
        return tuple(sources)

    def _words_of(self, texts: Sequence[Span]) -> tuple[Words, tuple[ValueError | None, ...]]:
        """The words of all prompts in a text that may be that of no prompt."""
        assert self._words is not None
        key = tuple((span.name, span.count) for span in texts)
        if key not in self._weights:
            placed = [self._words.placed(name, count) for name, count in key]
            weights = torch.cat([weights for weights, _ in placed], dim=-1)
            by_prompt = zip(*(misfits for _, misfits in placed), strict=True)
            misfits = tuple(next(filter(None, each), None) for each in by_prompt)
            self._weights[key] = Words(self._words.names, weights), misfits
        return self._weights[key]

    def _keys(
        self, spans: Sequence[Span], call: AttentionCall, device: torch.device
    ) -> slice | Tensor:
        if len(spans) == 1:
            index = self._on(spans[0], device).index
            whole = slice(0, call.seqlen_k)
            return slice(None) if isinstance(index, slice) and index == whole else index
        every = torch.arange(call.seqlen_k)
        return torch.cat([every[span.index] for span in spans]).to(device)

    def _on(self, span: Span, device: torch.device) -> Span:
        if span not in self._moved:
            self._moved[span] = span.to(device)
        return self._moved[span]


def _alike(found: Sequence[Rows]) -> tuple[Rows, ...]:
    """Rows of one call have the same sites; their texts may differ in length.

    Raises:
        ValueError: Their images or references differ in size.
    """
    sites: dict[tuple[str, str], AttentionSite] = {}
    for rows in found:
        for source in rows.sources:
            site = source.site
            first = sites.setdefault((site.role, site.source), site)
            tokens = max(first.reference_tokens, site.reference_tokens)
            if source.words is not None:
                sites[site.role, site.source] = replace(first, reference_tokens=tokens)
            elif site != first:
                raise ValueError(
                    "samples of one batch must have images and references of one size, got "
                    f"{_sizes(first)} and {_sizes(site)} in {site.layer}; record them in runs of "
                    "their own"
                )

    def alike(source: Source) -> Source:
        return replace(source, site=sites[source.site.role, source.site.source])

    return tuple(replace(rows, sources=tuple(map(alike, rows.sources))) for rows in found)


def _sizes(site: AttentionSite) -> str:
    place = site.reference_grid or (site.reference_tokens,)
    of, by = ("x".join(map(str, grid)) for grid in (place, site.generated_grid))
    return f"{site.source!r} of {of} for an image of {by} tokens"


# diffusers masks by adding -10000; nothing less than this passes a softmax over keys
_MASKED = -1000.0


def part_of_bias(bias: Tensor | None, rows: slice, queries: slice | Tensor) -> Tensor | None:
    """The mask of some rows and queries of a call."""
    if bias is None:
        return None
    if bias.ndim == 4 and bias.shape[0] > 1:
        bias = bias[rows]
    if bias.shape[-2] > 1:
        bias = bias[..., queries, :]
    if bias.dtype == torch.bool:
        return bias
    # a constant cancels in the softmax over queries: only -inf keeps hidden tokens from voting
    masked = bias <= _MASKED
    return bias.masked_fill(masked & ~masked.all(-1, keepdim=True), -torch.inf)
