"""The list of pairs of a data set in the layout of VITON-HD, and all that can be wrong with it."""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from os.path import splitext
from pathlib import Path
from typing import Literal

Setting = Literal["paired", "unpaired"]

_LOWER = (".jpg", ".png", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
ENDINGS = (*_LOWER, *map(str.upper, _LOWER))
"""What names of pictures end in, the likeliest first."""
_SHOWN = 5
_ID_BYTES = 200  # leaves room for an ending in the 255 bytes that file systems allow
# with a folder in it a name could leave the data set; a colon names a drive on Windows
_FORBIDDEN = re.compile(r"[/\\:\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Pair:
    """A person and the garment to put on.

    Attributes:
        id: The name of the sample, fit for a file name and unlike that of every other pair: the
            person's stem for paired, ``<person>_<garment>`` for unpaired. Of a name over 200
            bytes it is the beginning, with a hash of the whole.
        person: The person's file name without its ending.
        garment: The same of the garment; for paired that is `person`.
        line: Where the list names the pair, counted from 1, blank lines included.
        person_file: The person's file name as it is listed.
        garment_file: The same of the garment.
    """

    id: str
    person: str
    garment: str
    line: int
    person_file: str
    garment_file: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that keeps a data set from being used.

    Attributes:
        file: The file concerned, relative to the root of the data set.
        line: The line of the list of pairs that names it; None where it is no single line.
        code: ``encoding``, ``columns``, ``name``, ``duplicate``, ``empty`` of the list of pairs,
            ``missing`` or ``outside`` (a link that leaves the data set) of a file in a folder.
        message: One sentence that says all of this.
    """

    file: str
    line: int | None
    code: str
    message: str

    def __str__(self) -> str:
        return self.message


class DataRejected(ValueError):
    """A data set that cannot be used; the message has the first problems and their number.

    Attributes:
        problems: All of them, in the order of their lines.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        shown = [problem.message for problem in self.problems[:_SHOWN]]
        rest = len(self.problems) - len(shown)
        if rest:
            shown.append(f"and {rest} more, {len(self.problems)} problems in all")
        return "; ".join(shown)


def read_pairs(path: Path, setting: Setting) -> tuple[list[Pair], list[Problem]]:
    """Reads a list of pairs: on each line the file names of a person and a garment.

    A byte-order mark, any line ends, blank lines, tabs and spaces around names are accepted.

    Args:
        path: The list, in UTF-8.
        setting: ``"paired"`` takes each person's own garment, whatever the second column says;
            ``"unpaired"`` takes the garment of the second column.

    Returns:
        The pairs of all good lines in their order, and what is wrong with the others.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a VITON-HD folder lists its pairs there")
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    first: dict[str, Pair] = {}
    problems: list[Problem] = []
    # bytes are split at \n, \r\n and \r alone: numbers are those of an editor
    for number, line in enumerate(content.splitlines(), start=1):
        place = f"line {number} of {path}"
        fault = None
        try:
            names = [name for name in re.split(r"[ \t]+", line.decode("utf-8")) if name]
        except UnicodeDecodeError as error:
            fault = "encoding", f"{place} must be UTF-8, byte {error.start + 1} is not"
            names = []
        if len(names) not in (0, 2):
            fault = (
                "columns",
                (
                    f"{place} must be two file names, a person's and a garment's, "
                    f"got {len(names)}: {_short(' '.join(names))}"
                ),
            )
        elif bad := next((name for name in names if not _is_bare(name)), None):
            fault = (
                "name",
                (
                    f"{place} must be two bare file names, without folders, colons, control "
                    f"characters or a dot in front, got {_short(bad)}"
                ),
            )
        elif names:
            pair = _pair(names[0], names[1], number, setting)
            earlier = first.setdefault(pair.id, pair)
            if earlier is not pair:
                fault = "duplicate", f"{place} repeats line {earlier.line}, {_again(pair, earlier)}"
        if fault:
            problems.append(Problem(path.name, number, *fault))
    if not first and not problems:
        message = f"{path} must list at least one pair, it is empty"
        problems.append(Problem(path.name, None, "empty", message))
    return list(first.values()), problems


def _pair(person_file: str, garment_file: str, line: int, setting: Setting) -> Pair:
    if setting == "paired":
        garment_file = person_file
    person, garment = stem_of(person_file), stem_of(garment_file)
    name = person if setting == "paired" else f"{person}_{garment}"
    encoded = name.encode()
    if len(encoded) > _ID_BYTES:
        start = encoded[: _ID_BYTES - 17].decode(errors="ignore")
        name = f"{start}~{sha256(encoded).hexdigest()[:16]}"
    return Pair(name, person, garment, line, person_file, garment_file)


def _again(pair: Pair, earlier: Pair) -> str:
    if (pair.person, pair.garment) != (earlier.person, earlier.garment):
        return f"as both would be called {_short(pair.id)}"
    if pair.id == pair.person:
        return f"a pair of {_short(pair.person)} and its own garment"
    return f"a pair of {_short(pair.person)} and {_short(pair.garment)}"


def stem_of(name: str) -> str:
    """The name of a picture without its ending; the whole name where it has none of `ENDINGS`."""
    stem, ending = splitext(name)
    return stem if ending.lower() in ENDINGS else name


def file_names(stem: str, listed: str, endings: Sequence[str] = ENDINGS) -> list[str]:
    """Names that the file of a picture may have: the listed one, then its stem with each ending.

    Args:
        stem: What all of its files are called after.
        listed: The name in the list; the stem where no name is listed.
        endings: By preference.
    """
    return [*([] if listed == stem else [listed]), *(f"{stem}{ending}" for ending in endings)]


def _is_bare(name: str) -> bool:
    return not name.startswith(".") and _FORBIDDEN.search(name) is None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
