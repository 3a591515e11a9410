"""Held-out reward over the KL paid for it, on the demo's task: every algorithm here, and TRL's GRPO.

python benchmarks/curves.py run [--peer PYTHON] [--seeds 0 1 2] [--only NAME ...] [--results FILE]
python benchmarks/curves.py judge
python benchmarks/curves.py show

`run` adds a line per evaluation to benchmarks/results/curves.jsonl and leaves out what stands there already, so it can
be stopped and started again. PYTHON is that of an environment with TRL. `judge` reads the responses of the first and
the last evaluation of each run, and puts its numbers in their place. `show` writes the tables and the picture that the
docs show.

A run ends after as many responses as 300 seconds of training gave on two cores of an AMD EPYC, the machine of the first
rows, and is therefore the same on any machine. At every fifth of them the policy is tried on the 64 held-out prompts.
"""

import argparse
import copy
import csv
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from konic.demo import build_agent
from konic.finetuning import (
    HuggingFaceRewardModel,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    TrainingConfig,
)
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.learning.learner import build_learner
from konic.finetuning.models.loading import load_model, pick_device
from konic.finetuning.results.intervals import distinct_n, mean
from konic.finetuning.rewards.scoring import Scorer
from konic.finetuning.rollout.evaluation import evaluate

HERE = Path(__file__).parent
OPINIONS = HERE.parent / "examples" / "data" / "film_opinions.csv"
RESULTS = HERE / "results" / "curves.jsonl"
EVALUATIONS = 5
RESPONSES, PEER_RESPONSES = 480, {1: 272, 4: 136}
"""What 300 seconds gave: to every algorithm here, and to TRL by the number of passes."""

OURS = {
    "konic ppo": {},
    "konic ppo, KL in the loss": {"kl_placement": "loss"},
    "konic rloo": {"algorithm": "rloo"},
    "konic grpo": {"algorithm": "grpo"},
    "konic dr_grpo": {"algorithm": "dr_grpo"},
    "konic reinforce++": {"algorithm": "reinforce++"},
    **{f"konic {name}": {"algorithm": name} for name in ("dapo", "dppo", "gspo", "cispo", "sapo", "max_rl", "gdpo")},
    "konic ppo, 2 passes": {"ppo_epochs": 2},
    "konic TrainingConfig()": None,
}
"""Settings other than the demo's; None takes konic's defaults."""
PEER = {
    f"TRL {loss}, {rate:g}, {passes} passes" if passes > 1 else f"TRL {loss}, {rate:g}, 1 pass": (loss, rate, passes)
    for loss, rates in {"grpo": (1e-3, 5e-4, 3e-4), "dapo": (1e-3,), "cispo": (1e-3,), "gspo": (1e-3,)}.items()
    for passes in (4, 1)
    for rate in rates
}
"""The loss as peer_trl.py names it, the learning rate, and the passes over each batch."""


class Pause(KonicFinetuningCallback):
    """Ends `train` after `until` responses, so that the policy is evaluated, and counts the seconds."""

    def __init__(self):
        super().__init__(verbose=False)
        self.seconds, self.responses, self.until = 0.0, 0, 0

    def should_stop_early(self, result):
        self.seconds += result.total_time_sec
        self.responses += result.num_samples
        return self.responses >= self.until


def agent_of(settings, seed=0, full=False, held_out=64):
    """The demo's agent with other training settings; `full` trains every weight."""
    demo = build_agent(held_out=held_out)
    if settings and "algorithm" in settings:
        settings = {"kl_placement": None, **settings}  # each row's own place
    return KonicFinetuningAgent(
        base_model=demo.get_base_model(),
        reward_composer=demo.get_reward_composer(),
        lora_config=None if full else demo.get_lora_config(),
        dataset_config=demo.get_dataset_config(),
        training_config=(
            TrainingConfig(seed=seed)
            if settings is None
            else demo.get_training_config().with_fields({"seed": seed, **settings})
        ),
        generation_config=demo.get_generation_config(),
    )


class TextJudge:
    """Judges text by what no reward saw: the base model, and a classifier trained on labelled film opinions."""

    def __init__(self, folder):
        command = [str(Path(sys.executable).with_name("konic")), "reward-model", "train", str(OPINIONS)]
        columns = ["--base", "all-minilm-l6-v2", "--text", "text", "--label", "label", "--output", str(folder)]
        subprocess.run([*command, *columns], check=True, capture_output=True)
        self.opinion = HuggingFaceRewardModel(str(folder), output="probability", label_index=1)
        loaded = load_model(build_agent().get_base_model(), {}, torch.device("cpu"))
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        with OPINIONS.open(encoding="utf-8") as file:
            context = "".join(f"{row['text']}\n\n" for row in islice(csv.DictReader(file), 4))
        ids = self.tokenizer(context, return_tensors="pt").input_ids
        with torch.no_grad():
            self.context = self.model(ids, use_cache=True).past_key_values

    def judge(self, pairs):
        """Means over responses to prompts: nats per token under the base model, alone and after four opinions; and the
        probability that the classifier calls the text a good opinion.
        """
        pairs = [pair for pair in pairs if pair[1].strip()]
        return {
            "base_loss": mean([self._loss(prompt, response) for prompt, response in pairs]),
            "context_loss": mean([self._loss(prompt, response, self.context) for prompt, response in pairs]),
            "opinion": mean(self.opinion.score([p for p, _ in pairs], [r for _, r in pairs])),
        }

    @torch.no_grad()
    def _loss(self, prompt, response, context=None):
        start = len(self.tokenizer(prompt).input_ids)
        ids = torch.tensor([self.tokenizer(prompt + response).input_ids])
        cache = copy.deepcopy(context)  # the model adds to it
        logits = self.model(ids, past_key_values=cache).logits
        log_probs = logits[0, start - 1 : -1].log_softmax(-1)
        return -log_probs.gather(-1, ids[0, start:, None]).mean().item()


