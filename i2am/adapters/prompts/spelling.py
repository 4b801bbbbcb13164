"""The words of a prompt, and which tokens of a text encoder spell them.

A word is a run of letters, marks and digits, with hyphens, apostrophes and decimal points inside;
in scripts without spaces (Chinese, Japanese, Thai and their like) it is a single character.
"""

import operator
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from i2am.adapters.prompts.encodings import Row, Text

PUNCTUATION, SPECIAL, PADDING = "<punctuation>", "<special>", "<padding>"
REST = (PUNCTUATION, SPECIAL, PADDING)
"""Tokens that spell no word: marks and spaces of the prompt; what a tokenizer or a template adds
(BOS, EOS, roles of a chat, pictures); and what fills the text up, tokens of zeros included."""

_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# over the kinds of characters
_WORD = re.compile(r"c|[wd]+(?:-[wd]+|(?<=d)\.d[wd]*)*")

Phrase = tuple[str, ...]
"""The keys of consecutive words."""


class Spelling(NamedTuple):
    """The words of a row and the tokens that spell them."""

    prompt: str
    """What the user wrote, before anything was cut off."""
    words: list[tuple[int, int]]
    """Characters ``(start, stop)`` of the words that the encoder saw."""
    tokens: list[list[int]]
    """Which words each token spells."""
    rest: list[str]
    """What a token is that spells none."""
    text: str


def key(word: str) -> str:
    """What two spellings of a word have in common."""
    return unicodedata.normalize("NFC", word).casefold().replace("\u2019", "'")


def phrase(text: str) -> Phrase:
    """The words of a text, as they are compared."""
    return tuple(key(text[start:stop]) for start, stop in words_in(text))


