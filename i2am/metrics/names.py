"""Names of the scores of attribution maps; light, because commands know them before they run."""

IMACS_NAMES = ("imacs_g", "imacs_g_share", "imacs_g_mask_votes", "imacs_r")
"""Keys of `i2am.metrics.imacs_scores`."""
