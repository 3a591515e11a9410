"""How long and how much memory the same work takes here and in a peer: both in turn (A B A B ...), in one run.

python benchmarks/bench.py run [--trl116 PYTHON] [--trl026 PYTHON] [--rounds 5] [--only NAME ...]
python benchmarks/bench.py show
python benchmarks/bench.py versus CHECKOUT [--rounds 5] [--only NAME ...]    this code and an older one, in turn

Every system is a process of its own (benchmarks/speed/) that does one step when it is its turn. The first step of each
is left out. `run` writes its figures to benchmarks/results/bench.json under the processor and the day, `show` all of
them to benchmarks/results/bench.md, which the docs show. Run it on a machine that does nothing else.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from konic.finetuning.models.loading import load_model
from konic.finetuning.models.locations import quiet_transformers
from konic.finetuning.system.processor import processor_name

HERE = Path(__file__).parent
SPEED = HERE / "speed"
RESULTS = HERE / "results" / "bench.json"
TOKENS = 48
PROMPTS = (
    "The second act loses its nerve, and yet the lead",
    "I took my father to see this western on a wet Tuesday and",
    "Nobody in the courtroom scenes ever raises a voice, which",
    "Shot mostly at dusk, this small drama about two sisters",
    "There is a ghost in the film, though the script keeps",
    "The director's third feature is a comedy about",
    "What the trailer does not tell you is that the hero",
    "Half an hour into this thriller, the train",
)


@dataclass(frozen=True)
class Comparison:
    """One piece of work, done by ours and by a peer."""

    name: str
    ours: tuple[str, ...]
    peer: tuple[str, ...]
    peer_name: str
    peer_python: str
    prompts: tuple[str, ...] = PROMPTS
    model: str = "smollm2"
    dtype: str = "float32"


COMPARISONS = (
    Comparison("PPO iteration, 4 epochs", ("ours.py", "ppo"), ("trl_ppo.py", "4"), "TRL 0.26.2 PPO", "trl026"),
    Comparison(
        "GRPO iteration, 1 pass", ("ours.py", "grpo"), ("trl_grpo.py", "1"), "TRL 1.16.0 GRPO", "trl116", PROMPTS[:2]
    ),
    Comparison(
        "PPO iteration in bf16", ("ours.py", "ppo"), ("trl_ppo.py", "4"), "TRL 0.26.2 PPO", "trl026", dtype="bfloat16"
    ),
    Comparison(
        "GRPO iteration in bf16",
        ("ours.py", "grpo"),
        ("trl_grpo.py", "1"),
        "TRL 1.16.0 GRPO",
        "trl116",
        PROMPTS[:2],
        dtype="bfloat16",
    ),
    Comparison("sampling, Llama shape", ("ours.py", "sample"), ("generate.py",), "transformers generate", "here"),
    Comparison(
        "sampling, GPT-2 shape", ("ours.py", "sample"), ("generate.py",), "transformers generate", "here", model="gpt2"
    ),
    Comparison("sampling, Llama shape, fp32", ("ours.py", "sample"), ("ct2.py",), "CTranslate2 4.8.5", "trl026"),
    Comparison("sampling, any model", ("ours.py", "sample-general"), ("generate.py",), "transformers generate", "here"),
)


class Process:
    """A system that waits for its turn."""

    def __init__(self, python, script, arguments, log, path=(SPEED,)):
        paths = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        command = [python, str(SPEED / script), *map(str, arguments)]
        self.log = log
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=environment
        )
        self.is_ready = False

    def step(self):
        """Seconds of one step."""
        if not self.is_ready:
            self._answer()
            self.is_ready = True
        time.sleep(0.5)  # the other one's threads come to rest
        self.child.stdin.write("go\n")
        self.child.stdin.flush()
        return self._answer()["seconds"]

    def end(self):
        """Its peak memory, MB: `peak_mb` of the process and `gpu_mb` of its tensors on a GPU."""
        self.child.stdin.close()
        answer = self._answer()
        self.child.wait()
        return answer

    def _answer(self):
        line = "-"
        while line and not line.startswith("{"):  # libraries print too
            line = self.child.stdout.readline()
        if not line:
            sys.exit(f"{self.child.args} ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)


def compare(comparison, pythons, models, rounds, folder):
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(comparison.prompts))
    model = models[comparison.model]
    script, *what = comparison.ours
    dtype = [] if comparison.dtype == "float32" else [comparison.dtype]
    ours = Process(sys.executable, script, [model, prompts, *what, TOKENS, folder, *dtype], folder / "ours.log")
    script, *what = comparison.peer
    last = [comparison.dtype] if script == "generate.py" else [folder / "peer", *dtype]
    peer_arguments = [model, prompts, *what, TOKENS, *last]
    peer = Process(pythons[comparison.peer_python], script, peer_arguments, folder / "peer.log")
    for process in (ours, peer):
        process.step()
    seconds = [(ours.step(), peer.step()) for _ in range(rounds)]
    return {
        "name": comparison.name,
        "peer": comparison.peer_name,
        "ours_seconds": [ours for ours, _ in seconds],
        "peer_seconds": [peer for _, peer in seconds],
        "ours_peak_mb": ours.end()["peak_mb"],
        "peer_peak_mb": peer.end()["peak_mb"],
    }


def versus(options):
    """This code and an older checkout at the same work, in turn."""
    older = Path(options.checkout).resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make_models(folder)
        for comparison in COMPARISONS:
            if options.only and comparison.name not in options.only:
                continue
            prompts = folder / "prompts.txt"
            prompts.write_text("\n".join(comparison.prompts))
            script, *what = comparison.ours
            arguments = [models[comparison.model], prompts, *what, TOKENS]
            sides = []
            for side, root in (("now", HERE.parent), ("older", older)):
                speed, work = root / "benchmarks" / "speed", folder / f"{side}-{len(comparison.name)}"
                work.mkdir(exist_ok=True)
                path = (speed, root / "src")
                sides.append(Process(sys.executable, speed / script, [*arguments, work], work / "log", path))
            for process in sides:
                process.step()
            pairs = [[process.step() for process in sides] for _ in range(options.rounds)]
            now, before = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratios = [mine / theirs for mine, theirs in pairs]
            memory = [process.end()["peak_mb"] for process in sides]
            print(
                f"| {comparison.name} | {now:.2f} s | {before:.2f} s | {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f}-{max(ratios):.3f}) | {memory[0]:.0f} MB | {memory[1]:.0f} MB |",
                flush=True,
            )
        print(machine())


def make_models(folder):
    """The real model as a folder of safetensors, and a random one of GPT-2's size with the same tokenizer."""
    loaded = load_model("smollm2-135m", {}, torch.device("cpu"))
    models = {"smollm2": loaded.model}
    models["gpt2"] = GPT2LMHeadModel(
        GPT2Config(vocab_size=loaded.model.config.vocab_size, bos_token_id=0, eos_token_id=0)
    )
    return {name: save_model(model, loaded.tokenizer, folder / name) for name, model in models.items()}


