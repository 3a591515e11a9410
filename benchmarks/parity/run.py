"""Parity with code that is not ours: TRL's trainers on tiny models, every tensor recorded and computed again by konic.

python benchmarks/parity/run.py --trl116 PYTHON --trl026 PYTHON --output benchmarks/results/parity.md

Takes the interpreters of two environments made from requirements-trl-1.16.txt and requirements-trl-0.26.txt. Exits with
1 if anything that should agree does not.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from cases import CASES
from compare import NOTES, compare
from report import Recorded

HERE = Path(__file__).parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def run_script(python, script, *arguments):
    """Run one of the scripts beside this one, silently unless it fails."""
    command = [python, HERE / script, *arguments]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}\n{done.stderr}")


def record(folder, pythons):
    """Make the models and run every case's recorder, one at a time."""
    run_script(sys.executable, "make_models.py", folder / "models")
    for case in CASES:
        print(f"recording {case.system}, {case.architecture} ...", flush=True)
        output = folder / case.file_name
        script = f"record_{case.recorder}.py"
        run_script(pythons[case.recorder], script, folder / "models", case.architecture, output, *case.arguments)


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def names(versions):
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def page(text, peers, seconds):
    """The table with what it was measured on."""
    ours = {name: version(name) for name in ("konic", "transformers", "torch")}
    return "\n".join([
        "# Parity with TRL", "",
        "Made by `make parity`, which runs benchmarks/parity/run.py in environments of the pinned versions there.", "",
        f"- machine: {processor()}, {os.cpu_count()} cores, one thread",
        f"- ours: {names(ours)}",
        *(f"- peer: {names(versions)}" for versions in peers),
        f"- seconds: {seconds:.0f}", "", text, "", NOTES,
    ])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl116", required=True, help="a Python that has TRL 1.16")
    parser.add_argument("--trl026", required=True, help="a Python that has TRL 0.26.2")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder), {"grpo": given.trl116, "ppo": given.trl026})
        text, is_ok = compare(Path(folder))
        files = {case.recorder: Path(folder) / case.file_name for case in CASES}
        peers = [Recorded.read(file).versions for file in files.values()]
    written = page(text, peers, time.perf_counter() - started)
    print(written)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(written + "\n")
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
