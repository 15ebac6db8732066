"""Measures of what a head does to a backbone's patch tokens."""

from .position import position_variance_share

__all__ = ["position_variance_share"]
