"""`make gpu` at the small size that a machine without a GPU runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_gpu_benchmark_runs_small_and_its_checks_hold(tmp_path):
    report = tmp_path / "gpu.md"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--small", "--rounds", "1", "--output", report]
    done = subprocess.run([*command, "--only", "checks", "sampling, 135M, batch 8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = report.read_text().splitlines()
    verdicts = [line.split("|")[4].strip() for line in lines if re.match(r"\| .*[0-9] \| [0-9.e-]+ \| [\w*]+ \|", line)]
    assert verdicts == ["holds"] * 23
    assert any(re.match(r"\| sampling, 135M, batch 8 \| transformers generate \| [0-9.]+ ", line) for line in lines)


def test_a_check_that_fails_and_a_peer_that_does_not_start_fail_the_benchmark():
    program = (
        "import sys; import gpu, gpu_checks; from gpu_checks import Check;"
        "found = {'one': 2.0, 'nan': float('nan'), 'two': 0.5};"
        "gpu.checks = lambda *_: (Check(name, value, 1.0) for name, value in found.items());"
        "sys.argv = ['gpu.py', '--small', '--trl026', 'false', '--only', 'checks', 'PPO iteration, 135M, batch 8'];"
        "gpu.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "benchmarks", timeout=300
    )
    assert done.returncode == 1
    assert "3 failed: one, nan, PPO iteration, 135M, batch 8" in done.stderr
    assert "| two | 0.5 | 1 | holds |" in done.stdout
