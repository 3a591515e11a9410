"""Seconds and bytes of an iteration in one and in two processes: sampling, rewards, update, and what they exchange.

python benchmarks/scale.py run [--rounds 3]   measures, and writes benchmarks/results/scale.json
python benchmarks/scale.py show               writes benchmarks/results/scale.md from it

SmolLM2-135M in fp32, LoRA r=8 on q_proj and v_proj, responses of 48 tokens, PPO with 2 optimizer steps an iteration.
The cases take turns, each in new processes; the first iteration of each is left out. Nothing of konic is changed to be
measured: the calls by which processes exchange anything are wrapped here, and the bytes that left a process are those
that the kernel counts for its TCP connections.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench import PROMPTS, TOKENS, machine

RESULTS = Path(__file__).parent / "results" / "scale.json"
EPOCHS, ITERATIONS = 2, 1
CASES = [(1, 1, 4), (2, 1, 8), (1, 2, 8), (1, 1, 8), (2, 1, 16), (1, 2, 16), (1, 1, 16)]
"""Processes, threads of each, responses of all."""
_BYTES_ACKED = 120
"""Where Linux's tcp_info has the bytes that the other end has acknowledged."""


class Meter:
    """The seconds, processor seconds and bytes of this process, by what it was doing."""

    def __init__(self):
        self.stage, self.iterations, self.counted = "rest", [], []
        self._new()

    def _new(self):
        self.seconds, self.processor, self.bytes = Counter(), Counter(), Counter()
        self.start, self.wire = self._now(), bytes_sent()

    def staged(self, stage, function):
        """The function, whose time is that of a stage, without that of exchanges inside it."""

        def call(*values, **named):
            self.stage = stage
            with self.counting(stage):
                answer = function(*values, **named)
            self.stage = "rest"
            return answer

        return call

    def exchanged(self, what, function, size=None):
        """The function, whose time is that of an exchange; `size` gives the bytes of its argument."""

        def call(group, *values, **named):
            if size is not None:
                self.bytes[f"{what} in {self.stage}"] += size(values[0])
                self.bytes[f"{what} calls in {self.stage}"] += 1
            with self.counting(what):
                return function(group, *values, **named)

        return call

    def counting(self, name):
        return _Counting(self, name)

    def _now(self):
        return time.perf_counter(), time.process_time()

    def end_iteration(self):
        seconds, processor = (end - start for end, start in zip(self._now(), self.start, strict=True))
        self.iterations.append({
            "total": seconds, "seconds": dict(self.seconds), "processor total": processor,
            "processor": dict(self.processor), "bytes": dict(self.bytes), "wire": bytes_sent() - self.wire,
        })  # fmt: skip
        self._new()


class _Counting:
    """Counts the time of its block for a name, and takes it from the block around it."""

    def __init__(self, meter, name):
        self.meter, self.name, self.inner = meter, name, (0.0, 0.0)

    def __enter__(self):
        self.begun = self.meter._now()
        self.meter.counted.append(self)

    def __exit__(self, *_):
        self.meter.counted.pop()
        spent = [end - start for end, start in zip(self.meter._now(), self.begun, strict=True)]
        self.meter.seconds[self.name] += spent[0] - self.inner[0]
        self.meter.processor[self.name] += spent[1] - self.inner[1]
        if self.meter.counted:
            outer = self.meter.counted[-1]
            outer.inner = outer.inner[0] + spent[0], outer.inner[1] + spent[1]


