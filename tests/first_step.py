"""The numbers of a run's first optimizer step, and how far those of several processes are from those of one in fp32.

Shapes: B responses of all processes, R response tokens, W trained weights.
"""

from contextlib import contextmanager
from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

from konic.finetuning.learning.gradients import StepGradients

LIMITS = {
    "log-probs, mean difference (nats)": 1e-5,
    "log-probs, largest difference (nats)": 1e-4,
    "reference's log-probs, mean difference (nats)": 1e-5,
    "reference's log-probs, largest difference (nats)": 1e-4,
    "exact KL, mean difference (nats)": 1e-5,
    "exact KL, largest difference (nats)": 1e-4,
    "advantages, relative L2": 1e-5,
    "loss, difference": 1e-5,
    "gradient, relative L2": 1e-5,
}
"""In fp32. Those of log-probs and gradients were measured on the real model, for other micro-batches of one process.
The KL is in nats too, and advantages and loss stand between log-probs and gradients, so they have the same. The
gradient's is for one rollout: that of several processes is computed with the sampler's log-probs of the one."""


@contextmanager
def first_step_recorded(file, of_one=None):
    """A context in which the first optimizer step of this process leaves its numbers in a file.

    Among them is the change of the weights by that step, which the second step sees at its start; and the gradient once
    more, with the sampler's log-probs of the file of another process, if there is one.
    """
    usual, first = StepGradients.accumulate, {}

    def gradient_like(step, rows, num_tokens):
        own, trainable = step._rollout, [*step._policy.trainable().values()]
        log_probs = load_file(of_one)["log_probs"]
        if log_probs.shape != own.log_probs.shape:  # other tokens: nothing can be compared
            return torch.zeros(0)
        step._rollout = replace(own, log_probs=log_probs)
        usual(step, rows, num_tokens)
        gradient = _flat(each.grad for each in trainable if each.grad is not None)
        step._rollout = own
        for each in trainable:
            each.grad = None
        return gradient

    def accumulate(self, rows, num_tokens):
        weights = _flat(self._policy.trainable().values())
        if "weights" in first:
            save_file(first | {"change": weights - first.pop("weights")}, file)
        like = gradient_like(self, rows, num_tokens) if of_one and not first else None
        stats = usual(self, rows, num_tokens)
        if first:
            return stats
        rollout, advantages = self._rollout, self._advantages
        loss = stats.policy_loss + advantages.value_loss_weight * stats.value_loss
        loss += self._config.entropy_coef * stats.entropy_loss + advantages.kl_loss_weight * stats.kl_loss
        first.update(
            tokens=rollout.samples.response_ids,  # [B, R]
            mask=rollout.response_mask,
            log_probs=rollout.log_probs,
            ref_log_probs=rollout.ref_log_probs,
            kl=rollout.kl,
            advantages=advantages.advantages,
            loss=torch.tensor([loss], dtype=torch.float64),
            gradient=_flat(each.grad for each in self._policy.trainable().values() if each.grad is not None),  # [W]
            weights=weights,
        )
        first["gradient_of_one_rollout"] = first["gradient"].clone() if like is None else like
        return stats

    StepGradients.accumulate = accumulate
    try:
        yield
    finally:
        StepGradients.accumulate = usual


def differences(one, several):
    """What the files of two processes differ by: LIMITS's names, and the change of the weights.

    Raises:
        AssertionError: The tokens differ, so that nothing else can be compared.
    """
    one, several = load_file(one), load_file(several)
    mask = one["mask"]
    assert torch.equal(mask, several["mask"]) and torch.equal(one["tokens"][mask], several["tokens"][mask])
    found = [
        function(several[name].double() - one[name].double())
        for name in ("log_probs", "ref_log_probs", "kl")
        for function in (lambda gap: gap[mask].abs().mean(), lambda gap: gap[mask].abs().max())
    ]
    found.append(_relative(one["advantages"], several["advantages"]))
    found.append((several["loss"] - one["loss"]).abs())
    found.append(_relative(one["gradient"], several["gradient_of_one_rollout"]))
    found = {name: number.item() for name, number in zip(LIMITS, found, strict=True)}
    return found | {
        f"{what}, relative L2": _relative(one[name], several[name]).item()
        for what, name in (
            ("gradient with its own sampler's log-probs", "gradient"),
            ("change of the weights by the step", "change"),
        )
    }


def sizes(file):
    """How many response tokens the step has, their mean KL, its loss, and the norm of its gradient."""
    one = load_file(file)
    mask = one["mask"]
    return {
        "tokens": int(mask.sum()),
        "exact KL": one["kl"][mask].mean().item(),
        "loss": one["loss"].item(),
        "gradient": one["gradient"].norm().item(),
    }


def _relative(one, other):
    return (other.double() - one.double()).norm() / one.double().norm()


def _flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).clone()