def save_model(model, tokenizer, folder):
    """A folder that the `transformers` of every peer reads."""
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # the name that transformers 4 and 5 both know
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def machine(*packages):
    """Processor and versions; `packages` are those named beside the usual ones."""
    packages = ", ".join(f"{package} {version(package)}" for package in (*packages, "torch", "transformers", "peft"))
    return f"{os.cpu_count()} cores of {processor_name()}; Python {platform.python_version()}, {packages}"


def run(options):
    pythons = {"trl026": options.trl026, "trl116": options.trl116, "here": sys.executable}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    day = time.strftime("%Y-%m-%d")
    found = results.setdefault(f"{processor_name()}, {day}", {})

    def write():
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make_models(folder)
        for comparison in COMPARISONS:
            if options.only and comparison.name not in options.only:
                continue
            (work := folder / comparison.name.replace(" ", "-")).mkdir()
            row = compare(comparison, pythons, models, options.rounds, work)
            found[comparison.name] = row | {"machine": machine(), "day": day}
            write()
            print(line_of(row), flush=True)
        if not options.only or "floor" in options.only:
            found["floor"] = floor(options.rounds)
            write()
        if not options.only or "first line" in options.only:
            found["first line"] = [seconds_to_first_line(folder / f"demo-{index}") for index in range(3)]
            write()


