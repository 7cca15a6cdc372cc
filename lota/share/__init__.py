"""Models and sparse task vectors as files that others load."""
