"""Lists of pairs: what is accepted, and every wrong line named."""

import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from i2am.data.vitonhd_pairs import DataRejected, Pair, Problem, read_pairs

GOOD = b"a_00.jpg b_00.jpg\nc_00.jpg d_00.jpg\n"


def read(folder, content, setting="unpaired"):
    path = folder / "test_pairs.txt"
    path.write_bytes(content)
    return read_pairs(path, setting)


def facts(pairs):
    return [(pair.id, pair.person, pair.garment, pair.line) for pair in pairs]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        pytest.param(GOOD, (1, 2), id="plain"),
        pytest.param(b"\xef\xbb\xbf" + GOOD, (1, 2), id="byte-order-mark"),
        pytest.param(GOOD.replace(b"\n", b"\r\n"), (1, 2), id="crlf"),
        pytest.param(GOOD.replace(b"\n", b"\r"), (1, 2), id="cr"),
        pytest.param(GOOD.replace(b"\n", b"\n\n \t\n"), (1, 4), id="blank-lines"),
        pytest.param(GOOD.replace(b" ", b"\t"), (1, 2), id="tabs"),
        pytest.param(GOOD.replace(b"\n", b"  \t\n").replace(b" ", b"   "), (1, 2), id="spaces"),
        pytest.param(b" " + GOOD, (1, 2), id="leading-space"),
        pytest.param(GOOD[:-1], (1, 2), id="no-newline-at-the-end"),
        pytest.param(GOOD.replace(b".jpg", b""), (1, 2), id="no-endings"),
        pytest.param(GOOD.replace(b".jpg", b".PNG"), (1, 2), id="other-endings"),
    ],
)
def test_accepted(tmp_path, content, lines):
    pairs, problems = read(tmp_path, content)
    assert problems == []
    assert facts(pairs) == [
        ("a_00_b_00", "a_00", "b_00", lines[0]),
        ("c_00_d_00", "c_00", "d_00", lines[1]),
    ]
    pairs, problems = read(tmp_path, content, "paired")
    assert problems == []
    assert facts(pairs) == [("a_00", "a_00", "a_00", lines[0]), ("c_00", "c_00", "c_00", lines[1])]


def test_names_are_kept_as_they_are_listed(tmp_path):
    ((pair,), _) = read(tmp_path, b"a.v2.png caf\xc3\xa9.JPEG")
    assert pair == Pair("a.v2_café", "a.v2", "café", 1, "a.v2.png", "café.JPEG")
    ((pair,), _) = read(tmp_path, b"a.v2 b.tar", "paired")
    assert pair == Pair("a.v2", "a.v2", "a.v2", 1, "a.v2", "a.v2")


BARE = r"must be two bare file names, without folders"


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        pytest.param(b"a.jpg", "columns", r"must be two file names, .* got 1: 'a.jpg'", id="one"),
        pytest.param(b"a b c", "columns", r"must be two file names, .* got 3: 'a b c'", id="three"),
        pytest.param(b"../../etc/passwd a.jpg", "name", BARE, id="dots"),
        pytest.param(b"a.jpg /etc/passwd", "name", BARE, id="absolute"),
        pytest.param(b"a.jpg a/../../x", "name", BARE, id="inside-after-all"),
        pytest.param(b"image/a.jpg a.jpg", "name", BARE, id="folder"),
        pytest.param(b"..\\a.jpg a.jpg", "name", BARE, id="backslash"),
        pytest.param(b"C:\\a.jpg a.jpg", "name", BARE, id="windows"),
        pytest.param(b"C:a.jpg a.jpg", "name", BARE, id="drive"),
        pytest.param(b"a.jpg .", "name", BARE, id="dot"),
        pytest.param(b".. a.jpg", "name", BARE, id="dotdot"),
        pytest.param(b".a.jpg b.jpg", "name", BARE, id="hidden"),
        pytest.param(b"a\x00.jpg b.jpg", "name", BARE + r".*'a\\x00.jpg'", id="nul"),
        pytest.param(b"a.jpg b\x1b[2J.jpg", "name", BARE, id="escape"),
        pytest.param(
            b"a.jpg caf\xe9.jpg", "encoding", r"must be UTF-8, byte 10 is not", id="latin"
        ),
        pytest.param(b"x.jpg b.jpg", "duplicate", r"repeats line 1, a pair of 'x' and 'b'", id="2"),
        pytest.param(b"x.png b", "duplicate", r"repeats line 1, a pair of 'x' and 'b'", id="stems"),
    ],
)
def test_refused_with_its_line(tmp_path, line, code, message):
    pairs, problems = read(tmp_path, b"x.jpg b.jpg\n\n" + line + b"\ny.jpg b.jpg\n")
    assert [pair.person for pair in pairs] == ["x", "y"]
    (problem,) = problems
    assert (problem.file, problem.line, problem.code) == ("test_pairs.txt", 3, code)
    with pytest.raises(DataRejected, match=rf"^line 3 of \S*test_pairs\.txt {message}"):
        raise DataRejected(problems)
    assert "\n" not in problem.message
    assert "\x1b" not in problem.message


