"""The attention of a network's layers, lent for as long as somebody listens: see :mod:`.tap`."""
