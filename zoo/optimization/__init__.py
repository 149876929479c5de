"""A model -> the same model, faster: equal replacements in place, each measured, all of them reversible."""

from __future__ import annotations

from zoo.optimization.report import Report, Row
from zoo.optimization.trial import optimize

__all__ = ["Report", "Row", "optimize"]
