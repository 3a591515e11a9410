"""What the processes of scale.py run. Each writes what it found to FOLDER/RANK.json.

python benchmarks/scale_job.py FOLDER iteration '{"lengths": [48, 48]}'   seconds and bytes of iterations
python benchmarks/scale_job.py FOLDER exchange '{}'                       seconds of exchanges, each after other work
python benchmarks/scale_job.py FOLDER whole '{"batch": 256}'              seconds of work on the responses of all

They are started as torchrun starts processes, with OMP_NUM_THREADS.

Nothing of konic is changed to be measured: its functions are wrapped here. The bytes that left a process are those that
the kernel counts for its TCP connections. Seconds are those of the clock, unless they are called the processor's, which
are those of all threads of the process.
"""

import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from bench import PROMPTS, TOKENS
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
from scale_formulas import shares

EPOCHS, ITERATIONS = 2, 1
EXCHANGES = 20
COLD_BYTES = 64 * 2**20
"""What is read and written before an exchange that is timed: more than the caches hold."""
MESSAGE_BYTES = {"small": 1_000, "large": 2**20}
ADAPTER = ((8, 576),) * 60 + ((576, 8),) * 30 + ((192, 8),) * 30 + ((577,),)
"""Shapes of the gradients: SmolLM2-135M, LoRA r=8 on q_proj and v_proj, and the value head; 1,845,508 bytes."""
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

    def timed(self, name, function):
        """The function, whose time is counted for a name, and not for the stage that calls it."""

        def call(*values, **named):
            with self.counting(name):
                return function(*values, **named)

        return call

    def sized(self, what, function, size):
        """The function, a method of Group; `size` gives the bytes of its argument."""

        def call(group, given):
            self.bytes[f"{what} in {self.stage}"] += size(given)
            self.bytes[f"{what} calls in {self.stage}"] += 1
            return function(group, given)

        return call

    def counting(self, name):
        return _Counting(self, name)

    def first_token(self):
        """Count what sampling has taken until now: the packing of weights, and the reading of the prompts."""
        self.processor["prompts"] = self._now()[1] - self.counted[-1].begun[1]

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


def meter_exchanges(meter):
    """Messages with their writing and reading, gradients with their copies, and the waiting for the others before."""
    import torch.distributed as dist

    from konic.finetuning.system.group import Group

    Group._exchange = meter.sized("messages", Group._exchange, len)
    Group.gather = meter.timed("messages", Group.gather)
    summed = meter.sized("gradients", Group.sum_, lambda tensors: sum(each.nbytes for each in tensors))
    Group.sum_ = meter.timed("gradients", summed)
    dist.monitored_barrier = meter.timed("waiting", dist.monitored_barrier)


def end_iterations(meter):
    """Let the meter begin anew after the last exchange of each iteration."""
    from konic.finetuning.trainer import Trainer

    last_exchange = Trainer._reason_to_stop

    def reason_to_stop(self, *given):
        reason = last_exchange(self, *given)
        meter.end_iteration()
        return reason

    Trainer._reason_to_stop = reason_to_stop


def force_lengths(lengths, on_first_token):
    """Make each response of this process end at its length, given in the order of the batch."""
    from konic.finetuning.rollout import local_sampler

    make_chooser = local_sampler._chooser

    def make_forced(generation, eos, batch):
        choose, ends = make_chooser(generation, eos, batch), torch.tensor(lengths)

        def forced(logits, step, uniform, rows):
            if step == 0:
                on_first_token()
            return torch.where(ends[rows] == step + 1, eos[0], choose(logits, step, uniform, rows))

        return forced

    local_sampler._chooser = make_forced


def characters(prompt: str, response: str) -> float:
    return float(len(response))