def point(evaluation, *, seconds, samples, is_end):
    """A row of the results; the judge, which is slow, reads the responses of the first and the last."""
    return (
        {"seconds": seconds, "samples": samples}
        | ({"pairs": [*zip(evaluation.prompts, evaluation.responses, strict=True)]} if is_end else {})
        | {
            "reward": evaluation.reward_mean,
            "parts": evaluation.reward_breakdown_mean,
            "kl": mean(evaluation.kl_per_response),
            "tokens": mean(evaluation.response_lengths),
            "distinct_2": distinct_n(evaluation.responses),
            "examples": evaluation.responses[:3],
        }
    )


def run_ours(settings, seed):
    """Points of one run of ours, the first before training."""
    clock = Pause()
    with tempfile.TemporaryDirectory() as folder:
        engine = KonicFinetuningEngine.from_agent(
            agent_of(settings, seed), checkpoint_dir=f"{folder}/run", callback=clock
        )
        for part in range(1, EVALUATIONS + 1):
            clock.until = RESPONSES * part // EVALUATIONS
            result = engine.train(1000)
            if part == 1:
                yield point(result.before, seconds=0.0, samples=0, is_end=True)
            is_end = part == EVALUATIONS
            yield point(result.after, seconds=clock.seconds, samples=clock.responses, is_end=is_end)


def run_peer(python, loss, rate, passes, seed):
    """Points of one run of TRL's, evaluated by our code on the same prompts with the same random numbers."""
    agent = agent_of({}, seed)
    with tempfile.TemporaryDirectory() as folder:
        command = [python, HERE / "peer_trl.py", folder, "--loss", loss, "--learning-rate", rate]
        command += ["--num-iterations", passes, "--seed", seed]
        command += ["--responses", PEER_RESPONSES[passes], "--saves", EVALUATIONS]
        paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
        source = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        subprocess.run([str(part) for part in command], check=True, capture_output=True, env=os.environ | source)
        yield from peer_points(Path(folder), agent, seed)


def peer_points(folder, agent, seed):
    steps = json.loads((folder / "steps.json").read_text())
    learner = build_learner(agent, pick_device("auto"))
    prompts = load_prompts(agent.get_dataset_config()).held_out
    saved = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    for path in [None, *saved]:
        if path is not None:
            set_peft_model_state_dict(learner.policy.model, load_file(path / "adapter_model.safetensors"))
        with Scorer(agent.get_reward_composer(), agent.get_training_config()) as scorer:
            generation = agent.get_generation_config()
            evaluation = evaluate(
                learner.policy, learner.sampler, scorer, prompts, generation, learner.special_tokens, seed, moments={}
            )
        responses = 0 if path is None else int(path.name)
        yield point(
            evaluation,
            seconds=steps["seconds"][str(responses)],
            samples=responses,
            is_end=path in (None, saved[-1]),
        )


def machine():
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),  # noqa: SIM115
        platform.processor(),
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    card = f"one {torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    count = len(os.sched_getaffinity(0))
    cores = "1 core" if count == 1 else f"{count} cores"
    return f"{card}{cores} of {cpu}; Python {platform.python_version()}, {packages}, TRL 1.16.0"


def run(options):
    done = {(row["system"], row["seed"]) for row in rows(options.results)}
    systems = {name: lambda seed, s=settings: run_ours(s, seed) for name, settings in OURS.items()}
    if options.peer:
        systems |= {name: lambda seed, p=setting: run_peer(options.peer, *p, seed) for name, setting in PEER.items()}
    for seed in options.seeds:
        for name, points in systems.items():
            if (name, seed) in done or (options.only and name not in options.only):
                continue
            found = [{"system": name, "seed": seed, "machine": machine()} | row for row in points(seed)]
            with options.results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
            last = found[-1]
            print(f"{name}, seed {seed}: {found[0]['reward']:.3f} -> {last['reward']:.3f} at {last['kl']:.2f} nats, "
                  f"{last['seconds']:.0f} s, {last['samples']} samples", flush=True)  # fmt: skip
            gc.collect()


def judge(file):
    """Put the judge's numbers in the place of the responses."""
    found = rows(file)
    with tempfile.TemporaryDirectory() as folder:
        judged, by_text = TextJudge(Path(folder) / "judge"), {}
    for number, row in enumerate(found):
        pairs = row.pop("pairs", None)
        if pairs is not None:
            key = json.dumps(pairs)  # untrained models of one seed say the same
            by_text[key] = by_text.get(key) or judged.judge(pairs)
            row |= by_text[key]
            write(file, found[: number + 1] + rows(file)[number + 1 :])


def write(file, found):
    changed = file.with_suffix(".new")
    changed.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    changed.replace(file)


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "judge", "show"])
    parser.add_argument("--peer", help="the python of an environment with TRL 1.16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of systems, such as 'konic ppo'")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file to add to")
    options = parser.parse_args()
    if options.action == "run":
        run(options)
    elif options.action == "judge":
        judge(options.results)
    else:
        from curves_show import show

        show(rows(options.results))


if __name__ == "__main__":
    sys.exit(main())
