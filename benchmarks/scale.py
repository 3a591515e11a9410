"""Seconds and bytes of an iteration in one and in two processes: sampling, rewards, update, and what they exchange.

python benchmarks/scale.py run [--rounds 3]   measures, and writes benchmarks/results/scale.json
python benchmarks/scale.py show               writes benchmarks/results/scale.md from it
python benchmarks/scale.py lengths            samples real responses, and writes benchmarks/results/lengths.json

SmolLM2-135M in fp32, LoRA r=8 on q_proj and v_proj, PPO with 2 optimizer steps an iteration. Responses are of 48
tokens, rise from 8 to 64, or end at the lengths of real ones (lengths.json), of at most 128. The cases take turns, each
in new processes; the first iteration of each is left out. Before them, 2, 4 and 8 processes only exchange something,
and one process with a tiny model does what every process has to do for all responses (scale_job.py).
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import TOKENS, machine
from konic.finetuning import KonicLLMRewardComposer, LoraConfig
from scale_formulas import most_uneven, read_lengths
from scale_job import EPOCHS, EXCHANGES, ITERATIONS, MESSAGE_BYTES, characters
from scale_model import LENGTHS, LIMIT, RESULTS

CASES = (
    (1, 1, 4, "equal"), (2, 1, 8, "equal"), (1, 2, 8, "equal"), (1, 1, 8, "equal"), (2, 1, 16, "equal"),
    (1, 2, 16, "equal"), (1, 1, 16, "equal"), (2, 1, 8, "rising"), (2, 1, 8, "real"), (2, 1, 16, "real"),
)  # fmt: skip
"""Processes, threads of each, responses of all, and their lengths."""
TALKING = (2, 4, 8)
"""Processes that only exchange something. More than two of them share the two cores."""
WHOLE = (64, 256, 1024)
"""Responses that one process works on as each process does for all responses."""


def lengths_of(batch, kind):
    """Response tokens [batch] of a case, the same in every round.

    Of the real ones, those that divide the work most unevenly. Nearly every share of real ones has a response of full
    length; rising ones let a process wait in sampling too.
    """
    if kind == "real":
        return most_uneven(read_lengths(LENGTHS, LIMIT), batch)
    return [*range(8, 8 * batch + 1, 8)] if kind == "rising" else [TOKENS] * batch


def sample_lengths(num_prompts=32, each=4):
    """Write the lengths of what the untrained policy answers to prompts of the demo, `each` times to every prompt.

    It samples them as the first iteration of a run does, all at once: [num_prompts * each], prompt by prompt.
    """
    import torch

    from konic.finetuning import DatasetConfig, DatasetSource, GenerationConfig, KonicFinetuningAgent
    from konic.finetuning.data.prompts import load_prompts
    from konic.finetuning.data.tokenization import make_prompt_batch
    from konic.finetuning.learning.learner import build_learner
    from konic.finetuning.rollout.sampler import RandomKey

    torch.set_num_threads(1)
    dataset = DatasetConfig(source=DatasetSource.BUNDLED, held_out=num_prompts)
    generation = GenerationConfig(max_new_tokens=LIMIT, max_prompt_length=64, temperature=0.7)  # as in the demo
    agent = KonicFinetuningAgent(
        base_model="smollm2-135m",
        reward_composer=KonicLLMRewardComposer().add_reward_function(characters),
        lora_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        dataset_config=dataset,
        generation_config=generation,
    )
    learner = build_learner(agent, torch.device("cpu"))
    prompts = [prompt for prompt in load_prompts(dataset).held_out for _ in range(each)]
    batch = make_prompt_batch(prompts, learner.policy.tokenizer, 64, learner.special_tokens.pad, torch.device("cpu"))
    lengths = learner.sampler(batch, generation, RandomKey(seed=0, iteration=1)).response_mask.sum(dim=1).tolist()
    source = f"SmolLM2-135M-Instruct before training: {each} responses to each of {num_prompts} prompts of konic demo"
    found = {"source": source, "temperature": 0.7, "limit": LIMIT, "machine": machine()}
    found |= {"day": time.strftime("%Y-%m-%d"), "command": "python benchmarks/scale.py lengths", "lengths": lengths}
    LENGTHS.write_text(json.dumps(found) + "\n")
    return lengths


def measure(kind, size, threads=1, **options):
    """What each process of a job of scale_job.py found."""
    with tempfile.TemporaryDirectory() as output, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        several = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        several["OMP_NUM_THREADS"] = str(threads)
        free.close()
        job = [str(Path(__file__).with_name("scale_job.py")), output, kind, json.dumps(options)]
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", *job],
                env=os.environ | several | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(size)
        ]
        try:
            if [process.wait() for process in started] != [0] * size:
                sys.exit(f"{size} processes of {kind} {options} failed")
        finally:
            for process in started:
                process.kill()
        return [json.loads((Path(output) / f"{rank}.json").read_text()) for rank in range(size)]


def run(rounds):
    found = {"machine": machine(), "day": time.strftime("%Y-%m-%d"), "rounds": rounds, "steps": EPOCHS}
    found |= {"load": os.getloadavg()[0], "message bytes": MESSAGE_BYTES}
    found["exchanges"] = [{"processes": size} | means(measure("exchange", size)) for size in TALKING]
    found["whole"] = [measure("whole", 1, batch=batch)[0] for batch in WHOLE]
    turns = {case: [] for case in CASES}
    for _, case in itertools.product(range(rounds), CASES):
        size, threads, batch, kind = case
        begun = time.monotonic()
        lengths = lengths_of(batch, kind)
        turns[case].append(measure("iteration", size, threads=threads, lengths=lengths))
        total = turns[case][-1][0]["iterations"][0]["total"]
        took, load = time.monotonic() - begun, os.getloadavg()[0]
        print(case, f"{total:.2f} s an iteration, {took:.0f} s in all, load {load:.1f}", flush=True)
        found["cases"] = [
            {"processes": case[0], "threads": case[1], "batch": case[2], "lengths": lengths_of(*case[2:])}
            | summary(of_case)
            for case, of_case in turns.items()
            if of_case
        ]
        (RESULTS / "scale.json").write_text(json.dumps(found, indent=1) + "\n")


def means(found):
    """The means over the processes of each number that all of them found."""
    return {name: statistics.fmean(each[name] for each in found) for name in found[0]}


def summary(turns):
    """The medians over the iterations of all turns, each the mean of its processes; bytes of the first process."""
    iterations = [each for found in turns for each in zip(*(of["iterations"] for of in found), strict=True)]

    def median(take):
        return statistics.median(statistics.fmean(map(take, processes)) for processes in iterations)

    def medians(kind):
        names = sorted({name for processes in iterations for each in processes for name in each[kind]})
        return {name: median(lambda each: each[kind].get(name, 0.0)) for name in names}  # noqa: B023

    return {
        "total": median(lambda each: each["total"]),
        "rest": median(lambda each: each["total"] - sum(each["seconds"].values())),
        "seconds": medians("seconds"),
        "processor": medians("processor"),
        "bytes": turns[-1][0]["iterations"][-1]["bytes"],
        "wire": median(lambda each: each["wire"]),
        "adapter": turns[0][0]["adapter"],
        "iterations": len(turns) * ITERATIONS,
    }


def shown(found):
    lines = [
        "# One and two processes",
        "",
        f"{found['machine']}, {found['day']}; `python benchmarks/scale.py run`, {found['rounds']} rounds, load before "
        f"it {found['load']:.1f}. Medians of an iteration; of two processes, their mean. Seconds of the processor "
        "are those of all threads of a process; those until the first token are part of sampling.",
        "",
        "| processes | threads of each | responses | tokens of each | until the first token, processor "
        "| sampling, processor | update, processor | rewards | waiting | gradients | messages | iteration, clock |",
        "|" + "---|" * 12,
    ]
    for case in found["cases"]:
        processor, seconds = case["processor"], case["seconds"]
        numbers = [processor["prompts"], processor["sampling"], processor["update"], processor["rewards"]]
        numbers += [seconds.get(name, 0.0) for name in ("waiting", "gradients", "messages")] + [case["total"]]
        cells = " | ".join(f"{number:.3g} s" for number in numbers)
        lines.append(f"| {case['processes']} | {case['threads']} | {case['batch']} | {tokens(case)} | {cells} |")
    lines += [
        "",
        "Bytes that the first process gives to the others in an iteration; the last column is what TCP has carried "
        "away, the mean of both. Messages in rewards are two: each process's values, and the rewards of all from the "
        "first process, to whose size the others fill up theirs.",
        "",
        "| processes | responses | tokens of each | adapter | gradients of a step | messages in sampling | in rewards "
        "| in a step | other | all | by TCP |",
        "|" + "---|" * 11,
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
        lines.append(f"| {case['processes']} | {case['batch']} | {tokens(case)} | {cells} |")
    lines += [
        "",
        f"Milliseconds of an exchange without the waiting, medians of {EXCHANGES}, each after "
        "work that empties the caches; the mean of the processes. Four and eight processes share the two cores.",
        "",
        "| processes | message of 1 kB | message of 1 MB | sum of one number | sum of the adapter's gradients |",
        "|---|---|---|---|---|",
    ]
    for each in found["exchanges"]:
        names = ("small message", "large message", "small sum", "large sum")
        lines.append(f"| {each['processes']} | " + " | ".join(f"{1000 * each[name]:.3g}" for name in names) + " |")
    lines += [
        "",
        "What each process does for the responses of all, whatever their number: everything but sampling, scoring, "
        "rewards and passes of the update (one process, one thread, a tiny model).",
        "",
        "| response tokens | seconds |",
        "|---|---|",
        *(f"| {each['tokens']:,} | {each['seconds']:.3g} |" for each in found["whole"]),
    ]
    return lines


def tokens(case):
    lowest, highest = min(case["lengths"]), max(case["lengths"])
    return str(highest) if lowest == highest else f"{lowest} to {highest}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "show", "lengths"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "lengths":
        print(sorted(sample_lengths()))
        sys.exit()
    if options.what == "run":
        run(options.rounds)
    text = "\n".join(shown(json.loads((RESULTS / "scale.json").read_text()))) + "\n"
    (RESULTS / "scale.md").write_text(text)
    print(text)
