"""Sparse task vector files: the changed entries of a model, bit for bit."""
