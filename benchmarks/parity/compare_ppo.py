"""TRL's PPO against ours: the recordings of record_ppo.py, computed again with konic's functions.

All in float64 but the peer's old log-probs, which are those of its sampler and float32. They are fed to ours as they
were recorded, as are the values.
"""

import torch

from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.tokenization import make_prompt_batch
from konic.finetuning.learning.advantages import gae, token_rewards, whiten
from konic.finetuning.learning.losses import clipped_policy_loss, clipped_tokens, k1, k3, log_ratio, value_loss
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.rollout.local_sampler import sample
from konic.finetuning.rollout.sampler import RandomKey, SpecialTokens
from models import Batch, gradients_of, load_model, our_scores, true_log_probs
from report import FP32, FP64, Line, count, largest, relative, unequal, worst_weight

ESTIMATES = {"k1": k1, "k3": k3}
EOS, PAD = 0, 1


def batch_of(recorded, rows=slice(None)):
    """The recorded sequences, in an order."""
    queries = recorded.rollout("queries")[rows]
    return Batch(queries, queries != PAD, recorded.rollout("responses")[rows], ~recorded.rollout("padding_mask")[rows])


def temperature_of(recorded):
    return recorded.options["temperature"] + 1e-7  # what the trainer divides by


def compare(recorded, models):
    """All lines of a recording of one micro-batch per step."""
    lines = [*contents(recorded), *rollout_log_probs(recorded, models), *rollout_advantages(recorded)]
    for index in range(2):
        lines += step_losses(recorded, index)
        lines += step_gradients(recorded, models, index)
    return lines


def contents(recorded):
    """Counts of what a comparison has to have met."""
    batch = batch_of(recorded)
    ended = ((batch.response_ids == EOS) & batch.response_mask).any(dim=1)
    longer, old_values = ~recorded.rollout("padding_mask_p1"), recorded.rollout("values")
    rows, mask = recorded.step(1, "micro_batch_inds"), batch.response_mask
    moved = (recorded.step(1, "vpred") - old_values[rows]).abs() > recorded.options["cliprange_value"]
    held = recorded.step(1, "pg_losses2") > recorded.step(1, "pg_losses")
    return [
        count("responses that ended", ended),
        count("responses cut off", ~ended),
        count("prompts with padding", ~batch.prompt_mask.all(dim=1)),
        count("responses whose score lands after their end", (longer & ~mask).any(dim=1)),
        count("step 2: tokens that the clip holds", held & mask[rows]),
        count("step 2: values that left the clip's range", moved & longer[rows]),
    ]


@torch.no_grad()
def rollout_log_probs(recorded, models):
    batch, temperature = batch_of(recorded), temperature_of(recorded)
    policy = load_model(models / "policy", recorded.of_weights(0, "weights"))
    reference, mask = load_model(models / "reference"), batch.response_mask
    old, ref = (our_scores(model, batch, temperature).log_probs for model in (policy, reference))
    right = true_log_probs(reference, batch, temperature)
    return [
        largest("old log-probs (the peer's sampler)", recorded.rollout("logprobs"), old, FP32, mask),
        largest("ref log-probs", recorded.rollout("ref_logprobs"), ref, FP64, mask),
        largest("peer's ref log-probs against the unpadded truth", right, recorded.rollout("ref_logprobs"), None, mask),
        largest("our ref log-probs against the unpadded truth", right, ref, FP64, mask),
    ]


def rollout_advantages(recorded):
    """KL, token rewards, GAE, returns and whitening, in the peer's convention and then in ours.

    A response that ended before the last position gets one position more in the peer's: its score lands there, after
    the end-of-sequence token, and that position's value is the state after it. With that position in the mask, ours
    must give the same.
    """
    mask, longer = ~recorded.rollout("padding_mask"), ~recorded.rollout("padding_mask_p1")
    values, options = recorded.rollout("values"), recorded.options
    ratios = log_ratio(recorded.rollout("logprobs").double(), recorded.rollout("ref_logprobs"), mask)
    kl = torch.where(mask, ESTIMATES[options["kl_estimator"]](ratios), 0.0)

    def estimate(counted):
        rewards = token_rewards(recorded.rollout("scores"), kl, counted, options["kl_coef"])
        return rewards, *gae(rewards, values, counted, options["gamma"], options["lam"])

    rewards, advantages, returns = estimate(longer)
    in_ours = whiten(estimate(mask)[1], mask)
    whitened = whiten(advantages, mask)
    theirs = recorded.rollout("advantages")
    return [
        largest(f"KL per token ({options['kl_estimator']})", recorded.rollout("kl"), kl, FP64, mask),
        largest("token rewards", recorded.rollout("rewards"), rewards, FP64, longer),
        largest("GAE", recorded.rollout("advantages_before_whitening"), advantages, FP64, longer),
        largest("returns", recorded.rollout("returns"), returns, FP64, longer),
        largest("whitened advantages, the peer's rounding", theirs, whitened * peer_rounding(advantages[mask]), FP64),
        relative("whitened advantages", theirs, whitened, FP32),
        largest("whitened advantages, the score on the last token", theirs, in_ours, None),
    ]


def peer_rounding(counted):
    """How much larger the peer's whitened values are: its epsilon is under the root, its n / (n − 1) in float32."""
    number = torch.tensor(len(counted))
    variance = counted.var(correction=0) * (number / (number - 1)) + 1e-8
    return (counted.std() + 1e-8) / variance.sqrt()


