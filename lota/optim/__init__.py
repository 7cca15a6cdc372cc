"""Masked optimizers, their fusing into the backward pass, and compact weight gradients."""
