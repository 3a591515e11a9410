"""Every command and the library on local inputs, for test_no_network: `python offline_session.py FOLDER MODEL`.

Prints each address that Python was asked for, and at the end what the kernel counted: every packet, connection or
name look-up that found no route, whoever tried it.
"""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = """
from konic.finetuning import *

class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def brief(self, prompt, response):
        return -len(response) / 80

agent = KonicFinetuningAgent(
    base_model={model!r}, reward_composer=Rewards(),
    dataset_config=DatasetConfig(name={data!r}, held_out=1), lora_config=LoraConfig(r=2),
    training_config=TrainingConfig(batch_size=2, ppo_epochs=1, reward_workers=1),
    generation_config=GenerationConfig(max_new_tokens=2, max_prompt_length=16),
)
"""
PAIRS = "".join(f'{{"prompt": "{prompt}", "chosen": "good", "rejected": "bad"}}\n' for prompt in "abcdefgh")


def close_pythons_sockets():
    """Let every look-up and connection of this process fail, with a line about it."""

    def connect(self, address, *rest):
        if self.family == socket.AF_UNIX:
            return plain(self, address, *rest)
        print("REACHED OUT", address, flush=True)
        raise OSError("the network is closed")

    def look_up(host, *rest, **options):
        print("ASKED FOR", host, flush=True)
        raise socket.gaierror("the network is closed")

    plain = socket.socket.connect
    socket.socket.connect = socket.socket.connect_ex = connect
    socket.getaddrinfo = look_up


def num_without_route():
    """What the kernel has counted in this network namespace, for both versions of IP."""
    names, values = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line[:3] == "Ip:")
    new = dict(line.split() for line in Path("/proc/net/snmp6").read_text().splitlines())
    return int(values[names.index("OutNoRoutes")]) + int(new["Ip6OutNoRoutes"])


def run_commands(folder, model):
    """Run each command once."""
    from command import konic_here

    job, pairs, data, responses = (folder / name for name in ("job.py", "pairs.jsonl", "data.jsonl", "texts.jsonl"))
    job.write_text(SCRIPT.format(model=model, data=str(data)))
    data.write_text('{"prompt": "ab"}\n{"prompt": "x"}\n{"prompt": "why"}\n')
    responses.write_text('{"prompt": "ab", "response": "yes"}\n{"prompt": "x", "response": "no"}\n')
    pairs.write_text(PAIRS)
    run, judge = ["--output", folder / "run", "--device", "cpu"], ["--output", folder / "judge", "--device", "cpu"]
    for command in (
        ["--version"],
        ["train", job, "--max-iterations", 1, "--save-every", 1, *run],
        ["train", job, "--max-iterations", 2, "--resume", *run],
        ["init", folder / "started"],
        ["doctor", job, "--device", "cpu"],
        ["report", folder / "run"],
        ["inspect", folder / "run", "--best"],
        ["eval", folder / "run", "--rewards", job, "--samples", 2, "--device", "cpu"],
        ["eval", folder / "run", "--recorded-rewards", "--prompts", data, "--json", "--device", "cpu"],
        ["generate", folder / "run", "ab", "--device", "cpu"],
        ["generate", folder / "run", "--prompts", data, "--rewards", job, "--json", "--device", "cpu"],
        ["chat", folder / "run", "--device", "cpu"],
        ["export", folder / "run", "--format", "merged", "--output", folder / "exported"],
        ["rewards", job, "--samples", 2, "--device", "cpu"],
        ["rewards", job, "--texts", responses],
        ["reward-model", "train", pairs, "--base", model, "--epochs", 1, *judge],
        ["demo", "--max-iterations", 0, "--output", folder / "demo"],
    ):
        sys.stdin = io.StringIO("hello\n")
        done = konic_here(*command)
        print("RAN", command[0], done.returncode, *([done.stderr[-500:]] if done.returncode else []), flush=True)


def use_library(folder, model):
    """Use what no command does: an adapter's folder as the base, evaluations, merged models, a trained reward model."""
    from konic.finetuning import (
        GenerationConfig,
        HuggingFaceRewardModel,
        KonicFinetuningAgent,
        KonicFinetuningEngine,
        KonicLLMRewardComposer,
        LoraConfig,
    )  # fmt: skip

    agent = KonicFinetuningAgent(
        base_model=str(folder / "run" / "final"),
        reward_composer=KonicLLMRewardComposer(reward_models=[HuggingFaceRewardModel(str(folder / "judge"))]),
        lora_config=LoraConfig(r=2),
        generation_config=GenerationConfig(max_new_tokens=2, max_prompt_length=16),
    )
    engine = KonicFinetuningEngine.from_agent(agent, device="cpu")
    engine.evaluate(["ab"])
    engine.generate(["ab"])
    engine.save_pretrained(folder / "merged", merge=True)
    print("RAN library 0", flush=True)


if __name__ == "__main__":
    folder, model = Path(sys.argv[1]), sys.argv[2]
    for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]:
        del os.environ[name]  # offline modes would hide what is asked for
    os.environ["HF_HOME"] = str(folder / "cache")
    close_pythons_sockets()
    run_commands(folder, model)
    use_library(folder, model)
    print("NO ROUTE", num_without_route() if sys.platform == "linux" else 0, flush=True)
    try:
        socket.create_connection(("pypi.org", 443))
    except OSError:
        print("PYTHON IS CLOSED", flush=True)
    probe = "import socket; socket.socket().connect(('192.0.2.1', 443))"
    if sys.argv[3:] == ["without routes"]:
        subprocess.run([sys.executable, "-c", probe], stderr=subprocess.DEVNULL, check=False)
        print("NO ROUTE", num_without_route(), flush=True)
