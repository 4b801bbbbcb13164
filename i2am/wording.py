"""How numbers and remarks are told to people."""


def counted(number: int, noun: str) -> str:
    """``"1 step"``, ``"0 steps"``, ``"2 steps"``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
