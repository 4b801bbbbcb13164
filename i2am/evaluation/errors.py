"""What can be wrong with a run folder."""


class StoreError(Exception):
    """A run folder or a file in it cannot be used; the message is one sentence."""


class StoreConflict(StoreError):
    """It is whole, but something else than what was asked for."""


class StoreDamaged(StoreError):
    """It is truncated, altered or incomplete."""
