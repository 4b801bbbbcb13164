"""Attention calls of a network's layers, handed to a listener: see :mod:`.tap`."""
