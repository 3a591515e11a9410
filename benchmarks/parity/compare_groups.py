"""TRL's GRPO and RLOO against ours: the recordings of record_grpo.py, computed again with konic's functions.

TRL's log-probs and advantages are float32 whatever the model, so float32 is what agreement can mean here.
"""

import torch

from konic.finetuning.algorithms import ALGORITHMS
from konic.finetuning.learning.advantages import (
    group_centred,
    group_normalised,
    leave_one_out,
    parts_normalised,
    token_rewards,
)
from konic.finetuning.learning.gradients import loss_weights
from konic.finetuning.learning.losses import (
    POLICY_LOSSES,
    clipped_policy_loss,
    clipped_tokens,
    k1,
    k3,
    level_log_ratios,
    log_ratio,
)
from konic.finetuning.models.adapters import switch_off_dropout
from models import Batch, gradients_of, load_model, our_scores, true_distributions, true_log_probs
from report import FP32, FP64, Line, count, largest, relative, unequal, worst_weight

EOS = 0
RELATIVE_REWARDS = {"dr_grpo": group_centred, "rloo": leave_one_out}
"""Others than group_normalised."""
BY_ITS_ROW = ("dapo", "gdpo", "gspo", "cispo", "sapo")
"""Algorithms whose loss is compared as their row of konic's table says it."""


def batch_of(read):
    """A batch from a function that reads tensors by TRL's names."""
    prompt_ids, prompt_mask, ids, mask = (
        read(name) for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    )
    return Batch(prompt_ids, prompt_mask.bool(), ids, mask.bool())


def compare(recorded, models, algorithm, prompts, architecture):
    """All lines of a recording.

    TRL gives the model no positions, so that a model with absolute ones reads a prompt that is padded on the left at
    the wrong place. There its log-probs and gradients are held against the truth instead of ours.

    Args:
        recorded: The recording.
        models: The folder of the models.
        algorithm: "grpo", "dr_grpo", "rloo" or one of BY_ITS_ROW, those with Llama only.
        prompts: "equal" or "unequal" in length.
        architecture: "gpt2" or "llama".
    """
    positions_are_off = prompts == "unequal" and architecture == "gpt2"
    lines = [*contents(recorded, algorithm, prompts), rollout_advantages(recorded, algorithm)]
    if not positions_are_off:
        lines += rollout_log_probs(recorded, models)
    step = sequence_step if algorithm == "rloo" else token_step
    for index in range(2):
        lines += truth(recorded, models, index)
        if algorithm in BY_ITS_ROW:
            lines += row_step(recorded, models, index, algorithm)
        else:
            lines += step(recorded, models, index, positions_are_off)
    return lines


def contents(recorded, algorithm, prompts):
    """Counts of what a comparison has to have met."""
    batch, scores = batch_of(recorded.rollout), recorded.rollout("rewards_per_func")[:, 0]
    ended = ((batch.response_ids == EOS) & batch.response_mask).any(dim=1)
    lines = [count("responses that ended", ended), count("responses cut off", ~ended)]
    if prompts == "unequal":
        lines.append(count("prompts with padding", ~batch.prompt_mask.all(dim=1)))
    lines.append(count("responses without a score", scores.isnan()))
    if algorithm in BY_ITS_ROW:
        return lines
    held = recorded.step(1, "is_region_clipped").bool()
    if algorithm != "rloo":
        held = held & recorded.step(1, "completion_mask").bool()
    return [
        *lines,
        count(
            "step 2: tokens that the clip holds" if algorithm != "rloo" else "step 2: sequences that the clip holds",
            held,
        ),
    ]


