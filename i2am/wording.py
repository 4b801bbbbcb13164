"""How numbers, names and remarks are told to people."""

from collections.abc import Iterator
from contextlib import contextmanager


def counted(number: int, noun: str) -> str:
    """``"1 step"``, ``"0 steps"``, ``"2 steps"``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """The text with what a terminal would obey, or could not show, as escapes: ``\\x1b``, ``\\n``.

    Names come from files that others made: with control characters they would move the cursor or
    feign other lines, with bidirectional ones turn the text around, and the half of a surrogate,
    which stands for a byte that is no UTF-8, cannot be written at all.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


class Footnotes:
    """Sentences that stand below a text once, however often the text refers to them."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, sentence: str) -> str:
        """``"[1]"``: what stands in the text; the same for the same sentence."""
        return f"[{self._numbers.setdefault(sentence, len(self._numbers) + 1)}]"

    @property
    def lines(self) -> list[str]:
        """``"[1] sentence"``, one line for each sentence that was marked."""
        return [f"[{number}] {sentence}" for sentence, number in self._numbers.items()]


@contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Turns what libraries raise over bad files into one ValueError that begins with `what`.

    The disk's own faults (an OSError with an errno) and a lack of memory stay what they are.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        # they raise what they like: TypeError, KeyError, OSError without errno, classes of a hub
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{what}: {type(error).__name__} {reason}") from error
