"""Measures: functions and torchmetrics classes."""

from mmsae.metrics.fidelity import Fidelity

__all__ = ["Fidelity"]
