"""Imports point one way, and light entry points stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import konic

PACKAGE = Path(konic.__file__).parent
LAYERS = [
    {"errors"},
    {"config", "hub", "interrupts", "paths"},
    {
        "advantages",
        "losses",
        "intervals",
        "reducers",
        "controllers",
        "moments",
        "reward_calls",
        "packing",
        "grouping",
        "allocator",
        "folders",
    },
    {"results", "rewards"},
    {"models", "loaders", "callbacks", "adapters", "state"},
    {"dataset"},
    {"prompts", "agent", "reward_pool"},
    {"language_model", "scoring", "reward_texts"},
    {"policy", "reward_model"},
    {"fused", "checkpoint"},
    {"decoding"},
    {"sampling"},
    {"rollout", "reward_training"},
    {"algorithms", "evaluation", "run_folder"},
    {"update"},
    {"measures", "learner", "checks"},
    {"saving", "reward_trial"},
    {"engine"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_has_a_place():
    modules = {path.stem for path in (PACKAGE / "finetuning").glob("*.py")} - {"__init__"}
    assert modules == LEVEL.keys()


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_a_module_imports_only_from_layers_below(name):
    for module in imported(PACKAGE / "finetuning" / f"{name}.py"):
        if module.startswith("konic."):
            assert module.startswith("konic.finetuning."), f"{name} imports {module}"
            assert LEVEL[module.split(".")[2]] < LEVEL[name], f"{name} imports {module}"


def loaded_modules(code):
    probe = f"import sys\n{code}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split())


HEAVY = {"torch", "transformers", "peft", "datasets", "pandas", "pyarrow", "numpy"}


@pytest.mark.parametrize("code", ["import konic", "import konic.cli"])
def test_the_package_and_the_command_load_nothing_heavy(code):
    assert not HEAVY & loaded_modules(code)


def test_configs_load_no_torch():
    probe = "import importlib.util, sys\nsys.modules['konic.finetuning'] = type(sys)('konic.finetuning')\n"
    probe += f"sys.modules['konic.finetuning'].__path__ = [{str(PACKAGE / 'finetuning')!r}]\n"
    assert "torch" not in loaded_modules(probe + "import konic.finetuning.config, konic.finetuning.errors")


def test_telemetry_is_off_unless_asked_for():
    probe = "import konic, os; print(os.environ['HF_HUB_DISABLE_TELEMETRY'], os.environ['HF_UPDATE_DOWNLOAD_COUNTS'])"
    clean = {"PATH": "", "HOME": "/nonexistent"}
    asked = clean | {"HF_HUB_DISABLE_TELEMETRY": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "1"}
    for environment, expected in ((clean, "1 0"), (asked, "0 1")):
        run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment, check=True)
        assert run.stdout.strip() == expected
