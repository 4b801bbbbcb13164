"""The format of a weight file by its first bytes, as names of files can be wrong."""

import codecs
import zipfile
from pathlib import Path
from typing import Literal

Format = Literal["safetensors", "zip", "pickle"]

_START = 512
# safetensors' own limit, in bytes
_LONGEST_HEADER = 100_000_000
_OTHERS = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive, which has to be unpacked",
    b"7z\xbc\xaf": "a 7z archive, which has to be unpacked",
    b"Rar!": "a RAR archive, which has to be unpacked",
}


def format_of(path: Path, *, what: str) -> Format:
    """How a weight file has to be read.

    Args:
        path: A file.
        what: How to call it in an error.

    Returns:
        "safetensors"; "zip" for a zip archive, as torch writes since 1.6; "pickle" for a bare
        pickle, as torch wrote before.

    Raises:
        ValueError: It is empty, truncated, damaged, or no weights: a Git LFS pointer, a web page,
            other text, an archive of another kind.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_START)
    # first of all: the length of its header may be the bytes that others begin with
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
        return "safetensors"
    if start.startswith(b"PK"):
        # the directory of a zip archive is at its end
        try:
            whole = zipfile.is_zipfile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{what} is damaged: {error}") from error
        if not whole:
            raise ValueError(f"{what} is truncated")
        return "zip"
    if start.startswith(b"\x80"):
        return "pickle"
    raise ValueError(f"{what} is {_no_weights(start)}")


def _no_weights(start: bytes) -> str:
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return (
            "a Git LFS pointer, a short text in place of the weights; 'git lfs pull' fetches them"
        )
    if b"<html" in start.lower() or b"<!doctype html" in start.lower():
        return "a web page (HTML) and no weights; open it in a browser to see what it says"
    for magic, name in _OTHERS.items():
        if start.startswith(magic):
            return f"{name} and no weights"
    if _is_text(start):
        first = " ".join(start.decode(errors="ignore").split())[:40]
        return f"text and no weights; it begins with {first!r}"
    return "truncated, damaged or no weight file"


def _is_text(start: bytes) -> bool:
    try:
        # the last character may be cut
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)
