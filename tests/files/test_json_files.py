"""JSON: one way to write it, and what is refused."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2am.files import FileRejected, canonical, parse_json, read_json, readable_json, require
from i2am.files.json_files import DEPTH

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def same(one, other):
    """Whether values are equal, and of equal types: 1, 1.0 and True are not."""
    return repr(one) == repr(other)


def ordered(value):
    if isinstance(value, dict):
        return {key: ordered(value[key]) for key in sorted(value)}
    return [ordered(item) for item in value] if isinstance(value, list) else value


@given(VALUES)
def test_what_was_written_is_read(value):
    data = canonical(value)
    assert same(parse_json(data, "it"), ordered(value))
    assert canonical(parse_json(data, "it")) == data
    assert data.isascii()
    assert b" " not in re.sub(rb'"(\\.|[^"\\])*"', b"", data)
    assert same(parse_json(readable_json(value), "it"), value)
    assert readable_json(value).isascii()


@given(VALUES, st.randoms())
def test_the_order_of_keys_does_not_matter(value, chance):
    def shuffled(value):
        if isinstance(value, dict):
            keys = [*value]
            chance.shuffle(keys)
            return {key: shuffled(value[key]) for key in keys}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    assert canonical(shuffled(value)) == canonical(value)


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def circular():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize("write", [canonical, readable_json])
@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), float("inf"), [-float("inf")], {1, 2}, b"x", {"a": object()}),
        *(circular(), nested(100_000)),
    ],
    ids=["nan", "inf", "-inf", "set", "bytes", "object", "circular", "deep"],
)
def test_what_is_no_json_value_is_not_written(write, value):
    with pytest.raises(ValueError, match=r"\w"):
        write(value)


def test_keys_of_two_types_have_no_order():
    with pytest.raises(ValueError, match="not supported"):
        canonical({1: 2, "1": 2})


@pytest.mark.parametrize(
    ("data", "message"),
    {
        "nothing": (b"", "Expecting value"),
        "half": (b'{"a": [1, 2', "delimiter"),
        "more": (b"{} {}", "Extra data"),
        "nan": (b"[NaN]", "NaN is no finite number"),
        "infinity": (b'{"a": Infinity}', "Infinity is no finite number"),
        "minus infinity": (b"-Infinity", "-Infinity is no finite number"),
        "large": (b"[1e999]", "1e999 is no finite number"),
        "minus large": (b'{"a": -1.5E+400}', r"-1\.5E\+400 is no finite number"),
        "digits": (b"[" + b"7" * 5000 + b"]", "4300"),
        "twice": (b'{"a": 1, "b": {"c": 1, "c": 1}}', 'the key "c" is there twice'),
        "twice in other letters": (b'{"c": 1, "\\u0063": 2}', 'the key "c" is there twice'),
        "mark": ("\ufeff{}".encode(), "Expecting value"),
        "utf-16": ("{}".encode("utf-16"), "utf-8"),
        "utf-16 without a mark": ('{"a": 1}'.encode("utf-16-le"), ""),
        "utf-32": ("[1]".encode("utf-32"), "utf-8"),
        "latin-1": ('"ä"'.encode("latin-1"), "utf-8"),
        "half a character": (b'"\xed\xa0\x80"', "utf-8"),
        "control character": (b'"a\nb"', "control character"),
        "zeros": (bytes(1000), "Expecting value"),
        "65 deep": (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        "65 deep objects": (b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64 deep"),
        "100000 deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        "100000 deep and open": (b'{"a":[' * 100_000, "nested too deeply"),
        "comment": (b"[1] // one", "Extra data"),
        "comma": (b"[1,]", "Expecting value"),
    }.values(),
    ids=lambda value: None,
)
def test_what_is_refused(tmp_path, data, message):
    with pytest.raises(FileRejected, match=f"^it is damaged: .*{message}") as caught:
        parse_json(data, "it")
    assert len(str(caught.value)) < 200
    (tmp_path / "file.json").write_bytes(data)
    with pytest.raises(FileRejected, match=r"file\.json is damaged: "):
        read_json(tmp_path / "file.json")


def test_64_deep_is_read():
    assert parse_json(b"[" * DEPTH + b"]" * DEPTH, "it") == parse_json("[" * 64 + "]" * 64, "it")
    wide = json.dumps([[{}] * 1000] * 100)
    assert len(parse_json(wide, "it")) == 100


def test_half_of_a_pair_of_surrogates_comes_back():
    # names of files may hold them: they stand for bytes that are no UTF-8
    assert parse_json(canonical("a\udcff\ud800"), "it") == "a\udcff\ud800"


KINDS = {
    bool: ([True, False], [0, 1, "true", None, [], {}], "true or false"),
    int: ([0, -1, 10**40], [True, False, 1.0, "1", None, [1], {}], "an integer"),
    float: ([0, 1, 1.5, -2.5e-300], [True, "1", None, [], {}, 10**400], "a finite number"),
    str: (["", "a"], [1, None, True, ["a"], {}], "a string"),
    list: ([[], [1]], [{}, "ab", None, 1, True], "a list"),
    dict: ([{}, {"a": 1}], [[], "ab", None, 1, True], "an object"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_require(kind):
    good, bad, name = KINDS[kind]
    for value in good:
        require({"a": {"b": value}, "c": value}, "it", {"a.b": kind, "c": kind})
    for value in bad:
        with pytest.raises(FileRejected) as caught:
            require({"a": {"b": value}}, "it", {"a.b": kind})
        said, got = str(caught.value).split(", got ")
        assert said == f"it is damaged: a.b must be {name}"
        assert len(got) <= 40
        assert json.dumps(value).startswith(got.removesuffix("..."))


@pytest.mark.parametrize("document", [{}, {"a": {}}, {"a": []}, {"a": "b"}, [], "a.b", None, 1])
def test_require_names_what_is_missing(document):
    with pytest.raises(FileRejected, match=r"^it is damaged: it has no a\.b$"):
        require(document, "it", {"a.b": int})
