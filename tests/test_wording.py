"""Numbers and remarks for people."""

import sys

import pytest

from i2am.wording import Footnotes, counted, printable


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a name (1).png", "a name (1).png"),
        ("naïve \N{SNOWMAN} \N{GRINNING FACE} 日本", "naïve \N{SNOWMAN} \N{GRINNING FACE} 日本"),
        (r"C:\new", r"C:\new"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b2J", r"\x9b2J"),
        ("\0\x07\x08\x7f", r"\x00\x07\x08\x7f"),
        ("a\r\n\tb", r"a\r\n\tb"),
        ("a\x85\u2028\u2029b", r"a\x85\u2028\u2029b"),
        ("\u202e\u2066\u200f\ufeff", r"\u202e\u2066\u200f\ufeff"),
        ("\udcff", r"\udcff"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_what_a_terminal_would_obey_is_written_as_escapes(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_no_character_reaches_a_terminal_as_a_command():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = printable(everything)
    assert shown.isprintable()
    assert shown.encode()
