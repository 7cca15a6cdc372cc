"""Rows of tasks as prompts, token ids and batches."""
