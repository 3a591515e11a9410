"""Reinforcement-learning finetuning of language models with your own Python rewards.

The library lives in :mod:`konic.finetuning`, the commands in :mod:`konic.cli`. This module loads nothing heavy.
"""

import os

__version__ = "0.2.0"

# No telemetry unless the user asks for it: these are read when huggingface_hub and datasets are first imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
