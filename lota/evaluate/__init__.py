"""Scores of a model on tasks, and samples in AlpacaEval's format."""
