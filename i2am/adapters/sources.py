"""What the layers of a run attend to: the references and words among the keys of a call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from i2am.adapters.pictures import Pictures
from i2am.adapters.words import PromptWords
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


@dataclass(frozen=True)
class Rows:
    """Rows of a call whose tokens are the same."""

    rows: slice
    generated: slice | Tensor
    """The generated tokens in the sequence of queries."""
    sources: tuple[Source, ...]


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
        self._weights: dict[Any, Words] = {}
        self.misfits: dict[str, tuple[int, Grid]] = {}
        self.beside = False

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
        return tuple(found)

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
            )
            sources.append(Source(of_span, self._keys([span], call, device)))
        texts = sequences.keys_of("text")
        if self._words is not None and texts:
            words = self._words_of(texts)
            of_words = replace(
                site,
                reference_tokens=int(words.weights.sum(-1).max()),
                source=words.names[0],
                role="text",
                measure="share",
            )
            sources.append(Source(of_words, self._keys(texts, call, device), words))
        return tuple(sources)

    def _words_of(self, texts: Sequence[Span]) -> Words:
        assert self._words is not None
        key = tuple((span.name, span.count) for span in texts)
        if key not in self._weights:
            words = self._words
            find = words.of_ragged if self._layout.ragged else words.weights
            weights = [find(name, count) for name, count in key]
            self._weights[key] = Words(self._words.names, torch.cat(weights, dim=-1))
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
