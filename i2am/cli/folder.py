"""The output folder of a command, whose conflicts have an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from i2am.attribution import folders
from i2am.attribution.folders import MANIFEST, FolderInUse
from i2am.cli.errors import OutputConflict

__all__ = ["MANIFEST", "check_free", "fresh_folder", "no_conflict"]


@contextmanager
def no_conflict() -> Iterator[None]:
    """Gives a folder that is in use the exit code of a conflict.

    Raises:
        OutputConflict: In place of `FolderInUse`.
    """
    try:
        yield
    except FolderInUse as error:
        raise OutputConflict(str(error)) from None


def check_free(out: Path, *, overwrite: bool) -> None:
    """`i2am.attribution.folders.check_free`; raises `OutputConflict`."""
    with no_conflict():
        folders.check_free(out, overwrite=overwrite)


@contextmanager
def fresh_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """`i2am.attribution.folders.fresh_folder`; raises `OutputConflict`."""
    with no_conflict(), folders.fresh_folder(out, overwrite=overwrite) as folder:
        yield folder
