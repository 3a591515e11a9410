"""The core tests on the lowest and on the newest versions that pyproject.toml allows.

python benchmarks/versions.py floors                       the lowest version of each dependency, as constraints for pip
python benchmarks/versions.py run OUTPUT PYTHON [PYTHON]   the tests with each Python's own packages; writes the table

The core are the tests of the numbers and of whole runs on tiny models; the tests of commands and of the real models are
not among them.
"""

import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from bench import machine

ROOT = Path(__file__).parent.parent
TESTS = (
    *(f"tests/{name}" for name in ("learning", "models", "rollout", "results", "run", "data")),
    "tests/test_engine.py", "tests/test_dynamic_sampling.py",
)  # fmt: skip
PROBE = """
import json, platform
from importlib.metadata import version
names = "torch transformers peft datasets huggingface_hub safetensors numpy pyarrow jinja2 filelock pydantic pebble \
cloudpickle gguf rich typer".split()
print(json.dumps({"Python": platform.python_version()} | {name: version(name) for name in names}))
"""
HEAD = """# Oldest and newest versions

`make versions` runs the core tests (`{tests}`) with the lowest versions that
`pyproject.toml` allows and with the newest ones that pip found, each in an environment of its own.

| versions | result | minutes |
|---|---|---|
"""


def floors():
    """Print `name==lowest` for every dependency."""
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name, lowest = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
        print(f"{name}=={lowest}")


def run(output, pythons):
    """Run the tests with each Python and write the table; False if a test failed."""
    rows, all_passed = [], True
    for python in pythons:
        versions = json.loads(subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=True).stdout)
        start = time.monotonic()
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-rf", *TESTS]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        minutes = (time.monotonic() - start) / 60
        lines = done.stdout.splitlines()
        print(*lines[-30:], done.stderr[-2000:], sep="\n", flush=True)
        failed = "".join(f"<br>{line}" for line in lines if line.startswith(("FAILED", "ERROR")))
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        rows.append(f"| {named} | {re.sub(r' in .*', '', lines[-1])}{failed} | {minutes:.0f} |")
        all_passed &= done.returncode == 0
    text = HEAD.format(tests=" ".join(TESTS)) + "\n".join(rows)
    Path(output).write_text(f"{text}\n\nMachine: {machine().partition(';')[0]}. {time.strftime('%B %Y')}.\n")
    return all_passed


if __name__ == "__main__":
    if sys.argv[1] == "floors":
        floors()
    else:
        sys.exit(not run(sys.argv[2], sys.argv[3:]))
