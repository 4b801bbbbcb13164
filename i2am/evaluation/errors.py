"""What can be wrong with a run; light, because every command knows these."""


class StoreError(Exception):
    """A run folder or a file in it cannot be used; the message is one sentence."""


class StoreConflict(StoreError):
    """It is whole, but something else than what was asked for."""


class StoreDamaged(StoreError):
    """It is truncated, altered or incomplete."""


class OutOfMemory(Exception):
    """A batch does not fit; the message is one sentence that says what to change."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: torch has a class for that on GPUs only."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "can't allocate memory" in text)
    )