def line_of(row):
    ours, peer = statistics.median(row["ours_seconds"]), statistics.median(row["peer_seconds"])
    ratios = [a / b for a, b in zip(row["ours_seconds"], row["peer_seconds"], strict=True)]
    memory = row["ours_peak_mb"] / row["peer_peak_mb"]
    return (
        f"| {row['name']} | {row['peer']} | {ours:.2f} s | {peer:.2f} s | **{statistics.median(ratios):.2f}** "
        f"({min(ratios):.2f}–{max(ratios):.2f}) | {row['ours_peak_mb']:.0f} MB | {row['peer_peak_mb']:.0f} MB | "
        f"{memory:.2f} |"
    )


def floor(rounds):
    """Milliseconds of a decode step of 8 that only reads SmolLM2's weights, or only multiplies, at measured rates."""
    num_weights = 134_515_008
    bandwidth, flops = rates(rounds)
    return {
        "bandwidth_gb": bandwidth / 1e9,
        "gflops": flops / 1e9,
        "read_ms": 1000 * num_weights * 4 / bandwidth,
        "multiply_ms": 1000 * 2 * 8 * num_weights / flops,
    }


def rates(rounds):
    """Bytes per second of reading weights from memory, and multiplications and additions per second of fp32."""
    weights, square = torch.randn(134_515_008), torch.randn(2048, 2048)
    for work in (weights.sum, lambda: square @ square):
        work()
    read = statistics.median(_seconds(weights.sum) for _ in range(rounds))
    multiply = statistics.median(_seconds(lambda: square @ square) for _ in range(rounds))
    return weights.numel() * 4 / read, 2 * 2048**3 / multiply


def _seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seconds_to_first_line(folder):
    """From starting `konic demo` to the line of its first iteration; the model is in the cache already."""
    start = time.perf_counter()
    command = [str(Path(sys.executable).with_name("konic")), "demo", "--output", str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in child.stdout:
        if line.startswith("[Iter"):
            break
    seconds = time.perf_counter() - start
    child.kill()
    child.wait()
    return seconds


def show(results):
    """What the docs show: the figures of every processor, one after the other."""
    (RESULTS.parent / "bench.md").write_text("\n".join("\n".join(lines_of(found)) for found in results.values()))


def lines_of(found):
    rows = [found[comparison.name] for comparison in COMPARISONS if comparison.name in found]
    steps = [f"{_step(found, name):.0f} ms ({words})" for name, words in STEPS.items() if _has(found, name)]
    lines = [
        f"{rows[0]['machine']}, {rows[0]['day']}; `make bench`. SmolLM2-135M, in fp32 unless a row says bf16, "
        f"with LoRA r=8 on q_proj and v_proj, 8 responses of {TOKENS} tokens; the GPT-2 shape is a random "
        f"model of its size. Medians of {len(rows[0]['ours_seconds'])} turns each, in one run; ratios are of turns "
        "that follow each other, with their range.",
        "",
        "| | peer | konic | peer | ratio | konic, peak | peer, peak | ratio |",
        "|---|---|---|---|---|---|---|---|",
        *map(line_of, rows),
        "",
    ]
    if base := found.get("floor"):
        lines += [
            f"A decode step of 8 that only reads the weights once would take {base['read_ms']:.0f} ms here "
            f"({base['bandwidth_gb']:.0f} GB/s), one that only multiplies {base['multiply_ms']:.0f} ms "
            f"({base['gflops']:.0f} GFLOP/s). Ours take {', '.join(steps)}, prompts, packing and drawing included.",
            "",
        ]
    if "first line" in found:
        lines += [
            "`konic demo`, the model in the cache: "
            f"{statistics.median(found['first line']):.1f} s from its start to the first iteration's line "
            f"(of {', '.join(f'{seconds:.1f}' for seconds in found['first line'])}).",
            "",
        ]
    return lines


STEPS = {"Llama": "Llama shape", "any": "any model, the same weights", "GPT-2": "GPT-2 shape"}


def _has(found, name):
    return any(key.startswith("sampling") and name in key for key in found)


def _step(found, name):
    row = next(row for key, row in found.items() if key.startswith("sampling") and name in key)
    return 1000 * statistics.median(row["ours_seconds"]) / TOKENS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "show", "versus"))
    parser.add_argument("checkout", nargs="?", help="the older one, for versus")
    parser.add_argument("--trl116", default=".peers/trl-1.16/bin/python")
    parser.add_argument("--trl026", default=".peers/trl-0.26/bin/python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    if options.command == "versus":
        return versus(options)
    if options.command == "run":
        run(options)
    return show(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
