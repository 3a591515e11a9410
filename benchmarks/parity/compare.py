"""Recordings of TRL's trainers computed again with konic's functions, in one table.

python benchmarks/parity/compare.py FOLDER

FOLDER holds models/ and the recordings that run.py makes there. Exits with 1 if a line that has a tolerance is over it,
or if a recording lacks something that the comparison is about.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

import compare_groups
import compare_ppo
from cases import CASES
from recording import PROMPTS, compute_norms_in_float64, load_tokenizer
from report import Recorded, table

NOTES = """\
## How to read it

Lines with an expected value must hold, or the run fails; a line that is "shown" is where the two are meant to differ,
or where the peer is off. The unpadded truth is each sequence alone, without padding, through plain `transformers`, and
`torch.distributions`. Each trainer takes two optimizer steps on the same responses, so that in the second the ratios
are away from 1 and the clip holds some tokens. Ours is given the peer's recorded tokens, weights, rewards, values and
old and reference log-probs, and computes the rest.

## Where they differ

- **Positions.** GRPO and RLOO give the model no position ids. GPT-2's are absolute, so it reads a prompt that is padded
  on the left at the wrong place: its log-probs and gradients are off, and those of equal prompts are not. PPO passes
  them. Llama's are relative, which hides it.
- **Dropout.** `disable_dropout=True` reaches `nn.Dropout` modules only. Attention dropout that is a number in the
  config, as Llama's, stays on in training: the ratio of the first step is not 1. Ours switches off both.
- **The end of a response.** PPO takes for padding what equals the padding token. Where that is the end-of-sequence
  token itself, no end counts, and none is learned. Ours counts lengths. So do GRPO and RLOO: GPT-2 is padded with EOS
  there.
- **Precision.** GRPO and RLOO compute log-probs, entropies and advantages in float32 whatever the model; their lines
  have float32's tolerance although the models are float64. PPO's are float64 but for its sampler's log-probs, which
  are its old ones.
- **KL in the loss.** GRPO's is k3 of the sampled token, here without its correction by the ratio (on by default in
  1.16). Ours is the exact KL of the distribution; the lines above put our k3 in its place, and hold the exact one
  against torch's.
- **RLOO's ratio.** One per sequence, clipped, averaged over sequences. Ours is one per token, averaged over the tokens
  of the step. Before the first update the gradients are the same but for a factor, the tokens per sequence; later they
  are different methods.
- **Samples without a score.** Both leave them out of their group and give them advantage 0. TRL counts their tokens in
  the loss's mean and its KL, and so do the lines above; ours leaves the sample out of the step.
- **Where PPO's score lands.** On the position after the end of a response where there is one, with that position's
  value in between; ours on the last token. With the longer mask our functions give the same; with our own, advantages
  differ as shown.
- **Whitening.** PPO's epsilon is under the root and its n / (n − 1) in float32: 1e-8 of the result.
- **Micro-batches.** PPO averages the means of its micro-batches; ours is a mean over the step's tokens, as GRPO's is,
  which has two micro-batches per step here. At the last batch of its data PPO takes a step for every micro-batch; the
  data here is longer.
- **Clip fraction.** TRL counts the tokens that the clip holds: those whose ratio left the range on the side that the
  advantage pushes to. Our `clip_fraction` counts all that left it.
- **Padding.** PPO fills log-probs outside the mask with 1, which cancels out; ours are 0 there.
- **Llama's norms** compute in float64 on both sides; transformers' round to float32, whatever the model is in.
- **Alike, and set on purpose:** the 1e-4 beside GRPO's standard deviation; PPO's temperature of 0.7 + 1e-7 (ours was
  given the same); `missing_eos_penalty`, subtracted from the scores before what is compared; no clipping of gradients,
  which PPO has none of; no dropout in GPT-2 after `disable_dropout`. PPO's values are a model of their own, ours a head
  on the policy: values are given, and only the policy's weights are compared."""


def lines_of(case, folder):
    """The lines of one recording and the peer's versions."""
    recorded, models = Recorded.read(folder / case.file_name), folder / "models" / case.architecture
    if case.recorder == "grpo" and case.argument("attention-dropout"):
        return compare_groups.compare_dropout(recorded, models), recorded.versions
    if case.recorder == "grpo":
        algorithm, prompts = case.argument("algorithm"), case.argument("prompts")
        return compare_groups.compare(recorded, models, algorithm, prompts, case.architecture), recorded.versions
    if case.argument("pad-token") == "<eos>":
        tokenizer = load_tokenizer(folder / "models", pad_token="<eos>")
        return compare_ppo.compare_pad_is_eos(recorded, models, tokenizer, PROMPTS["unequal"]), recorded.versions
    if case.argument("micro-batches"):
        number = int(case.argument("micro-batches"))
        return compare_ppo.compare_micro_batches(recorded, models, number), recorded.versions
    return compare_ppo.compare(recorded, models), recorded.versions


def compare(folder):
    """The table as markdown, and whether every line is as it should be."""
    torch.set_num_threads(1)
    compute_norms_in_float64()
    disable_progress_bar()
    rows = []
    for case in CASES:
        lines, versions = lines_of(case, folder)
        rows += [(f"TRL {versions['trl']} {case.system}", case.architecture, line) for line in lines]
    verdicts = Counter(line.verdict for _, _, line in rows)
    summary = f"{verdicts['yes']} lines hold, {verdicts['NO']} do not, {verdicts['shown']} are shown."
    return f"{summary}\n\n{table(rows)}", not verdicts["NO"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    text, is_ok = compare(parser.parse_args().folder)
    print(text)
    sys.exit(not is_ok)
