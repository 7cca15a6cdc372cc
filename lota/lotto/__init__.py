"""Sequences of tasks in one model (LoTTO, arXiv 2406.16797): stages, ledger, forgetting."""

from __future__ import annotations
