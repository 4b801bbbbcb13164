"""A Figure that notebooks show. It needs matplotlib: imported when the first figure is made."""

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A Figure made without pyplot, which a notebook cell shows when it ends with it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
