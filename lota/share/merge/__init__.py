"""Merging task vectors: the rules, where vectors come from, statistics, and the merged folder."""
