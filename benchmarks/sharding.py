"""Memory of each process with divided weights, against whole ones, and what gathering the weights costs.

python benchmarks/sharding.py writes benchmarks/results/sharding.md. A model of random weights is trained for two
iterations by two processes on one machine. Resident memory holds pages of the model's file too: each process maps the
whole file, whose pages the system may take back, and shares them with the others. Private memory is what is left
without the pages of files (RssAnon): what each process needs for itself.
"""

import copy
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from bench import machine
from konic.finetuning import (
    DatasetConfig,
    DatasetSource,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
    llm_reward,
)
from ranks import start_ranks

RESULTS = Path(__file__).parent / "results" / "sharding.md"
MIB = 2**20
PROMPTS = ["ab", "the film was", "why not", "go on then"]
MODES = {
    "whole": {},
    "divided, gathered for each rollout": {"sharding": "fsdp", "sharded_sampling": False},
    "divided in sampling too": {"sharding": "fsdp", "sharded_sampling": True},
}
KINDS = {"LoRA": {}, "LoRA, bfloat16": {"precision": "bfloat16"}, "full": {}}
LARGE = {"hidden_size": 1280, "intermediate_size": 4096, "num_hidden_layers": 22, "num_attention_heads": 20}
SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}


class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def vowels(self, prompt: str, response: str) -> float:
        return float(sum(letter in "aeiou" for letter in response))


class Memory(KonicFinetuningCallback):
    """The most resident and the most private memory of the process in each stage."""

    def __init__(self):
        super().__init__(verbose=False)
        self.stage, self.peaks = "loading", {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            status, peaks = Path("/proc/self/status").read_text(), self.peaks.setdefault(self.stage, [0, 0])
            for index, name in enumerate(("VmRSS", "RssAnon")):
                peaks[index] = max(peaks[index], int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024)
            time.sleep(0.005)


def watched(memory):
    """Let the stages of a run, in any process, be told to `memory`."""
    import konic.finetuning.trainer as trainer

    def told(stage, function):
        def call(*values, **named):
            memory.stage = stage
            try:
                return function(*values, **named)
            finally:
                memory.stage = "between"

        return call

    trainer.sample_rollout = told("rollout", trainer.sample_rollout)
    trainer.update = told("update", trainer.update)


def job(model, output, mode, kind):
    """What one process runs."""
    memory = Memory()
    training = TrainingConfig(
        batch_size=4, ppo_epochs=2, gradient_accumulation_steps=2, learning_rate=1e-5, gradient_checkpointing=True,
        self_checks=False, **MODES[mode], **KINDS[kind],
    )  # fmt: skip
    agent = KonicFinetuningAgent(
        base_model=model,
        reward_composer=Rewards(),
        lora_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]) if kind != "full" else None,
        dataset_config=DatasetConfig(source=DatasetSource.MEMORY, prompts=PROMPTS),
        training_config=training,
        generation_config=GenerationConfig(max_new_tokens=8, min_new_tokens=8, max_prompt_length=16),
    )
    run = Path(output) / "run"
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=run, callback=memory, device="cpu")
    watched(memory)
    history = engine.train(2, save_every=0).history
    last = history[-1]
    found = {"peaks": memory.peaks, "rollout": last.generation_time_sec, "update": last.update_time_sec}
    sharding = engine._session.learner.policy.sharding
    if mode != "whole":
        found["peaks"], start = copy.deepcopy(memory.peaks), time.monotonic()  # what follows is no part of a run
        for unit in sharding._units:
            unit.unshard()
        found["gather"] = time.monotonic() - start
    (Path(output) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def run(model, mode, kind):
    """Both processes of a mode; what each found."""
    with tempfile.TemporaryDirectory() as output:
        started = start_ranks([sys.executable, "-W", "ignore", __file__, "job", model, output, mode, kind], 2)
        assert [process.wait() for process in started] == [0, 0]
        return [json.loads((Path(output) / f"{rank}.json").read_text()) for rank in range(2)]


def peak(found, stages):
    """The most resident memory of any process in any of the stages, and the most private memory."""
    both = zip(*[each["peaks"][stage] for each in found for stage in stages if stage in each["peaks"]], strict=True)
    resident, private = (max(numbers) / MIB for numbers in both)
    return f"{resident:,.0f} ({private:,.0f}) MB"


def make_model(folder, shape):
    from conftest import byte_tokenizer  # loads pytest, which the measured processes do without

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=257, eos_token_id=0,
        pad_token_id=258, **shape,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    byte_tokenizer("llama").save_pretrained(folder)
    return model.num_parameters()


def main():
    os.environ["OMP_NUM_THREADS"] = "1"
    lines = [
        "Two processes with one thread each, fp32 where no other is named, gloo, gradient checkpointing; 4 responses "
        "of 8 tokens in all; "
        f"{machine()}; `make sharding`. Memory is resident, and in brackets private: without the pages of the model's "
        "file, which both processes share and the system may take back.",
        "",
        "| | weights (M) | loading | rollout | update | at the peak | rollout (s) | update (s) | gathering all (s) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            count = make_model(folder, SMALL if kind == "full" else LARGE)
            for mode in MODES:
                found = run(folder, mode, kind)
                cells = [peak(found, [stage]) for stage in ("loading", "rollout", "update")]
                cells.append(peak(found, found[0]["peaks"]))
                gather = f"{found[0]['gather']:.1f}" if "gather" in found[0] else ""
                lines.append(
                    f"| {kind}, {mode} | {count / 1e6:.0f} | " + " | ".join(cells)
                    + f" | {found[0]['rollout']:.1f} | {found[0]['update']:.1f} | {gather} |"
                )  # fmt: skip
                print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        job(*sys.argv[2:6])
    else:
        main()
