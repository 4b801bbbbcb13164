"""Which tokens of a text are which words of a prompt: see :mod:`.words`."""