def rollout_advantages(recorded, algorithm):
    """Our advantages from the peer's rewards, and its log-probs where the penalty is in the reward."""
    if algorithm == "gdpo":
        parts, weights = recorded.rollout("rewards_per_func").T, torch.tensor(recorded.options["reward_weights"])
        ours = parts_normalised(parts, ~parts.isnan(), weights, recorded.options["num_generations"])
        return largest("advantages", recorded.rollout("advantages"), ours, FP32)
    scores, mask = recorded.rollout("rewards_per_func")[:, 0], recorded.rollout("completion_mask").bool()
    has_score = ~scores.isnan()
    ratios, weight = torch.zeros_like(mask, dtype=scores.dtype), 0.0
    if algorithm == "rloo":
        old, ref = recorded.rollout("old_per_token_logps"), recorded.rollout("ref_per_token_logps")
        ratios, weight = k1(log_ratio(old, ref, mask)), recorded.options["beta"]
    summed = token_rewards(scores.nan_to_num(), ratios, mask, weight).sum(dim=1)
    groups = (-1, recorded.options["num_generations"])
    relative_rewards = RELATIVE_REWARDS.get(algorithm, group_normalised)
    ours = relative_rewards(summed.view(groups), has_score.view(groups)).flatten()
    return largest("advantages", recorded.rollout("advantages"), ours, FP32)


@torch.no_grad()
def rollout_log_probs(recorded, models):
    batch, temperature = batch_of(recorded.rollout), recorded.options["temperature"]
    policy = load_model(models / "policy", recorded.of_weights(0, "weights"))
    lines = []
    for name, model in (("old", policy), ("ref", load_model(models / "reference"))):
        theirs, ours = recorded.rollout(f"{name}_per_token_logps"), our_scores(model, batch, temperature).log_probs
        lines.append(largest(f"{name} log-probs", theirs, ours, FP32, batch.response_mask))
    return lines


@torch.no_grad()
def truth(recorded, models, step):
    """Both sides against each sequence alone, and our entropy and exact KL against torch's own."""
    batch, temperature = batch_of(lambda name: recorded.step(step, name)), recorded.options["temperature"]
    mask = batch.response_mask
    policy = load_model(models / "policy", recorded.of_weights(step, "weights"))
    reference = load_model(models / "reference")
    ours, right = our_scores(policy, batch, temperature, reference), true_log_probs(policy, batch, temperature)
    of_policy, of_reference = (
        torch.distributions.Categorical(logits=true_distributions(model, batch, temperature))
        for model in (policy, reference)
    )
    kl = torch.distributions.kl_divergence(of_policy, of_reference)
    name = f"step {step + 1}: "
    return [
        largest(f"{name}peer's log-probs against the unpadded truth", recorded.step(step, "per_token_logps"), right,
                None, mask),
        largest(f"{name}our log-probs against the unpadded truth", right, ours.log_probs, FP64, mask),
        largest(f"{name}our entropy against the unpadded truth", of_policy.entropy(), ours.entropy, FP64, mask),
        largest(f"{name}our exact KL against the unpadded truth", kl, ours.kl, FP64, mask),
    ]  # fmt: skip


def token_loss(recorded, new, old, ref, advantages, mask):
    """Our loss per token [B, R], with k3 in the place of the exact KL that we would put there."""
    policy = clipped_policy_loss(
        log_ratio(new, old, mask), advantages, mask, (recorded.options["epsilon"], recorded.options["epsilon"])
    )
    return policy + recorded.options["beta"] * k3(log_ratio(new, ref, mask))


def token_step(recorded, models, step, positions_are_off):
    """GRPO: a clipped loss per token, averaged over the tokens of the step."""
    name = f"step {step + 1}: "
    batch = batch_of(lambda name: recorded.step(step, name))
    mask, num_tokens = batch.response_mask, int(batch.response_mask.sum())
    old, ref = recorded.step(step, "old_per_token_logps"), recorded.step(step, "ref_per_token_logps")
    new, advantages = recorded.step(step, "per_token_logps"), recorded.step(step, "advantages")[:, None]
    leaf = new.clone().requires_grad_()
    ours = token_loss(recorded, leaf, old, ref, advantages, mask)
    by_log_probs = torch.autograd.grad(ours.sum() / num_tokens, leaf)[0]
    ratios = log_ratio(new, old, mask)
    bound = clipped_tokens(ratios, mask, (recorded.options["epsilon"], recorded.options["epsilon"])) & (
        ratios.sign() == advantages.sign()
    )
    theirs = recorded.step(step, "loss").sum()
    return [
        relative(
            f"{name}KL per token (k3)",
            recorded.step(step, "per_token_kl")[mask],
            k3(log_ratio(new, ref, mask))[mask],
            FP32,
        ),
        relative(f"{name}loss per token", recorded.step(step, "per_token_loss")[mask], ours[mask].detach(), FP32),
        largest(f"{name}loss", theirs, ours.sum().detach() / num_tokens, FP32),
        unequal(f"{name}tokens that the clip holds", recorded.step(step, "is_region_clipped").bool() & mask, bound),
        relative(f"{name}gradient of the log-probs", recorded.step(step, "log_prob_gradients"), by_log_probs, FP32),
        *(true_gradients if positions_are_off else token_gradients)(recorded, models, step, batch, advantages),
    ]


