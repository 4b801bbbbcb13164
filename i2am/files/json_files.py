"""JSON with one way to write it, and bounds on what is read."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from i2am.files.regular import FileRejected, read_bytes

DEPTH = 64
"""The most lists and objects inside of each other."""

LIMIT = 64 * 2**20
"""The most bytes of a file, where nothing else is said."""

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def canonical(document: Any) -> bytes:
    """ASCII JSON without spaces, with sorted keys: equal values give equal bytes.

    Raises:
        ValueError: It holds NaN, infinity or something that is no JSON value.
    """
    return _dumped(document, sort_keys=True, separators=(",", ":")).encode("ascii")


def readable_json(document: Any) -> bytes:
    """ASCII JSON in lines, with a newline at the end; raises as `canonical`."""
    # ASCII also where a path is no UTF-8
    return _dumped(document, indent=2).encode("ascii") + b"\n"


def read_json(path: str | Path, *, what: str | None = None, limit: int = LIMIT) -> Any:
    """The value in a file of JSON.

    Args:
        path: A regular file.
        what: What to call it in messages; None takes the path.
        limit: The most bytes that it may have.

    Raises:
        FileRejected: It is no regular file, is larger, or is no JSON as `parse_json` takes it.
        OSError: It is missing, or cannot be read.
    """
    what = str(path) if what is None else what
    return parse_json(read_bytes(path, what=what, limit=limit), what)


def parse_json(data: bytes | str, what: str) -> Any:
    """The value of a JSON text: UTF-8, at most `DEPTH` deep, no NaN or infinity, no key twice.

    Args:
        data: The text.
        what: What to call it in messages.

    Raises:
        FileRejected: It is something else.
    """
    try:
        # strictly UTF-8: json itself would also take UTF-16 and halves of characters
        value = _DECODER.decode(data if isinstance(data, str) else data.decode())
    except RecursionError:
        raise FileRejected(f"{what} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise FileRejected(f"{what} is damaged: {error}") from error
    level: list[Any] = [[value]]
    for _ in range(DEPTH + 1):
        inner = (holder.values() if isinstance(holder, dict) else holder for holder in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return value
    raise FileRejected(f"{what} is damaged: it is nested more than {DEPTH} deep")


def require(document: Any, what: str, fields: Mapping[str, type | list[type]]) -> None:
    """Refuse a document without certain fields.

    Args:
        document: What `read_json` returned.
        what: What to call it in messages.
        fields: bool, int, float (which takes integers too), str, list or dict, or ``[str]`` and
            the like for a list of them, by the path of the field, for example
            ``{"settings.steps": int}``.

    Raises:
        FileRejected: A field is missing or of another kind; the sentence names it.
    """
    for path, kind in fields.items():
        value = document
        for name in path.split("."):
            if not isinstance(value, dict) or name not in value:
                raise FileRejected(f"{what} is damaged: it has no {path}")
            value = value[name]
        values = [(path, value, list if isinstance(kind, list) else kind)]
        if isinstance(kind, list) and isinstance(value, list):
            values = [(f"{path}[{index}]", each, kind[0]) for index, each in enumerate(value)]
        for name, each, wanted in values:
            if not _is(each, wanted):
                raise FileRejected(
                    f"{what} is damaged: {name} must be {_KINDS[wanted]}, got {_shortened(each)}"
                )


def _is(value: Any, kind: type) -> bool:
    # true is an integer in Python, and an integer may be too large for a float
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and _is_finite(value)
    return isinstance(value, kind)


def _dumped(document: Any, **style: Any) -> str:
    try:
        return json.dumps(document, allow_nan=False, **style)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _finite(text: str) -> float:
    # of the constants NaN, Infinity and -Infinity, and of numbers such as 1e999
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {_shortened(twice)} is there twice")
    return value


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite, object_pairs_hook=_object)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
