"""Usage reports of other libraries are off unless the user set them, also where they were imported before konic."""

import os
import subprocess
import sys

import pytest

OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "USE_HUB_KERNELS": "NO",
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_ERROR_REPORTING": "false",
}
ON = {
    "HF_HUB_DISABLE_TELEMETRY": "0",
    "HF_UPDATE_DOWNLOAD_COUNTS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "false",
    "RAY_USAGE_STATS_ENABLED": "1",
    "USE_HUB_KERNELS": "YES",
    "VLLM_NO_USAGE_STATS": "0",
    "WANDB_ERROR_REPORTING": "true",
}
STAND_INS = """
import os, sys, types

def module(name, **content):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)
    return sys.modules[name]

class Client:  # as MLflow 3.17 makes it when it is imported, and drops it when it reads the variable again
    is_running = True

    def flush(self, terminate=False):
        self.is_running = not terminate

def set_telemetry_client():
    if os.environ.get("MLFLOW_DISABLE_TELEMETRY", "").lower() in ("true", "1"):
        mlflow.client = None

client = Client()
mlflow = module("mlflow.telemetry", client=client, set_telemetry_client=set_telemetry_client)
mlflow.get_telemetry_client = lambda: mlflow.client
kernels = module("transformers.integrations.hub_kernels", _kernels_enabled=True)
vllm = module("vllm.usage.usage_lib", _USAGE_STATS_ENABLED=True)
"""


def run(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in OFF} | variables
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


@pytest.mark.parametrize("given", [{}, ON], ids=["unset", "asked for"])
def test_the_variables_are_set_unless_the_user_set_them(given):
    code = f"import konic, os; print({{name: os.environ[name] for name in {list(OFF)}}})"
    assert run(code, **given) == str(given or OFF)


@pytest.mark.parametrize(("given", "expected"), [({}, "True False"), (ON, "False True")], ids=["unset", "asked for"])
def test_the_hubs_reports_are_off_when_its_libraries_were_imported_first(given, expected):
    code = """
import huggingface_hub, datasets
import konic
print(huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS)
"""
    assert run(code, **given) == expected


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "True False False False"), (ON, "False True True True")], ids=["unset", "asked for"]
)
def test_the_reports_of_mlflow_and_vllm_are_off_when_they_were_imported_first(given, expected):
    shown = "mlflow.client is None, client.is_running, vllm._USAGE_STATS_ENABLED, kernels._kernels_enabled"
    code = STAND_INS + f"import konic; print({shown})"
    assert run(code, **given) == expected
