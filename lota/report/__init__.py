"""Runs read back, and figures, tables and a page made of them."""

from __future__ import annotations