def row_loss(recorded, algorithm, new, old, ref, advantages, mask):
    """Our loss of a step, as the algorithm's row says it, with k3 in the place of the exact KL."""
    row = ALGORITHMS[algorithm]
    ratios = level_log_ratios(log_ratio(new, old, mask), mask, row.ratio_level)
    clips = row.clip_ratios or (recorded.options["epsilon"], recorded.options["epsilon"])
    losses = POLICY_LOSSES[row.policy_loss](ratios, advantages.expand_as(new), mask, clips)
    losses = losses + recorded.options["beta"] * k3(log_ratio(new, ref, mask))
    num_tokens = int(mask.sum())
    return (loss_weights(row.average, mask, num_tokens, len(mask)) * losses).sum() / num_tokens


def row_step(recorded, models, step, algorithm):
    """The gradients of a loss by its row: of the log-probs, and of all weights through our own forward pass."""
    name, temperature = f"step {step + 1}: ", recorded.options["temperature"]
    batch = batch_of(lambda name: recorded.step(step, name))
    mask, advantages = batch.response_mask, recorded.step(step, "advantages")[:, None]
    old, ref = recorded.step(step, "old_per_token_logps"), recorded.step(step, "ref_per_token_logps")
    leaf = recorded.step(step, "per_token_logps").clone().requires_grad_()
    loss = row_loss(recorded, algorithm, leaf, old, ref, advantages, mask)
    by_log_probs = torch.autograd.grad(loss, leaf)[0]
    policy = load_model(models / "policy", recorded.of_weights(step, "weights"))
    scores = our_scores(policy, batch, temperature)
    theirs = recorded.of_weights(step, "gradients")
    ours = gradients_of(policy, row_loss(recorded, algorithm, scores.log_probs, old, ref, advantages, mask))
    lines = [
        relative(f"{name}gradient of the log-probs", recorded.step(step, "log_prob_gradients"), by_log_probs, FP32),
        relative(f"{name}gradients of all weights", theirs, ours, FP32),
        worst_weight(f"{name}gradients, the worst weight", theirs, ours, FP32),
    ]
    if algorithm != "cispo":  # whose loss in TRL has log π in the place of log ρ: another value, the same gradient
        lines.append(largest(f"{name}loss", recorded.step(step, "loss").sum(), loss.detach(), FP32))
    return lines


def token_gradients(recorded, models, step, batch, advantages):
    """Log-probs, entropies and the gradients of all weights through our own forward pass."""
    name, temperature, mask = f"step {step + 1}: ", recorded.options["temperature"], batch.response_mask
    policy = load_model(models / "policy", recorded.of_weights(step, "weights"))
    old, ref = recorded.step(step, "old_per_token_logps"), recorded.step(step, "ref_per_token_logps")
    scores = our_scores(policy, batch, temperature)
    losses = token_loss(recorded, scores.log_probs, old, ref, advantages, mask)
    theirs, ours = recorded.of_weights(step, "gradients"), gradients_of(policy, losses.sum() / mask.sum())
    return [
        largest(f"{name}log-probs", recorded.step(step, "per_token_logps"), scores.log_probs.detach(), FP32, mask),
        largest(f"{name}entropy", recorded.step(step, "entropies"), scores.entropy.detach(), FP32, mask),
        relative(f"{name}gradients of all weights", theirs, ours, FP32),
        worst_weight(f"{name}gradients, the worst weight", theirs, ours, FP32),
    ]


