"""Moved to :mod:`simgrad.findings`."""

from simgrad.findings import Claim, Findings, Interval, Table, interval

__all__ = ["Claim", "Findings", "Interval", "Table", "interval"]
