"""The training run: loop, objectives, reference, checkpoints, run folder, log."""
