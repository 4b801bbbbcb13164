"""Pictures of maps: colours, overlays and contact sheets. Arrays in, arrays out."""

from i2am.plots.overlay import contact_sheet, heat, overlay

__all__ = ["contact_sheet", "heat", "overlay"]
