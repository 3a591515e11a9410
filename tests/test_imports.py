"""Imports point one way, between packages and inside them, and light entry points stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import konic

ROOT = Path(konic.__file__).parent / "finetuning"
ORDER = [
    "errors", "successors", "arguments", "settings", "algorithms", "training_config", "generation_config",
    "config", "hub", "system", "results", "data", "models",
    "rewards",
    "agent", "rollout", "learning", "reward_models", "callbacks", "run", "trainer", "cluster", "engine",
    "konic_0_1",
]  # fmt: skip
"""Modules and packages of konic.finetuning; each imports only from those before it."""
INSIDE = {
    "system": [
        "memory", "signals", "places", "user_code", "files", "mirror", "pickling", "processor", "child", "group",
        "world",
    ],
    "results": ["metrics", "intervals", "at_k", "iteration", "evaluation", "summary", "trained"],
    "data": [
        "pages", "packed", "rows", "chats", "columns", "fingerprint", "hub", "formats", "folders", "loaders", "config",
        "prompts", "samples", "template_process", "chat_templates", "template_names", "decoding", "chat_tokens",
        "tokenization",
    ],
    "models": [
        "positions", "distributions", "length_groups", "value_head", "prepacked", "products", "gated_mlps", "sharding",
        "wide_head", "headers", "locations", "quantised", "language_model", "fsdp", "token_scores", "decode_probe",
        "tokenizer_rules", "containment", "model_kwargs", "reading", "loading",
        "adapter_config", "adapters", "merging", "adapter_check", "trained_weights", "policy", "policy_files",
    ],
    "rewards": [
        "moments", "named_parts", "marks", "reducers", "outcomes", "signatures", "calls", "totals", "validation",
        "old_names", "listing", "origin", "composer", "overrides", "workers", "remote", "scoring", "responses", "trial",
    ],
    "rollout": [
        "sampler", "streaming", "shares", "fused_transformer", "fused_decoder", "graphed_decoder", "static_decoder",
        "decoding", "local_sampler",
        "vllm_client", "vllm_guard", "vllm_server", "vllm_weights", "vllm_sampler", "serving",
        "rollout", "rows", "evaluation",
    ],
    "learning": ["advantages", "losses", "schedule", "kl_controller", "estimators", "gradients", "update", "learner"],
    "reward_models": ["texts", "classifier", "feedback", "saving", "training"],
    "callbacks": [
        "hooks", "trackers", "mlflow", "tensorboard", "trackio", "wandb", "live", "display", "console",
        "json_lines", "composite",
    ],
    "cluster": ["ray_inside", "embedded", "nodes", "connection", "mailbox", "desk", "rendezvous", "worker", "driver"],
    "konic_0_1": ["callback", "reward", "dataset", "environment", "module", "backends"],
    "run": [
        "environment", "card", "reward_weights", "state", "checkpoint", "resume", "processes", "checks", "invariants",
        "served", "measures", "tables", "folder", "remote", "place", "saving", "preflight", "session",
    ],
}  # fmt: skip
"""Modules of each package; each imports only from those before it."""


def names_in(folder):
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in folder.glob("*/__init__.py")}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)


def test_every_room_has_its_place_in_the_order():
    assert names_in(ROOT) == set(ORDER)
    for package, order in INSIDE.items():
        assert names_in(ROOT / package) == set(order), package


@pytest.mark.parametrize("path", [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"], ids=str)
def test_a_module_imports_only_what_stands_before_it(path):
    room, *inside = path.relative_to(ROOT).with_suffix("").parts
    for module in imported(path):
        if module[0] != "konic" or module[1:] in (
            [],
            ["output"],
            ["text"],
        ):  # what the command uses too
            continue
        assert module[1] == "finetuning", f"{path} imports {'.'.join(module)}"
        other = module[2]
        if other != room:
            assert ORDER.index(other) < ORDER.index(room), f"{path} imports {'.'.join(module)}"
        elif inside:
            order = INSIDE[room]
            assert order.index(module[3]) < order.index(inside[0]), f"{path} imports {'.'.join(module)}"


@pytest.mark.parametrize("package", INSIDE)
def test_a_package_says_what_comes_in_and_what_goes_out_and_imports_nothing(package):
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    assert "->" in (ast.get_docstring(tree) or "")
    assert len(tree.body) == 1


def loaded_modules(code):
    probe = f"import sys\n{code}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split())


HEAVY = {"torch", "transformers", "peft", "datasets", "pandas", "pyarrow", "numpy"}


@pytest.mark.parametrize("code", ["import konic", "import konic.cli"])
def test_the_package_and_the_command_load_nothing_heavy(code):
    assert not HEAVY & loaded_modules(code)


def test_the_public_names_load_no_torch_until_one_of_them_needs_it():
    assert "torch" not in loaded_modules("import konic.finetuning")
    assert "torch" in loaded_modules("from konic.finetuning import KonicFinetuningEngine")
