"""What other libraries do with the network by themselves: off unless the user set it, also if imported before konic.

Those are reports of usage, and native code that `transformers` and bitsandbytes fetch from the Hub where `kernels` is
installed.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from konic.output import get_logger

_VARIABLES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "USE_HUB_KERNELS": "NO",
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_ERROR_REPORTING": "false",
}

_NO_KERNELS = ":".join(
    f"kernels-community/{name}=/no/such/folder" for name in ("quantization-bitsandbytes", "bitsandbytes-mps")
)
"""Where the package `kernels` looks for those of bitsandbytes, instead of on the Hub: nowhere."""


def turn_off_telemetry() -> None:
    """Set each variable that the user has not set, and correct the modules that have read it already.

    Processes that are started later inherit the variables. What a library sent earlier cannot be taken back.
    """
    for name, value in _VARIABLES.items():
        module, correct = _KEEPERS.get(name, ("", None))
        if os.environ.setdefault(name, value) == value and correct is not None and module in sys.modules:
            correct(sys.modules[module])
    if os.environ["USE_HUB_KERNELS"] == _VARIABLES["USE_HUB_KERNELS"]:  # bitsandbytes does not ask it
        os.environ.setdefault("LOCAL_KERNELS", _NO_KERNELS)
        get_logger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it complains when it is imported


def _correct_hub(constants: Any) -> None:
    constants.HF_HUB_DISABLE_TELEMETRY = True


def _correct_datasets(config: Any) -> None:
    config.HF_UPDATE_DOWNLOAD_COUNTS = False


def _correct_mlflow(telemetry: Any) -> None:
    client = telemetry.get_telemetry_client()
    if client is not None:
        client.flush(terminate=True)  # ends its threads and drops what they have not sent
    telemetry.set_telemetry_client()  # reads the variable again


def _correct_kernels(hub_kernels: Any) -> None:
    hub_kernels._kernels_enabled = False


def _correct_vllm(usage_lib: Any) -> None:
    usage_lib._USAGE_STATS_ENABLED = False


_KEEPERS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "HF_HUB_DISABLE_TELEMETRY": ("huggingface_hub.constants", _correct_hub),
    "HF_UPDATE_DOWNLOAD_COUNTS": ("datasets.config", _correct_datasets),
    "MLFLOW_DISABLE_TELEMETRY": ("mlflow.telemetry", _correct_mlflow),
    "USE_HUB_KERNELS": ("transformers.integrations.hub_kernels", _correct_kernels),
    "VLLM_NO_USAGE_STATS": ("vllm.usage.usage_lib", _correct_vllm),
}
"""The modules that read a variable once. Ray reads its own whenever it starts a cluster."""
