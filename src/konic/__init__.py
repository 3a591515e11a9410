"""Reinforcement-learning finetuning of language models with your own Python rewards.

The library lives in :mod:`konic.finetuning`, the commands in :mod:`konic.cli`. This module loads nothing heavy.
"""

from konic.telemetry import turn_off_telemetry

__version__ = "0.2.0"

turn_off_telemetry()