def true_gradients(recorded, models, step, batch, advantages):
    """The gradients of all weights on both sides against those through each sequence alone."""
    name, temperature, mask = f"step {step + 1}: ", recorded.options["temperature"], batch.response_mask
    policy, sampler = (load_model(models / "policy", recorded.of_weights(index, "weights")) for index in (step, 0))
    reference, theirs = load_model(models / "reference"), recorded.of_weights(step, "gradients")
    with torch.no_grad():
        old, ref = (true_log_probs(model, batch, temperature) for model in (sampler, reference))
    ours, right = (
        gradients_of(policy, token_loss(recorded, new, old, ref, advantages.double(), mask).sum() / mask.sum())
        for new in (our_scores(policy, batch, temperature).log_probs, true_log_probs(policy, batch, temperature))
    )
    return [
        relative(f"{name}peer's gradients against the unpadded truth", right, theirs, None),
        relative(f"{name}our gradients against the unpadded truth", right, ours, FP64),
    ]


def sequence_loss(recorded, new, old, advantages):
    """Our clipped loss [B] of a whole response's ratio, as RLOO in TRL has it."""
    ratios = log_ratio(new.sum(dim=1), old.to(new), torch.ones_like(advantages, dtype=torch.bool))
    return clipped_policy_loss(
        ratios,
        advantages,
        torch.ones_like(ratios, dtype=torch.bool),
        (recorded.options["epsilon"], recorded.options["epsilon"]),
    )


def sequence_step(recorded, models, step, positions_are_off):
    """RLOO: the peer clips one ratio per sequence and averages over sequences; ours, one per token, over tokens."""
    name, advantages = f"step {step + 1}: ", recorded.step(step, "advantages")
    batch = batch_of(lambda name: recorded.step(step, name))
    new = torch.where(batch.response_mask, recorded.step(step, "per_token_logps"), 0.0)
    ours = sequence_loss(recorded, new, recorded.step(step, "old_logps"), advantages)
    lines = [
        relative(
            f"{name}loss per sequence, by the sequence's ratio", recorded.step(step, "per_sequence_loss"), ours, FP32
        ),
        largest(f"{name}loss", recorded.step(step, "loss").mean(), ours.mean(), FP32),
    ]
    return lines if positions_are_off else lines + sequence_gradients(recorded, models, step, batch, advantages)


def sequence_gradients(recorded, models, step, batch, advantages):
    """Gradients of all weights: of the sequence's ratio, and, at ratio 1, of our own mean over tokens."""
    name, temperature, mask = f"step {step + 1}: ", recorded.options["temperature"], batch.response_mask
    policy, sampler = (load_model(models / "policy", recorded.of_weights(index, "weights")) for index in (step, 0))
    with torch.no_grad():
        old = our_scores(sampler, batch, temperature).log_probs
    new, theirs = our_scores(policy, batch, temperature).log_probs, recorded.of_weights(step, "gradients")
    ours = gradients_of(policy, sequence_loss(recorded, new, old.sum(dim=1), advantages).mean())
    lines = [
        largest(f"{name}log-probs", recorded.step(step, "per_token_logps"), new.detach(), FP32, mask),
        relative(f"{name}gradients of all weights, by the sequence's ratio", theirs, ours, FP32),
        worst_weight(f"{name}gradients, the worst weight", theirs, ours, FP32),
    ]
    if step:
        return lines
    per_token = clipped_policy_loss(
        log_ratio(new, old, mask), advantages[:, None], mask, (recorded.options["epsilon"], recorded.options["epsilon"])
    )
    ours = gradients_of(policy, per_token.sum() / mask.sum() * (mask.sum() / len(mask)))
    return [*lines, relative(f"{name}our token mean's gradients × tokens per sequence", theirs, ours, FP32)]


def compare_dropout(recorded, models):
    """Attention dropout that only the model's config knows of: the first ratio, which should be 1."""
    batch, temperature = batch_of(lambda name: recorded.step(0, name)), recorded.options["temperature"]
    mask = batch.response_mask
    first = log_ratio(recorded.step(0, "per_token_logps"), recorded.step(0, "old_per_token_logps"), mask)
    policy = load_model(models / "policy", recorded.of_weights(0, "weights"), attention_dropout=0.1)
    switch_off_dropout(policy)
    with torch.no_grad():
        right = true_log_probs(policy, batch, temperature)
        ours = our_scores(policy.train(), batch, temperature).log_probs
    return [
        Line("peer's log-ratio before the first step, away from 0", "max abs", first.abs().max().item(), None),
        largest("our log-probs in train mode against the unpadded truth", right, ours, FP64, mask),
    ]