def test_a_person_counts_once_when_paired(tmp_path):
    content = b"a.jpg b.jpg\na.jpg c.jpg\n"
    assert len(read(tmp_path, content)[0]) == 2
    pairs, (problem,) = read(tmp_path, content, "paired")
    assert len(pairs) == 1
    assert problem.message.endswith("repeats line 1, a pair of 'a' and its own garment")


def test_two_pairs_of_one_id(tmp_path):
    _, (problem,) = read(tmp_path, b"a_b.jpg c.jpg\na.jpg b_c.jpg\n")
    assert (problem.line, problem.code) == (2, "duplicate")
    assert problem.message.endswith("repeats line 1, as both would be called 'a_b_c'")


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t", b"\xef\xbb\xbf"])
def test_an_empty_list(tmp_path, content):
    pairs, (problem,) = read(tmp_path, content)
    assert pairs == []
    assert (problem.line, problem.code) == (None, "empty")
    assert problem.message.endswith("must list at least one pair, it is empty")


def test_utf_16_is_not_utf_8(tmp_path):
    _, problems = read(tmp_path, GOOD.decode().encode("utf-16"))
    assert problems[0].code == "encoding"
    assert problems[0].line == 1


def test_no_list(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pairs\.txt is missing: a VITON-HD folder lists"):
        read_pairs(tmp_path / "test_pairs.txt", "paired")


def test_long_names_make_ids_that_fit_and_differ(tmp_path):
    long = "é" * 120
    content = f"{long}.jpg {long}1.jpg\n{long}.jpg {long}2.jpg\n".encode()
    pairs, problems = read(tmp_path, content)
    assert problems == []
    one, other = (pair.id for pair in pairs)
    assert one != other
    assert one.startswith("é" * 90)
    for pair in pairs:
        assert len(pair.id.encode()) <= 200
        (tmp_path / f"{pair.id}.png").touch()
    assert read(tmp_path, content)[0] == pairs


# lines of the kinds of bytes that matter, and any bytes at all
PIECES = st.sampled_from(
    [b"a.jpg", b"b", b" ", b"\t", b"\n", b"\r", b"..", b"/", b"\\", b"\0", b"\xe9", b"\xc3\xa9"]
)
CONTENTS = st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=16).map(b"".join))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENTS, setting=st.sampled_from(["paired", "unpaired"]))
def test_any_bytes_give_bare_names_or_problems(tmp_path, content, setting):
    pairs, problems = read(tmp_path, content, setting)
    assert pairs or problems
    ids = [pair.id for pair in pairs]
    assert len(set(ids)) == len(ids)
    for name in (name for pair in pairs for name in (pair.id, pair.person_file, pair.garment_file)):
        assert (tmp_path / name).resolve().parent == tmp_path.resolve()
        assert (tmp_path / name).name == name
    lines = [found.line for found in (*pairs, *problems) if found.line is not None]
    assert len(set(lines)) == len(lines)
    assert len(lines) == sum(
        bool(line.strip(b" \t")) for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()
    )


def test_the_message_has_the_first_problems_and_their_number():
    problems = [Problem("x", line, "missing", f"{line} is wrong") for line in range(1, 18)]
    assert str(problems[0]) == str(DataRejected(problems[:1])) == "1 is wrong"
    assert str(DataRejected(problems[:2])) == "1 is wrong; 2 is wrong"
    error = DataRejected(problems)
    assert isinstance(error, ValueError)
    assert str(error) == (
        "1 is wrong; 2 is wrong; 3 is wrong; 4 is wrong; 5 is wrong; "
        "and 12 more, 17 problems in all"
    )
    assert error.problems == tuple(problems)
    again = pickle.loads(pickle.dumps(error))
    assert again.problems == error.problems
    assert str(again) == str(error)
