"""Makes the pictures of gallery.md by running the commands in it: ``python docs/gallery.py``.

Blocks of sh and python run in order in an empty folder; then every picture that the page shows is
copied from there, ``gallery/X`` from ``X``.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).with_suffix(".md")
MAX_BYTES = 150_000


def main(page: Path = PAGE) -> None:
    """Run a page's blocks and replace its pictures.

    Raises:
        CalledProcessError: A block failed.
        SystemExit: A picture was not made, or is too large.
    """
    text = page.read_text(encoding="utf-8")
    target = page.with_suffix("")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for language, block in re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL):
            print(block, flush=True)
            run(language, block, folder)
        pictures = re.findall(rf"!\[[^\]]*\]\({target.name}/([^)]+)\)", text)
        for picture in pictures:
            size = (folder / picture).stat().st_size if (folder / picture).is_file() else 0
            if not 0 < size <= MAX_BYTES:
                sys.exit(f"error: {picture} must be made, of {MAX_BYTES} bytes at most, got {size}")
        shutil.rmtree(target, ignore_errors=True)
        for picture in pictures:
            (target / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / picture, target / picture)
            print(target / picture)


def run(language: str, block: str, folder: Path) -> None:
    """Run one block; `i2am` is that of this interpreter."""
    if language == "python":
        command = [sys.executable, "-P", "-c", block]
    else:
        command = ["bash", "-euc", f'i2am() {{ "$0" -P -m i2am "$@"; }}\n{block}', sys.executable]
    subprocess.run(command, cwd=folder, check=True)


if __name__ == "__main__":
    main()
