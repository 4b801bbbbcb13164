"""Loading without a hub, whatever a folder says."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub.constants

_lock = threading.Lock()
_inside = 0
_before = False


@contextmanager
def no_hub() -> Iterator[None]:
    """Makes huggingface_hub refuse every request, of all threads, until the last block ends."""
    global _inside, _before
    with _lock:
        if not _inside:
            _before = huggingface_hub.constants.HF_HUB_OFFLINE
            huggingface_hub.constants.HF_HUB_OFFLINE = True
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                huggingface_hub.constants.HF_HUB_OFFLINE = _before