def words_in(text: str, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
    """Characters ``(start, stop)`` of the words in a part of a text."""
    kinds = "".join(map(_kind, text[start:stop]))
    return [(start + found.start(), start + found.end()) for found in _WORD.finditer(kinds)]


def _kind(character: str) -> str:
    if _UNSPACED.match(character):
        return "c"
    if character in "-'\u2019":
        return "-"
    if character == ".":
        return character
    category = unicodedata.category(character)
    if category == "Nd":
        return "d"
    return "w" if category[0] in "LMN" or character == "_" else " "


def spell(row: Row, behind: str | None, dropped: int) -> Spelling:
    """Read the words of a row.

    Args:
        row: Whose text is known.
        behind: What the pipeline's template writes behind a prompt, ``None`` if unknown.
        dropped: Tokens of the template that the pipeline cuts off.

    Raises:
        ValueError: The prompt cannot be told from the template around it.
    """
    text = row.text
    assert text is not None
    start, stop = _prompt(text, row.prompts, behind, dropped)
    own = [not added for added in text.added]
    seen = [one for one, is_own in zip(text.offsets, own, strict=True) if is_own]
    first = max(start, min((one[0] for one in seen), default=stop))
    last = min(stop, max((one[1] for one in seen), default=start))
    words = words_in(text.text, first, last) if first < last else []
    word_of: dict[int, int] = {}
    for index, (begin, end) in enumerate(words):
        word_of |= dict.fromkeys(range(begin, end), index)
    tokens, rest = [], []
    for index, (begin, end) in enumerate(text.offsets):
        inside = own[index] and not text.special[index] and start < end and begin < stop
        found = {word_of[c] for c in range(begin, end) if c in word_of} if inside else set()
        tokens.append(sorted(found))
        kind = PUNCTUATION if inside else SPECIAL
        rest.append(PADDING if text.padding[index] else kind)
    return Spelling(text.text[start:stop], words, tokens, rest, text.text)


def _prompt(
    text: Text, prompts: Iterable[str], behind: str | None, dropped: int
) -> tuple[int, int]:
    """Which part of a text the user wrote."""
    written = {
        start for (start, _), is_one in zip(text.offsets, text.special, strict=True) if is_one
    }
    if not written and not dropped:
        return 0, len(text.text)
    sought = [prompt.strip() for prompt in prompts]
    if "" in sought:
        return 0, 0
    found = set()
    for prompt in sought:
        if behind is not None and text.text.endswith(prompt + behind):
            stop = len(text.text) - len(behind)
            return stop - len(prompt), stop
        found |= {(one.start(), one.end()) for one in re.finditer(re.escape(prompt), text.text)}
    # a template goes on with a special token
    following = {
        (start, stop)
        for start, stop in found
        if len(text.text) - len(text.text[stop:].lstrip()) in written
    }
    found = following or found
    if len(found) != 1:
        raise ValueError(
            f"words of a prompt must be told from the template around it, but {sought} occurs "
            f"{len(found)} times in {text.text[-200:]!r}; give token positions, words={{'shirt': "
            "[3, 4]}"
        )
    return found.pop()


def name_all(spelling: Spelling) -> list[tuple[str, ...]]:
    """The one word that each token spells, or what else it is.

    Words that share a token are one.
    """
    first = [*range(len(spelling.words))]
    for words in spelling.tokens:
        for word in words[1:]:
            first[word] = first[word - 1]
    last = {one: index for index, one in enumerate(first)}
    names: list[tuple[str, ...]] = []
    for words, rest in zip(spelling.tokens, spelling.rest, strict=True):
        if not words:
            names.append((rest,))
            continue
        one = first[words[0]]
        start, stop = spelling.words[one][0], spelling.words[last[one]][1]
        names.append((spelling.text[start:stop],))
    return names


def name_some(spelling: Spelling, wanted: Mapping[str, Phrase]) -> list[tuple[str, ...]]:
    """Which of the wanted words and phrases each token spells a part of."""
    keys = [key(spelling.text[start:stop]) for start, stop in spelling.words]
    found = {name: _within(one, keys) for name, one in wanted.items()}
    return [
        tuple(name for name, words in found.items() if not words.isdisjoint(token))
        for token in spelling.tokens
    ]


def contains(text: str, wanted: Phrase) -> bool:
    """Whether a text has consecutive words."""
    return bool(_within(wanted, phrase(text)))


def _within(wanted: Phrase, keys: list[str] | Phrase) -> set[int]:
    """The words of all occurrences."""
    size = len(wanted)
    starts = (at for at in range(len(keys) - size + 1) if tuple(keys[at : at + size]) == wanted)
    return {at + offset for at in starts for offset in range(size)}


def phrases(wanted: Any) -> dict[str, Phrase]:
    """The words and phrases that a user asked for.

    Raises:
        TypeError: They are no words.
        ValueError: One has no letters, or two are the same.
    """
    names = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "words must be True, words or phrases, or token positions of each, got "
            f"{type(wanted).__name__}"
        )
    found = {name: phrase(name) for name in names}
    for name, one in found.items():
        if not one:
            raise ValueError(f"words must have letters or digits, got {name!r}")
    if len({*found.values()}) < len(names):
        raise ValueError(f"words must differ by more than case, got {[*names]}")
    return found


def positions_of(name: str, given: Any, spans: list[str]) -> dict[str, list[int]]:
    """The token positions of a word by text span.

    Raises:
        TypeError: They are no numbers.
        ValueError: There are none, one is below 0, or their span is not known.
    """
    if not isinstance(given, Mapping):
        if len(spans) > 1:
            raise ValueError(
                f"words[{name!r}] must give positions by span, {{{spans[0]!r}: [3, 4]}}, where "
                f"there are {spans}, got {given!r}"
            )
        given = {spans[0]: given}
    found = {}
    for span, positions in given.items():
        if span not in spans:
            raise ValueError(f"words[{name!r}] must name spans of {spans}, got {span!r}")
        try:
            found[span] = [operator.index(position) for position in positions]
        except TypeError:
            raise TypeError(f"words[{name!r}] must be token positions, got {positions!r}") from None
        if not found[span] or min(found[span]) < 0:
            raise ValueError(
                f"words[{name!r}] must be token positions of at least 0, got {positions!r}"
            )
    return found
