"""What the text encoders of a pipeline were given: token ids, and the texts they were made of.

Tokenizers, text encoders, ``encode_prompt`` and ``check_inputs`` of a pipeline are watched. What
installed pipelines (diffusers 0.42) do, and what is made of it:

* Where ``encode_prompt`` takes a ``negative_prompt`` (Stable Diffusion, SDXL, SD3, Wan, Z-Image,
  Chroma), it is called once, and each encoder encodes the prompt, then the negative prompt; or both
  in one batch, the negative prompt first (PRX). SDXL may encode no negative prompt: zeros stand
  for it. InstructPix2Pix has ``_encode_prompt`` instead.
* Elsewhere (FLUX, FLUX.2, Qwen-Image, HunyuanVideo) it is called for the prompt, then again for
  the negative prompt.
* Embeddings that are given to it are looked up by value among those it made before.
"""

import contextlib
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2am.adapters.hooks import around_calls
from i2am.adapters.prompts.tokenizer_hooks import around, listen
from i2am.layouts.token_layout import CONDITIONAL, UNCONDITIONAL, Encoder


class Text(NamedTuple):
    """A text as a tokenizer cut it."""

    text: str
    offsets: list[tuple[int, int]]
    """Characters ``(start, stop)`` of each token."""
    added: list[bool]
    """Tokens that the tokenizer added: BOS, EOS, padding."""
    padding: list[bool]
    special: list[bool]
    """Special tokens that are written in the text, as templates do."""


class Row(NamedTuple):
    """One row of an encoder's call."""

    length: int
    text: Text | None
    """``None`` for ids that its tokenizer did not make inside the block."""
    valid: list[bool]
    """Tokens that are no padding."""
    prompts: tuple[str, ...] = ()
    """What the user may have written, before templates; empty where the pipeline does not tell."""


Given = dict[str, list[Row]]
"""What each encoder was given, by component; one that is missing was given nothing."""


@dataclass
class _Call:
    """A call of an encoder, kept on its device until a run begins."""

    ids: Tensor | None
    mask: Tensor | None

    def read(self, texts: dict[tuple[int, ...], Text]) -> list[Row]:
        if self.ids is None:
            return [Row(0, None, [])]
        mask = self.mask if self.mask is not None else torch.ones(())
        masks = mask.bool().tolist() if mask.shape == self.ids.shape else None
        rows = []
        for index, ids in enumerate(self.ids.tolist()):
            text = texts.get(tuple(ids))
            valid = [] if text is None else [not pad for pad in text.padding]
            rows.append(Row(len(ids), text, valid if masks is None else masks[index]))
        return rows


@dataclass
class _Encode:
    """A call of ``encode_prompt``."""

    arguments: dict[str, Any]
    negative: bool
    """Whether it also encodes the negative prompt."""
    run: int
    calls: dict[str, list[_Call]] = field(default_factory=dict)
    rows: dict[str, list[list[Row]]] = field(default_factory=dict)
    result: Any = None
    branches: dict[str, Given | None] = field(default_factory=dict)

    def given(self, branch: str) -> Any:
        """The embeddings that it was given instead of a prompt."""
        start = "negative_prompt_embeds" if branch == UNCONDITIONAL else "prompt_embeds"
        found = (value for name, value in self.arguments.items() if name.startswith(start))
        return next((value for value in found if value is not None), None)

    def prompts(self, branch: str, row: int) -> tuple[str, ...]:
        """What the user may have written for a row."""
        start = "negative_prompt" if self.negative and branch == UNCONDITIONAL else "prompt"
        found = []
        for name in (start, f"{start}_2", f"{start}_3"):
            value = self.arguments.get(name)
            if value is None and name == start and start in self.arguments:
                value = ""
            if isinstance(value, list | tuple):
                value = value[row] if row < len(value) else None
            if isinstance(value, str) and value not in found:
                found.append(value)
        return tuple(found)

    @property
    def samples(self) -> int:
        """How many prompts it was given, 0 if unknown."""
        prompt = self.arguments.get("prompt")
        return len(prompt) if isinstance(prompt, list | tuple) else int(isinstance(prompt, str))


