"""Scores to masks: which entries are kept, chosen exactly over a stream of files."""
