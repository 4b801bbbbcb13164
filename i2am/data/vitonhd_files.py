"""Where the files of a data set in the layout of VITON-HD are, under each of their names."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from stat import S_ISREG

from i2am.data.vitonhd_pairs import ENDINGS, Pair, Problem, file_names

# the archive has the first ending, copies of it the others
_MASK_ENDINGS = (
    *(f"_mask{ending}" for ending in (".png", *ENDINGS)),
    *(".png", *ENDINGS),
)


@dataclass(frozen=True)
class Kind:
    """One kind of file: a folder of it for every split.

    Attributes:
        folders: Names that the folder goes by, the archive's first.
        of_garment: Whether files have the garment's name, not the person's.
        is_mask: Whether pictures are masks.
        endings: What is behind the stem in file names, by preference.
        hint: What to say where the folder is missing.
    """

    folders: tuple[str, ...]
    of_garment: bool = False
    is_mask: bool = False
    endings: tuple[str, ...] = ENDINGS
    hint: str = ""


_WARP_HINT = ": garments are warped by a network such as PF-AFN, which is not part of i2am"
KINDS = {
    "image": Kind(("image",)),
    "garment": Kind(("cloth",), of_garment=True),
    "agnostic": Kind(("agnostic-v3.2", "agnostic")),
    "mask": Kind(
        ("agnostic-mask",),
        is_mask=True,
        endings=_MASK_ENDINGS,
        hint=": older downloads of VITON-HD come without it, the present one has it",
    ),
    "garment_mask": Kind(("cloth-mask",), of_garment=True, is_mask=True),
    "pose": Kind(("image-densepose",)),
    "garment_region": Kind(("gt_cloth_warped_mask",), is_mask=True),
    "warped": Kind(("cloth-warp",), hint=_WARP_HINT),
    "warped_mask": Kind(("cloth-warp-mask",), is_mask=True, hint=_WARP_HINT),
}
"""By name in an item of `VitonHD`."""


class Files:
    """The files of one split, found by one listing of each folder.

    Args:
        root: The root of the data set.
        split: Its folder.
        names: Keys of `KINDS`.
        prefix: What comes before the names of the folders of warped garments.
    """

    def __init__(self, root: Path, split: str, names: Iterable[str], *, prefix: str = "") -> None:
        self.root, self.split = root, split
        self.folders: dict[str, Path] = {}
        # only what is not called as in the archive: lists of millions would not fit otherwise
        self._others: dict[tuple[str, str], str] = {}
        for name in names:
            before = prefix if name in ("warped", "warped_mask") else ""
            candidates = [root / split / f"{before}{folder}" for folder in KINDS[name].folders]
            self.folders[name] = next((path for path in candidates if path.is_dir()), candidates[0])

    def path(self, name: str, pair: Pair) -> Path:
        """The file of a pair; where it is missing, what the archive would call it.

        Args:
            name: One of the names given.
            pair: One of those that `find` has seen.
        """
        stem, key = _names(name, pair)
        file = self._others.get((name, key)) or f"{stem}{KINDS[name].endings[0]}"
        return self.folders[name] / file

    def find(self, pairs: Iterable[Pair], list_name: str) -> list[Problem]:
        """Looks for every file of the pairs.

        Args:
            pairs: All of them.
            list_name: The file that lists them, for messages.

        Returns:
            Folders that are missing, with their files not named one by one; other files that are
            missing; links to places outside of the data set. In the order of lines.
        """
        pairs = list(pairs)
        problems: list[Problem] = []
        for name, folder in self.folders.items():
            if not folder.is_dir():
                other = "".join(f" (or {other})" for other in KINDS[name].folders[1:])
                message = f"{folder}{other} is missing{KINDS[name].hint}"
                problems.append(Problem(self._relative(folder), None, "missing", message))
                continue
            with os.scandir(folder) as entries:
                links = {entry.name: entry.is_symlink() for entry in entries}
            homes = [Path(os.path.realpath(path)) for path in (self.root, folder)]
            for pair in pairs:
                problem = self._find(name, pair, links, homes, list_name)
                if problem is not None:
                    problems.append(problem)
        return sorted(problems, key=lambda problem: problem.line or 0)

    def _find(
        self, name: str, pair: Pair, links: dict[str, bool], homes: list[Path], listed: str
    ) -> Problem | None:
        kind, (stem, key) = KINDS[name], _names(name, pair)
        usual = f"{stem}{kind.endings[0]}"
        wanted = file_names(stem, key, kind.endings)
        file = next((candidate for candidate in wanted if candidate in links), None)
        if file is not None and file != usual:
            self._others[name, key] = file
        path = self.folders[name] / (file or usual)
        if file is None or (links[file] and not path.exists()):
            code, what = "missing", "is missing" if file is None else "is a link to nothing"
            message = f"{path} {what}, line {pair.line} of {listed} needs it"
        elif links[file] and not any(path.resolve().is_relative_to(home) for home in homes):
            code = "outside"
            message = (
                f"{path} must stay in the data set, it is a link to {path.resolve()} "
                f"(line {pair.line} of {listed}): copy the file, or link its whole folder"
            )
        else:
            return None
        return Problem(self._relative(path), pair.line, code, message)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def mark_of(path: Path, *, contents: bool) -> int | str | None:
    """What tells one version of a file from another.

    Args:
        path: The file.
        contents: Whether its bytes count.

    Returns:
        The SHA-256 of its bytes, or their number; None where no regular file is.

    Raises:
        OSError: It cannot be read.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not S_ISREG(status.st_mode):
        return None
    if not contents:
        return status.st_size
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _names(name: str, pair: Pair) -> tuple[str, str]:
    """The stem of a file, and what it is found by: the listed name where it is a listed file."""
    if KINDS[name].of_garment:
        return pair.garment, pair.garment_file if name == "garment" else pair.garment
    return pair.person, pair.person_file if name == "image" else pair.person
