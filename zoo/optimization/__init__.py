"""A model -> the same model, faster: equal replacements in place, each measured, all of them reversible. Or spread over
devices, none of which holds it alone."""

from __future__ import annotations

from zoo.optimization.dispatch import dispatch
from zoo.optimization.report import Report, Row
from zoo.optimization.trial import optimize

__all__ = ["Report", "Row", "dispatch", "optimize"]