class Encodings:
    """Watches what the text encoders of a pipeline are given, run by run.

    Args:
        pipe: The pipeline.
        encoders: Which of its encoders.
    """

    def __init__(self, pipe: Any, encoders: tuple[Encoder, ...]) -> None:
        self._pipe = pipe
        self._encoders = [e for e in encoders if getattr(pipe, e.component, None) is not None]
        self._method = next(
            (name for name in ("encode_prompt", "_encode_prompt") if hasattr(pipe, name)), None
        )
        method = None if self._method is None else getattr(pipe, self._method)
        self._signature = inspect.signature(method) if method is not None else inspect.Signature()
        self._forget()

    def _forget(self) -> None:
        self._texts: dict[str, dict[tuple[int, ...], Text]] = {}
        self._fresh: list[_Encode] = []
        self._open: _Encode | None = None
        self._history: deque[_Encode] = deque(maxlen=8)
        self._runs = 0

    def attach(self) -> Callable[[], None]:
        """Watch; returns what ends that and puts everything back."""
        with contextlib.ExitStack() as stack:
            if self._method is not None:
                stack.callback(around(self._pipe, self._method, self._encode))
            if hasattr(self._pipe, "check_inputs"):
                stack.callback(around(self._pipe, "check_inputs", self._begin))
            for each in self._encoders:
                note = functools.partial(self._call, each.component)
                module = getattr(self._pipe, each.component)
                stack.callback(around_calls(module, note, lambda: None))
                for tokenizer in _tokenizers(self._pipe, each):
                    stack.callback(listen(tokenizer, functools.partial(self._note, each.component)))
            stack.callback(self._forget)
            return stack.pop_all().close
        raise AssertionError("an exit stack suppresses nothing")

    def take(self) -> dict[str, Given | None]:
        """What was encoded for the run that begins, by guidance branch.

        Waits for the encoders' device. ``None`` where that is unknown: embeddings were made outside
        of the block, changed, or made in several pieces.
        """
        fresh, self._fresh = self._fresh, []
        for one in fresh:
            for name, calls in one.calls.items():
                one.rows[name] = [call.read(self._texts.get(name, {})) for call in calls]
            one.branches = self._branches(one)
            self._history.append(one)
        self._texts = {}
        run = [one for one in fresh if one.run == self._runs]
        if self._runs:
            # prompts that the pipeline encodes itself cannot be given again
            for one in run:
                one.result = None
        if not any(one.negative for one in run):
            if len(run) not in (1, 2):
                return dict.fromkeys((CONDITIONAL, UNCONDITIONAL))
            later = run[1].branches[CONDITIONAL] if len(run) == 2 else {}
            return {CONDITIONAL: run[0].branches[CONDITIONAL], UNCONDITIONAL: later}
        merged: dict[str, Given | None] = {CONDITIONAL: {}, UNCONDITIONAL: {}}
        for one in run if self._runs else run[-1:]:
            for branch, known in merged.items():
                part = one.branches.get(branch)
                if known is None or part is None or known.keys() & part.keys():
                    merged[branch] = None
                else:
                    merged[branch] = known | part
        return merged

    def _branches(self, one: _Encode) -> dict[str, Given | None]:
        found: dict[str, Given | None] = {}
        if self._method is not None and "prompt" not in self._signature.parameters:
            # wrapped by somebody
            return dict.fromkeys((CONDITIONAL, UNCONDITIONAL))
        encoded = []
        for branch in (CONDITIONAL, UNCONDITIONAL) if one.negative else (CONDITIONAL,):
            embeddings = one.given(branch)
            if embeddings is None:
                encoded.append(branch)
                found[branch] = {}
            else:
                found[branch] = self._made(embeddings)
        for name, batches in one.rows.items():
            if len(batches) == 1 and len(encoded) == 2 and len(batches[0]) == 2 * one.samples > 0:
                batches = [batches[0][one.samples :], batches[0][: one.samples]]
            if len(batches) > len(encoded):
                found |= dict.fromkeys(encoded)
            for branch, rows in zip(encoded, batches, strict=False):
                part = found[branch]
                if part is not None:
                    part[name] = [
                        row._replace(prompts=one.prompts(branch, index))
                        for index, row in enumerate(rows)
                    ]
        return found

    def _made(self, embeddings: Any) -> Given | None:
        """Of which texts embeddings were made before."""
        for one in reversed(self._history):
            results = one.result if isinstance(one.result, tuple) else (one.result,)
            for place, result in enumerate(results):
                if _same(result, embeddings):
                    negative = one.negative and place > 0
                    return one.branches.get(UNCONDITIONAL if negative else CONDITIONAL)
        return None

    @contextlib.contextmanager
    def _begin(self, *_: Any, **__: Any) -> Iterator[Callable[[Any], None]]:
        self._runs += 1
        yield lambda result: None

    @contextlib.contextmanager
    def _encode(self, *args: Any, **kwargs: Any) -> Iterator[Callable[[Any], None]]:
        arguments: dict[str, Any] = {}
        with contextlib.suppress(TypeError):
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
        for name, value in arguments.items():
            # Z-Image writes its template into the list
            arguments[name] = [*value] if isinstance(value, list) else value
        self._open = _Encode(arguments, "negative_prompt" in self._signature.parameters, self._runs)
        self._fresh.append(self._open)
        try:
            yield functools.partial(setattr, self._open, "result")
        finally:
            self._open = None

    def _call(self, component: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        call = _Call(*(x.detach().clone() if isinstance(x, Tensor) else None for x in (ids, mask)))
        if self._open is not None:
            self._open.calls.setdefault(component, []).append(call)
        elif self._method is None:
            # in the order prompt, negative prompt
            if not self._fresh or self._fresh[-1].run != self._runs:
                self._fresh.append(_Encode({}, negative=True, run=self._runs))
            self._fresh[-1].calls.setdefault(component, []).append(call)

    def _note(self, component: str, tokenizer: Any, text: Any, result: Any) -> None:
        texts = [text] if isinstance(text, str) else text
        encodings = getattr(result, "encodings", None)
        if not encodings or not isinstance(texts, list | tuple) or len(texts) != len(encodings):
            return
        special = {
            number: one.content
            for number, one in tokenizer.added_tokens_decoder.items()
            if one.special
        }
        known = self._texts.setdefault(component, {})
        for one, encoding in zip(texts, encodings, strict=True):
            if isinstance(one, str):
                known[tuple(encoding.ids)] = Text(
                    one,
                    encoding.offsets,
                    [bool(added) for added in encoding.special_tokens_mask],
                    [not seen for seen in encoding.attention_mask],
                    # an unknown word has a special id too
                    [
                        special.get(number) == one[start:stop].strip()
                        for number, (start, stop) in zip(
                            encoding.ids, encoding.offsets, strict=True
                        )
                    ],
                )


def _tokenizers(pipe: Any, encoder: Encoder) -> list[Any]:
    """The tokenizers that make an encoder's ids; that of a processor is one of its own."""
    found: list[Any] = []
    for name in (encoder.tokenizer, "processor"):
        part = getattr(pipe, name, None)
        part = getattr(part, "tokenizer", part)
        if hasattr(part, "added_tokens_decoder") and all(part is not one for one in found):
            found.append(part)
    return found


def _same(made: Any, given: Any) -> bool:
    if isinstance(made, list) and isinstance(given, list):
        return len(made) == len(given) and all(map(_same, made, given))
    if not isinstance(made, Tensor) or not isinstance(given, Tensor) or made.shape != given.shape:
        return False
    return made is given or torch.equal(made, given.to(made.device, made.dtype))