def step_losses(recorded, step):
    """Losses per token and their gradients by log-probs and values, from what the peer's model gave."""
    name, options, rows = f"step {step + 1}: ", recorded.options, recorded.step(step, "micro_batch_inds")
    mask, longer = ~recorded.rollout("padding_mask")[rows], ~recorded.rollout("padding_mask_p1")[rows]
    old, advantages, returns, old_values = (
        recorded.rollout(key)[rows] for key in ("logprobs", "advantages", "returns", "values")
    )
    new, values = (recorded.step(step, key).clone().requires_grad_() for key in ("new_logprobs", "vpred"))
    ratios = log_ratio(new, old, mask)
    policy = clipped_policy_loss(ratios, advantages, mask, (options["cliprange"], options["cliprange"]))
    value = value_loss(values, old_values, returns, longer, options["cliprange_value"])
    loss = policy.sum() / mask.sum() + options["vf_coef"] * value.sum() / longer.sum()
    by_log_probs, by_values = torch.autograd.grad(loss, (new, values))
    bound = clipped_tokens(ratios.detach(), mask, (options["cliprange"], options["cliprange"])) & (
        ratios.sign() == advantages.sign()
    )
    theirs_bound = mask & (recorded.step(step, "pg_losses2") > recorded.step(step, "pg_losses"))
    policy, value, loss = policy.detach(), value.detach(), loss.detach()
    return [
        largest(f"{name}policy loss per token", recorded.step(step, "pg_loss_max"), policy, FP64, mask),
        largest(f"{name}policy loss", recorded.step(step, "pg_loss"), policy.sum() / mask.sum(), FP64),
        unequal(f"{name}tokens that the clip holds", theirs_bound, bound),
        largest(f"{name}value loss per token", recorded.step(step, "vf_loss_max") / 2, value, FP64, longer),
        largest(f"{name}value loss", recorded.step(step, "vf_loss"), value.sum() / longer.sum(), FP64),
        largest(f"{name}loss", recorded.step(step, "loss"), loss, FP64),
        relative(f"{name}gradient of the log-probs", recorded.step(step, "log_prob_gradients"), by_log_probs, FP64),
        relative(f"{name}gradient of the values", recorded.step(step, "value_gradients"), by_values, FP64),
    ]


def policy_losses(recorded, models, step):
    """The policy, and our loss per token [B, R] through our own forward pass."""
    rows = recorded.step(step, "micro_batch_inds")
    batch = batch_of(recorded, rows)
    policy = load_model(models / "policy", recorded.of_weights(step, "weights"))
    new = our_scores(policy, batch, temperature_of(recorded)).log_probs
    ratios = log_ratio(new, recorded.rollout("logprobs")[rows], batch.response_mask)
    advantages = recorded.rollout("advantages")[rows]
    return (
        policy,
        batch,
        new,
        clipped_policy_loss(
            ratios, advantages, batch.response_mask, (recorded.options["cliprange"], recorded.options["cliprange"])
        ),
    )


def step_gradients(recorded, models, step):
    """Log-probs and the gradients of all the policy's weights; the peer's values come from a model of their own."""
    name = f"step {step + 1}: "
    policy, batch, new, losses = policy_losses(recorded, models, step)
    ours = gradients_of(policy, losses.sum() / batch.response_mask.sum())
    theirs, mask = recorded.of_weights(step, "gradients"), batch.response_mask
    return [
        largest(f"{name}log-probs", recorded.step(step, "new_logprobs"), new.detach(), FP64, mask),
        relative(f"{name}gradients of all weights", theirs, ours, FP64),
        worst_weight(f"{name}gradients, the worst weight", theirs, ours, FP64),
    ]


def compare_micro_batches(recorded, models, num_micro_batches):
    """The peer's gradient of a step of several micro-batches: a mean of their means, where ours is a mean of tokens."""
    policy, batch, _, losses = policy_losses(recorded, models, 0)
    mask = batch.response_mask
    of_micro_batches = [
        part.sum() / counted.sum()
        for part, counted in zip(losses.chunk(num_micro_batches), mask.chunk(num_micro_batches), strict=True)
    ]
    weights = list(policy.parameters())
    means = torch.autograd.grad(sum(of_micro_batches) / num_micro_batches, weights, retain_graph=True)
    tokens = torch.autograd.grad(losses.sum() / mask.sum(), weights)
    names, theirs = [name for name, _ in policy.named_parameters()], recorded.of_weights(0, "gradients")
    return [
        relative("gradients, a mean of micro-batch means", theirs, dict(zip(names, means, strict=True)), FP64),
        relative("gradients, our mean over tokens", theirs, dict(zip(names, tokens, strict=True)), None),
    ]


def compare_pad_is_eos(recorded, models, tokenizer, prompts):
    """Where the padding token is the end-of-sequence token, as GPT-2 is often used: is the end a token that counts?"""
    ids = recorded.rollout("responses")
    ends = (ids == EOS) & ((ids == EOS).cumsum(dim=1) == 1)
    rows = make_prompts(list(prompts) * 4, DatasetConfig(), "parity")
    batch = make_prompt_batch(rows, tokenizer, 32, EOS, torch.device("cpu"))
    generation = GenerationConfig(max_new_tokens=ids.shape[1], temperature=recorded.options["temperature"])
    model = LanguageModel(load_model(models / "policy"))
    samples = sample(model, tokenizer, batch, generation, SpecialTokens((EOS,), EOS), RandomKey(0, 1))
    ends_counted = ((samples.response_ids == EOS) & samples.response_mask).sum(dim=1)
    return [
        count("peer: responses that ended", ends),
        Line("peer: their ends left out of the mask", "tokens", int((ends & recorded.rollout("padding_mask")).sum())),
        count("ours: responses that ended", samples.ended),
        unequal("ours: their ends left out of the mask", samples.ended, ends_counted == 1),
    ]
