"""Which key tokens of a text belong to which words of the prompt, as its encoders were given it."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2am.adapters.prompts.encodings import Encodings, Given, Row
from i2am.adapters.prompts.spelling import (
    REST,
    Phrase,
    contains,
    key,
    name_all,
    name_some,
    phrases,
    positions_of,
    spell,
)
from i2am.layouts.token_layout import CONDITIONAL, Encoder, TokenLayout

GIVE = "; give token positions instead, words={'shirt': [3, 4]}"


class _Sample(NamedTuple):
    """A row of an encoder whose tokens have names."""

    encoder: Encoder
    row: Row
    names: list[tuple[str, ...]]


class PromptWords:
    """Finds the tokens of words in the text spans of a run.

    Words are compared without regard to case and to what stands between them: punctuation belongs
    to no word. All occurrences of a word in a prompt are one. A word may lie in several text spans,
    one of each encoder (SD3).

    Args:
        pipe: The pipeline.
        layout: Whose text spans, and by which encoders.
        wanted: True for every word of the prompts, and then, so that each token has one name,
            ``"<punctuation>"`` (marks and spaces), ``"<special>"`` (BOS, EOS and templates) and
            ``"<padding>"`` (also zeros instead of a text); a word or phrase or several, which
            must occur in every prompt; or token positions of each word in the text span,
            ``{"shirt": [3, 4]}``, or by span, ``{"shirt": {"text": [3], "text 2": [5, 6]}}``, the
            same in all samples and guidance branches.
        branches: Guidance branches that are recorded. Wanted words must occur in the prompts of
            the first; in the other one they may.

    Raises:
        TypeError: `wanted` is none of these.
        ValueError: `wanted` is empty, has a name without letters or twice, or a position below 0;
            spans must be told apart and are not; or, without positions, the pipeline lacks the
            encoders of the layout.
    """

    def __init__(
        self,
        pipe: Any,
        layout: TokenLayout,
        wanted: Any,
        branches: Collection[str] = (CONDITIONAL,),
    ) -> None:
        self._branches = tuple(branches)
        self._encoders = [
            e for e in layout.encoders if getattr(pipe, e.component, None) is not None
        ]
        self._spans = [*dict.fromkeys(each.span for each in layout.encoders)] or ["text"]
        self._phrases: dict[str, Phrase] = {}
        self._positions: dict[str, dict[str, list[int]]] | None = None
        self._encodings: Encodings | None = None
        self._samples: dict[tuple[str, str], list[_Sample]] = {}
        self._made: dict[Any, Tensor] = {}
        self._misfits: dict[tuple[str, int], tuple[Tensor, tuple[ValueError | None, ...]]] = {}
        self._names: tuple[str, ...] = ()
        self._every = wanted is True
        template = getattr(pipe, "prompt_template_encode", None)
        parts = template.split("{}") if isinstance(template, str) else []
        self._behind = parts[1] if len(parts) == 2 else None
        if isinstance(wanted, Mapping):
            self._positions = {
                name: positions_of(name, wanted[name], self._spans) for name in wanted
            }
        elif not self._every:
            self._phrases = phrases(wanted)
        if wanted is not True and not wanted:
            raise ValueError(f"words must name at least one word, got {wanted!r}")
        if self._positions is not None:
            self._names = tuple(self._positions)
            return
        if not self._encoders:
            raise ValueError(
                f"words must come from a text encoder that layout {layout.name!r} names and the "
                f"pipeline has, got a {type(pipe).__name__} and "
                f"{[each.component for each in layout.encoders]}{GIVE}"
            )
        self._names = tuple(self._phrases)
        self._encodings = Encodings(pipe, tuple(self._encoders))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the words, in the order of :meth:`weights`; every word's once a run began."""
        return self._names

    def attach(self) -> Callable[[], None]:
        """Watch how the pipeline encodes its prompts; returns what ends that."""
        return (lambda: None) if self._encodings is None else self._encodings.attach()

    def begin_run(self) -> None:
        """The denoiser is called for the first time: its prompts are encoded.

        Waits for the text encoders.

        Raises:
            ValueError: The prompt of a recorded branch was not encoded inside the block, or in a
                way that is not known; a wanted word does not occur in a prompt or was cut off; or
                two encoders of one span were given different words.
        """
        self._made, self._samples, self._misfits = {}, {}, {}
        if self._encodings is None:
            return
        given = self._encodings.take()
        for place, branch in enumerate(self._branches):
            part = given[branch]
            if part is None or (branch == CONDITIONAL and not part):
                raise ValueError(
                    f"words of the {branch} prompt must be encoded by the pipeline inside the "
                    f"block, in one piece, got other embeddings{GIVE}"
                )
            self._read(branch, part, required=not self._every and place == 0)
        if self._every:
            found = (
                name
                for samples in self._samples.values()
                for sample in samples
                for names in sample.names
                for name in names
                if name not in REST
            )
            first: dict[str, str] = {}
            for name in found:
                first.setdefault(key(name), name)
            self._names = (*first.values(), *REST)

    def weights(
        self,
        span: str,
        length: int,
        rows: int | None = None,
        branch: str = CONDITIONAL,
        row: int | None = None,
    ) -> Tensor:
        """Which tokens of a text span belong to which word.

        Args:
            span: Name of the span.
            length: How many tokens it has.
            rows: Samples of the branch, a multiple of the prompts, each of which is repeated;
                default the prompts themselves.
            branch: Guidance branch, one of those that are recorded.
            row: One sample alone, where samples have texts of different length.

        Returns:
            0 and 1 on the CPU, fp32, ``[rows, words, length]``; ``[1, words, length]`` for one
            prompt, for positions, and for one row; equally many for all spans of a branch. Not to
            be written to.

        Raises:
            ValueError: A position is beyond the span, the span is longer than the encoder's text, a
                wanted word was cut off, or rows are no multiple of the prompts.
        """
        asked = span, length, rows, branch, row
        if asked not in self._made:
            self._made[asked] = self._weights(span, length, rows, branch, row)
        return self._made[asked]

    def _weights(
        self, span: str, length: int, rows: int | None, branch: str, row: int | None
    ) -> Tensor:
        if self._positions is not None:
            return self._at_positions(self._positions, span, length)[None]
        if branch not in self._branches:
            raise ValueError(f"branch must be recorded, {self._branches}, got {branch!r}")
        if span not in self._spans:
            raise ValueError(f"span must be one of {self._spans}, got {span!r}")
        prompts = max((len(s) for (of, _), s in self._samples.items() if of == branch), default=0)
        repeats, left = divmod(prompts if rows is None else rows, max(prompts, 1))
        if left:
            raise ValueError(
                f"rows must be a multiple of the {prompts} prompts of the {branch} branch, got "
                f"{rows}"
            )
        samples = self._samples.get((branch, span), [])
        if row is not None:
            samples, repeats = samples[row // repeats :][:1], 1
        if not samples:
            # zeros instead of a text
            nothing = torch.zeros(1, len(self._names), length)
            nothing[:, -1] = float(self._every)
            return (
                nothing
                if row is not None or prompts < 2
                else nothing.repeat(prompts * repeats, 1, 1)
            )
        found = torch.stack([self._placed(sample, length) for sample in samples])
        return found if prompts == 1 else found.repeat_interleave(repeats, 0)

    def placed(self, span: str, length: int) -> tuple[Tensor, tuple[ValueError | None, ...]]:
        """:meth:`weights` of all prompts for a text that need not be theirs, as that of a negative
        prompt or of another sample, which are shorter or longer.

        Args:
            span: Name of the span.
            length: How many tokens it has.

        Returns:
            ``[prompts, words, length]``, or one for all, and as many times why the text cannot be
            that prompt's; ``None`` where it can. Tokens that it lacks are left out.
        """
        asked = span, length
        if asked not in self._misfits:
            samples, place = self._samples.get((CONDITIONAL, span), []), []
            if self._positions is not None:
                place = [partial(self._at_positions, self._positions, span, length)]
            elif samples:
                place = [partial(self._placed, sample, length) for sample in samples]
            weights, misfits = [], []
            for one in place:
                misfit = None
                try:
                    weights.append(one())
                except ValueError as error:
                    misfit = error.with_traceback(None)
                    weights.append(one(fits=False))
                misfits.append(misfit)
            known = torch.stack(weights) if place else self.weights(span, length)
            self._misfits[asked] = known, tuple(misfits or [None])
        return self._misfits[asked]

    def _at_positions(
        self,
        positions: dict[str, dict[str, list[int]]],
        span: str,
        length: int,
        *,
        fits: bool = True,
    ) -> Tensor:
        weights = torch.zeros(len(positions), length)
        for index, (name, by_span) in enumerate(positions.items()):
            for position in by_span.get(span, ()):
                if position < length:
                    weights[index, position] = 1.0
                elif fits:
                    raise ValueError(
                        f"words[{name!r}] must be positions below {length} in {span!r}, got "
                        f"{position}"
                    )
        return weights

    def _placed(self, sample: _Sample, length: int, *, fits: bool = True) -> Tensor:
        """The tokens of a row where the pipeline puts them."""
        encoder, row, names = sample
        if fits and length > row.length - encoder.dropped:
            raise ValueError(
                f"span {encoder.span!r} must have the tokens that {encoder.component} was given, "
                f"at most {row.length - encoder.dropped}, got {length}{GIVE}"
            )
        # a pipeline that cuts also takes out padding, which may be in front
        cut = encoder.dropped > 0 or length != row.length or not fits
        indices = [i for i, valid in enumerate(row.valid) if valid or not cut][encoder.dropped :]
        number = {key(name): index for index, name in enumerate(self._names)}
        weights = torch.zeros(len(self._names), length)
        for place, index in enumerate(indices):
            for name in names[index]:
                if place < length:
                    weights[number[key(name)], place] = 1.0
                elif fits and not self._every:
                    raise ValueError(_cut_off(name, f"the {length} tokens of {encoder.span!r}"))
        if self._every:
            weights[-1, weights.sum(0) == 0] = 1.0
        return weights

    def _read(self, branch: str, given: Given, *, required: bool) -> None:
        prompts: dict[int, list[tuple[str, str]]] = {}
        found: dict[int, set[str]] = {}
        for encoder in self._encoders:
            samples = []
            for number, row in enumerate(given.get(encoder.component, ())):
                if row.text is None:
                    raise ValueError(
                        f"words must be those of a fast tokenizer's text, but the ids of "
                        f"{encoder.component} were not made by one inside the block{GIVE}"
                    )
                spelling = spell(row, self._behind, encoder.dropped)
                every = self._every
                names = name_all(spelling) if every else name_some(spelling, self._phrases)
                samples.append(_Sample(encoder, row, names))
                prompts.setdefault(number, []).append((encoder.component, spelling.prompt))
                found.setdefault(number, set()).update(*names)
            earlier = self._samples.get((branch, encoder.span)) or samples
            self._samples[branch, encoder.span] = earlier
            if samples and [*map(_keys, earlier)] != [*map(_keys, samples)]:
                raise ValueError(
                    f"words must be the same for all encoders of {encoder.span!r}, whose tokens "
                    f"lie at the same positions, but {earlier[0].encoder.component} and "
                    f"{encoder.component} were given different prompts (prompt_2?)"
                )
        for number, texts in prompts.items() if required else ():
            for name in [name for name in self._phrases if name not in found[number]]:
                for component, text in texts:
                    if contains(text, self._phrases[name]):
                        raise ValueError(_cut_off(name, f"what {component} reads of {text!r}"))
                raise ValueError(
                    f"words must occur in the prompt of every sample, got {name!r} for "
                    f"{texts[0][1]!r}"
                )


def _keys(sample: _Sample) -> list[list[str]]:
    return [[key(name) for name in names] for names in sample.names]


def _cut_off(name: str, where: str) -> str:
    return f"words must lie within {where}, but {name!r} was cut off"
