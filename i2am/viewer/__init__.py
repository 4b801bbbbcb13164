"""One self-contained page where you point at a patch and see where it looked.

    page = i2am.viewer.page(maps, generated=image, reference=garment)

The page asks nobody for anything: pictures and maps are in it. Every name is imported when it is
first used.
"""

from typing import TYPE_CHECKING

from i2am.lazy import lazy

# for type checkers, who cannot follow __getattr__
# ruff: noqa: F401
if TYPE_CHECKING:
    from i2am.viewer.content import Sample, Source, sample
    from i2am.viewer.html import frame, render
    from i2am.viewer.notebook import View
    from i2am.viewer.report import page, write_report
    from i2am.viewer.stacks import Stack

_MODULES = {
    "Sample": "content",
    "Source": "content",
    "Stack": "stacks",
    "View": "notebook",
    "frame": "html",
    "page": "report",
    "render": "html",
    "sample": "content",
    "write_report": "report",
}

__all__ = sorted(_MODULES)

__getattr__, __dir__ = lazy(__name__, _MODULES)
