"""Samples as HTML: one self-contained page, or the files of a folder."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from i2am.plots import heat
from i2am.viewer.content import Sample

# in the order in which they are run, one after the other, in one scope
_SCRIPTS = (
    *("decode.js", "draw.js", "samples.js", "view.js", "ask.js", "score.js", "point.js"),
    *("controls.js", "links.js", "export.js", "list.js", "app.js"),
)


def render(samples: Sequence[Sample], *, title: str = "i2am", compress: bool = True) -> str:
    """One page that holds everything it needs and asks nobody for anything.

    Args:
        samples: At least one; their ids differ.
        title: Name of the page.
        compress: Whether maps are deflated; pages without are larger and open in browsers from
            before 2023 too.

    Returns:
        The HTML document.

    Raises:
        ValueError: There is no sample, or two have the same id.
    """
    check_ids(samples)
    documents = [sample.document(compress=compress) for sample in samples]
    blocks = "".join(
        f'<script type="application/json" class="sample">{as_json(document)}</script>\n'
        for document in documents
    )
    return shell(title, {"samples": [{"id": sample.id} for sample in samples]}, blocks)


def shell(title: str, index: Mapping[str, Any], blocks: str = "", *, folder: bool = False) -> str:
    """The page around its data.

    Args:
        title: Any text.
        index: JSON values: what there is to choose from.
        blocks: HTML that holds the data, if it is in the page.
        folder: Whether samples and thumbnails are files beside the page.

    Returns:
        The HTML document.
    """
    style, script = _text("page.css"), "\n".join(map(_text, _SCRIPTS))
    script = f'(() => {{\n"use strict";\n{script}\n}})();'
    beside = " file: 'self'" if folder else ""
    policy = (
        f"default-src 'none'; img-src data: blob:{beside}; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'{beside}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": as_text(title),
        "style": style,
        "index": as_json({**index, "title": title, "folder": folder, "colors": _colors()}),
        "data": blocks,
        "script": script,
    }
    # in one pass, so that nothing in the data is taken for a place
    return re.sub(r"<!--(\w+)-->", lambda found: parts[found[1]], _text("page.html"))


def frame(page: str, *, height: int = 880) -> str:
    """A page inside another, a notebook say: it can reach nothing outside its frame.

    Args:
        page: A document of :func:`render`.
        height: Of the frame, in pixels; it is as wide as there is room.

    Returns:
        An ``iframe`` element.
    """
    return (
        f'<iframe sandbox="allow-scripts allow-downloads allow-modals" title="i2am" '
        f'style="width: 100%; height: {height}px; border: 0" srcdoc="{html.escape(page)}"></iframe>'
    )


def as_json(value: Any) -> str:
    """Strict JSON in ASCII that cannot end a script element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def as_text(value: str) -> str:
    """Text as it is written between tags and in attributes."""
    # a name of a file may hold bytes that are no text
    return html.escape(value.encode("utf-8", "replace").decode())


def check_ids(samples: Sequence[Sample]) -> None:
    """Refuses no samples, and two of one name.

    Raises:
        ValueError: As it says.
    """
    if not samples:
        raise ValueError("samples must be at least one, got none")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise ValueError(f"samples must have different ids, got {sample.id!r} twice")
        seen.add(sample.id)


@cache
def _text(name: str) -> str:
    return files("i2am.viewer").joinpath(name).read_text(encoding="utf-8")


@cache
def _colors() -> str:
    """The colours of `i2am.plots.heat` at 256 values."""
    return base64.b64encode(heat(np.linspace(0, 1, 256)[None]).tobytes()).decode()


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
