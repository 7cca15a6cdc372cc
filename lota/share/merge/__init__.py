"""Merging task vectors: the rules, where vectors come from, statistics, and the merged folder."""

from __future__ import annotations
