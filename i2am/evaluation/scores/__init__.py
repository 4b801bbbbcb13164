"""Scores of a run: attribution and image metrics, from committed shards alone."""