def bytes_sent():
    """The bytes that have left this process by TCP."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as same:
                if same.family in (socket.AF_INET, socket.AF_INET6) and same.type == socket.SOCK_STREAM:
                    info = same.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("<Q", info, _BYTES_ACKED)[0]
        except OSError:  # it was closed meanwhile, as the file descriptor of the folder is
            continue
    return total


def job(output, threads, batch):
    """What one process runs."""
    import torch

    torch.set_num_threads(threads)
    import torch.distributed as dist

    import konic.finetuning.trainer as trainer
    from konic.finetuning import (
        DatasetConfig,
        GenerationConfig,
        KonicFinetuningAgent,
        KonicFinetuningCallback,
        KonicFinetuningEngine,
        KonicLLMRewardComposer,
        LoraConfig,
        TrainingConfig,
    )
    from konic.finetuning.rewards.scoring import Scorer
    from konic.finetuning.system import group

    def characters(prompt: str, response: str) -> float:
        return float(len(response))

    agent = KonicFinetuningAgent(
        base_model="smollm2-135m",
        reward_composer=KonicLLMRewardComposer().add_reward_function(characters),
        lora_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        dataset_config=DatasetConfig(prompts=PROMPTS),
        training_config=TrainingConfig(batch_size=batch, ppo_epochs=EPOCHS, num_minibatches=1, learning_rate=1e-4),
        generation_config=GenerationConfig(max_new_tokens=TOKENS, min_new_tokens=TOKENS, temperature=1.0),
    )
    meter = Meter()
    trainer.sample_rollout = meter.staged("sampling", trainer.sample_rollout)
    trainer.update = meter.staged("update", trainer.update)
    Scorer.score = meter.staged("rewards", Scorer.score)
    group.Group._exchange = meter.exchanged("messages", group.Group._exchange, len)
    group.Group.sum_ = meter.exchanged("gradients", group.Group.sum_, lambda sums: sum(each.nbytes for each in sums))
    dist.monitored_barrier = meter.exchanged("waiting", dist.monitored_barrier)

    last_exchange = trainer.Trainer._reason_to_stop

    def reason_to_stop(self, *given):
        reason = last_exchange(self, *given)
        meter.end_iteration()
        return reason

    trainer.Trainer._reason_to_stop = reason_to_stop
    engine = KonicFinetuningEngine.from_agent(
        agent, checkpoint_dir=Path(output) / "run", callback=KonicFinetuningCallback(verbose=False), device="cpu"
    )
    engine.train(1 + ITERATIONS, save_every=0)
    world = engine._session.world
    found = {
        "iterations": meter.iterations[1:],
        "adapter": sum(each.nbytes for each in engine._session.learner.policy.trainable().values()),
        "link": link(world) if world.size > 1 else None,
    }
    (Path(output) / f"{world.rank}.json").write_text(json.dumps(found))


def link(world):
    """Seconds of small and of large exchanges without anything else to do, each the median of 20."""
    import torch

    def median(exchange):
        times = []
        for _ in range(20):
            world.gather({})  # all begin together
            start = time.perf_counter()
            exchange()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    small, large = torch.zeros(1), torch.zeros(4 * 2**20)
    return {
        "message": median(lambda: world.gather({})),
        "small sum": median(lambda: world.sum_([small])),
        "large sum": median(lambda: world.sum_([large])),
        "large bytes": large.nbytes,
    }


def read_seconds():
    """Processor seconds in which a process reads the message of another one, with 8 responses; the median of 200."""
    import torch

    from konic.finetuning.system.group import _read, _write

    floats = ("log_probs", "ref_log_probs", "kl", "entropy", "values", "samples.log_probs")
    message = {name: torch.zeros(8, TOKENS) for name in floats}
    message |= {"ids": torch.zeros(8, TOKENS, dtype=torch.int64), "mask": torch.zeros(8, TOKENS, dtype=torch.bool)}
    payload, times = _write(message), []
    for _ in range(200):
        start = time.process_time()
        _read(payload)
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(size, threads, batch):
    """What each process of a case found."""
    with tempfile.TemporaryDirectory() as output, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        several = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "job", output, str(threads), str(batch)],
                env=os.environ
                | several
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(threads)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(size)
        ]
        try:
            if [process.wait() for process in started] != [0] * size:
                sys.exit(f"{size} processes of {threads} threads with {batch} responses failed")
        finally:
            for process in started:
                process.kill()
        return [json.loads((Path(output) / f"{rank}.json").read_text()) for rank in range(size)]


def run(rounds):
    found = {"machine": machine(), "day": time.strftime("%Y-%m-%d"), "rounds": rounds, "steps": EPOCHS}
    found |= {"load": os.getloadavg()[0], "read": read_seconds()}
    cases = {case: [] for case in CASES}
    for _, case in itertools.product(range(rounds), CASES):
        begun = time.monotonic()
        cases[case].append(measure(*case))
        total = statistics.median(each["total"] for each in cases[case][-1][0]["iterations"])
        took, load = time.monotonic() - begun, os.getloadavg()[0]
        print(case, f"{total:.2f} s an iteration, {took:.0f} s in all, load {load:.1f}", flush=True)
        found["cases"] = [
            {"processes": size, "threads": threads, "batch": batch} | summary(turns)
            for (size, threads, batch), turns in cases.items()
            if turns
        ]
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def summary(turns):
    """The medians over the iterations of all turns; of several processes, their mean, and bytes of the first."""
    of_processes = [turn for found in turns for turn in found]
    iterations = [each for found in of_processes for each in found["iterations"]]

    def median(take):
        return statistics.median(map(take, iterations))

    names = sorted({name for each in iterations for name in each["seconds"]})
    counted = turns[-1][0]["iterations"][-1]
    links = [found["link"] for found in of_processes if found["link"]]
    return {
        "total": median(lambda each: each["total"]),
        "seconds": {name: median(lambda each: each["seconds"].get(name, 0.0)) for name in names},  # noqa: B023
        "processor": {name: median(lambda each: each["processor"].get(name, 0.0)) for name in names},  # noqa: B023
        "bytes": counted["bytes"],
        "wire": median(lambda each: each["wire"]),
        "adapter": of_processes[0]["adapter"],
        "iterations": len(turns) * ITERATIONS,
        "link": {name: statistics.median(each[name] for each in links) for name in links[0]} if links else None,
    }


def shown(found):
    lines = [
        "# One and two processes",
        "",
        f"{found['machine']}, {found['day']}; `python benchmarks/scale.py run`, {found['rounds']} rounds, load before "
        f"it {found['load']:.1f}. Medians of an iteration; of two processes, of one of them. Seconds of the processor "
        "are those of all threads of a process.",
        "",
        "| processes | threads of each | responses | sampling, processor | update, processor | rewards | waiting "
        "| gradients | messages | iteration, clock |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        processor, seconds = case["processor"], case["seconds"]
        numbers = [processor["sampling"], processor["update"], processor["rewards"]]
        numbers += [seconds.get(name, 0.0) for name in ("waiting", "gradients", "messages")] + [case["total"]]
        cells = " | ".join(f"{number:.3g} s" for number in numbers)
        lines.append(f"| {case['processes']} | {case['threads']} | {case['batch']} | {cells} |")
    lines += [
        "",
        "Bytes that a process gives to the others in an iteration; the last column is what TCP has carried away.",
        "",
        "| processes | responses | adapter | gradients of a step | messages in sampling | in rewards | in a step "
        "| other | all | by TCP |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        if not case["bytes"]:
            continue
        names = ("gradients in update", "messages in sampling", "messages in rewards", "messages in update",
                 "messages in rest")  # fmt: skip
        gradients, sampling, rewards, update, rest = (case["bytes"][name] for name in names)
        steps = found["steps"]
        numbers = [case["adapter"], gradients // steps, sampling, rewards, update // steps, rest]
        numbers += [gradients + sampling + rewards + update + rest, round(case["wire"])]
        cells = " | ".join(f"{number:,}" for number in numbers)
        lines.append(f"| {case['processes']} | {case['batch']} | {cells} |")
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        job(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "run":
        run(options.rounds)
    text = "\n".join(shown(json.loads(RESULTS.read_text()))) + "\n"
    RESULTS.with_suffix(".md").write_text(text)
    print(text)
