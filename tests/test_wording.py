"""Numbers and remarks for people."""

import pytest

from i2am.wording import Footnotes, counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 time groups"), (1, "1 time group"), (2, "2 time groups")]
)
def test_only_one_is_singular(number, said):
    assert counted(number, "time group") == said


def test_a_footnote_is_told_once():
    footnotes = Footnotes()
    assert footnotes.lines == []
    assert [footnotes.mark(said) for said in ("a", "b", "a", "c", "b")] == [
        *("[1]", "[2]", "[1]", "[3]", "[2]")
    ]
    assert footnotes.lines == ["[1] a", "[2] b", "[3] c"]
