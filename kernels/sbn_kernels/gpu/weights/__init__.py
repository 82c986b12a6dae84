"""Scales, masks and codes of all weights of a model at once."""