def trained(folder, model, batch, limit, iterations):
    """The engine after some iterations."""
    agent = KonicFinetuningAgent(
        base_model=model,
        reward_composer=KonicLLMRewardComposer().add_reward_function(characters),
        lora_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        dataset_config=DatasetConfig(prompts=PROMPTS),
        training_config=TrainingConfig(batch_size=batch, ppo_epochs=EPOCHS, num_minibatches=1, learning_rate=1e-4),
        generation_config=GenerationConfig(max_new_tokens=limit, min_new_tokens=limit, max_prompt_length=64),
    )
    quiet = KonicFinetuningCallback(verbose=False)
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=Path(folder) / "run", callback=quiet, device="cpu")
    engine.train(iterations, save_every=0)
    return engine


def iteration(folder, lengths):
    """Seconds and bytes of iterations with responses of these lengths, the first iteration left out."""
    from konic.finetuning import trainer
    from konic.finetuning.rewards.scoring import Scorer

    meter = Meter()
    trainer.sample_rollout = meter.staged("sampling", trainer.sample_rollout)
    trainer.update = meter.staged("update", trainer.update)
    Scorer.score = meter.staged("rewards", Scorer.score)
    meter_exchanges(meter)
    end_iterations(meter)
    own = shares(lengths, int(os.environ["WORLD_SIZE"]))[int(os.environ["RANK"])]
    force_lengths(own, meter.first_token)
    engine = trained(folder, "smollm2-135m", len(lengths), max(lengths), 1 + ITERATIONS)
    adapter = sum(each.nbytes for each in engine._session.learner.policy.trainable().values())
    return {"iterations": meter.iterations[1:], "adapter": adapter}


def exchange(folder):
    """Seconds of messages and sums as a training has them: with cold caches, without the waiting; medians of 20."""
    from konic.finetuning.system.group import Group

    meter = Meter()
    meter_exchanges(meter)
    world, cold = Group.joined(600), torch.zeros(COLD_BYTES // 4)
    gradients = {"small": [torch.zeros(1)], "large": [torch.zeros(shape) for shape in ADAPTER]}
    found = {}
    for name, num_bytes in MESSAGE_BYTES.items():
        meter.iterations.clear()
        for _ in range(EXCHANGES):
            cold.add_(1)
            world.gather({"message": torch.zeros(num_bytes, dtype=torch.uint8)})
            world.sum_(gradients[name])
            meter.end_iteration()
        for what, stage in (("message", "messages"), ("sum", "gradients")):
            found[f"{name} {what}"] = statistics.median(each["seconds"][stage] for each in meter.iterations)
    return found


def whole(folder, batch):
    """Seconds of what each process does for the responses of all, however many processes there are.

    It is an iteration without sampling, scoring, rewards and passes of the update. A tiny model serves, as this work is
    with tokens, texts and numbers of the responses.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from conftest import byte_tokenizer, tiny_model
    from konic.finetuning.learning.gradients import StepGradients
    from konic.finetuning.rewards.scoring import Scorer
    from konic.finetuning.rollout import rollout
    from konic.finetuning.rollout.local_sampler import LocalSampler

    meter = Meter()
    LocalSampler.__call__ = meter.timed("own", LocalSampler.__call__)
    rollout.score_under_reference = meter.timed("own", rollout.score_under_reference)
    Scorer._own_outcomes = meter.timed("own", Scorer._own_outcomes)
    StepGradients._accumulate_own = meter.timed("own", StepGradients._accumulate_own)
    end_iterations(meter)
    with tempfile.TemporaryDirectory() as model:
        tiny_model("llama", torch.float32).save_pretrained(model)
        byte_tokenizer("llama").save_pretrained(model)
        trained(folder, model, batch, TOKENS, 1 + 2)
    seconds = statistics.median(each["total"] - each["seconds"]["own"] for each in meter.iterations[1:])
    return {"tokens": batch * TOKENS, "seconds": seconds}


if __name__ == "__main__":
    jobs = {"iteration": iteration, "exchange": exchange, "whole": whole}
    output, kind, given = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    result = json.dumps(jobs[kind](output, **json.loads(given)))
    (Path(output) / f"{os.environ['RANK']}.json").write_text(result)
