"""Recording diffusers: the only room that knows its processors, schedulers and pipelines."""

from i2am.adapters.api import record, release
from i2am.adapters.recorder import Recorder

__all__ = ["Recorder", "record", "release"]
