"""Evaluating a model over a data set: plan, shards, engines, scores."""
