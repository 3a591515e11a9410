"""What is recorded: one run of a peer's trainer each, and how it is named in the table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One run of a peer."""

    system: str
    """The peer's trainer, and what is special about this run."""
    architecture: str
    recorder: str
    """"grpo" or "ppo": the script, and with it the peer's version."""
    arguments: tuple[str, ...]
    """What the recorder gets beside models, architecture and output."""

    @property
    def file_name(self):
        words = (self.recorder, self.architecture, *self.arguments)
        return "-".join(word.strip("-<>") for word in words) + ".safetensors"

    def argument(self, name):
        """The value after `--name`; None without it."""
        given = dict(zip(self.arguments[::2], self.arguments[1::2], strict=True))
        return given.get(f"--{name}")


def _groups(system, architecture, algorithm, prompts, *more):
    return Case(system, architecture, "grpo", ("--algorithm", algorithm, "--prompts", prompts, *more))


CASES = (
    _groups("GRPO, equal prompts", "gpt2", "grpo", "equal"),
    _groups("GRPO", "gpt2", "grpo", "unequal"),
    _groups("GRPO", "llama", "grpo", "unequal"),
    _groups("GRPO, scale_rewards none", "llama", "dr_grpo", "unequal"),
    _groups("GRPO, GSPO's ratio and clip", "llama", "gspo", "unequal"),
    _groups("GRPO, loss dapo and its clip", "llama", "dapo", "unequal"),
    _groups("GRPO, normalize_then_sum", "llama", "gdpo", "unequal"),
    _groups("GRPO, loss cispo", "llama", "cispo", "unequal"),
    _groups("GRPO, loss sapo", "llama", "sapo", "unequal"),
    _groups("RLOO, equal prompts", "gpt2", "rloo", "equal"),
    _groups("RLOO", "gpt2", "rloo", "unequal"),
    _groups("RLOO", "llama", "rloo", "unequal"),
    _groups("GRPO, attention dropout", "llama", "grpo", "unequal", "--attention-dropout", "0.1"),
    Case("PPO", "gpt2", "ppo", ("--kl-estimator", "k1")),
    Case("PPO, k3", "llama", "ppo", ("--kl-estimator", "k3")),
    Case("PPO, 2 micro-batches", "llama", "ppo", ("--micro-batches", "2")),
    Case("PPO, padded with EOS", "gpt2", "ppo", ("--pad-token", "<eos>")),
)
