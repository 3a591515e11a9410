"""`konic doctor`'s estimate against real runs: python benchmarks/doctor.py [RESULTS.md]. About eight minutes."""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import machine

ITERATIONS = 8
REWARDS = """
from konic.finetuning import *

class Cheerful(KonicLLMRewardComposer):
    @llm_reward
    def brief(self, prompt, response):
        return -len(response) / 80
"""
JOB = """
base_model: smollm2-135m
reward_composer: {{path: "rewards.py:Cheerful", arguments: {{kl_penalty_weight: 0.1}}}}
lora_config: {{r: 8}}
training_config: {{batch_size: {batch_size}, algorithm: {algorithm}}}
generation_config: {{max_new_tokens: {tokens}, max_prompt_length: 64}}
"""


def main() -> None:
    rows = ["| job | estimate | run | error | memory, estimate | run | the doctor took |", "|---" * 7 + "|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
        jobs = {
            "PPO, 8 responses of 24 tokens": JOB.format(batch_size=8, algorithm="ppo", tokens=24),
            "GRPO, 16 responses of 48 tokens": JOB.format(batch_size=16, algorithm="grpo", tokens=48),
        }
        for title, text in jobs.items():
            path = folder / f"{title[:4].strip(',')}.yaml"
            path.write_text(text, encoding="utf-8")
            rows.append(compare(title, path, folder))
            print(rows[-1], flush=True)
        import konic.demo

        rows.append(compare("the demo, 32 responses, 100 held out", Path(konic.demo.__file__), folder))
    title = f"# What konic doctor expects, against runs of {ITERATIONS} iterations"
    text = "\n\n".join([title, f"Made by `make doctor-check` on {machine()}.", "\n".join(rows)]) + "\n"
    print(text)
    for path in sys.argv[1:]:
        Path(path).write_text(text, encoding="utf-8")


def compare(title: str, job: Path, folder: Path) -> str:
    """Return a row of the table: what the doctor says of the job, and what training it takes."""
    options = ["--max-iterations", str(ITERATIONS)]
    started = time.monotonic()
    findings = json.loads(konic("doctor", str(job), "--json", *options).stdout)
    took = time.monotonic() - started
    numbers = {finding["name"]: finding["numbers"] for finding in findings}
    run = folder / f"run-{job.stem}"
    started = time.monotonic()
    errors = konic("train", str(job), *options, "--output", str(run), before=["/usr/bin/env", "time", "-v"]).stderr
    seconds = time.monotonic() - started
    peak = int(re.search(r"Maximum resident set size \(kbytes\): (\d+)", errors)[1]) * 1024
    estimate, memory = numbers["time"]["seconds"], numbers["peak memory"]["peak_bytes"]
    return (
        f"| {title} | {estimate:.0f} s | {seconds:.0f} s | {estimate / seconds - 1:+.0%} "
        f"| {memory / 2**20:.0f} MiB | {peak / 2**20:.0f} MiB | {took:.0f} s |"
    )


def konic(*arguments: str, before: tuple[str, ...] | list[str] = ()) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("konic")
    return subprocess.run([*before, str(command), *arguments], capture_output=True, text=True, check=True)


if __name__ == "__main__":
    main()
