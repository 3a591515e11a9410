"""Rollout, results -> TrainingError, or nothing: what must hold in every iteration.

A broken invariant stops the run before the optimizer step. Two more are checked where they are measured: the reference
is the loaded model (`Policy.check_reference`), and the policy that trains is the one that sampled (`update`).
"""

from konic.finetuning.errors import TrainingError
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.sharding import own_part
from konic.finetuning.rewards.scoring import Scores
from konic.finetuning.rollout.rollout import Rollout
from konic.finetuning.run.checks import PATIENCE, History

MAX_START_KL = 1e-4
"""KL per token, nats, of the untrained policy from its reference in fp32. Rounding stays below a thousandth of it."""
MAX_REWARD = 1e15
"""The square of a larger reward, and sums of such squares, come near the limit of single precision (3e38)."""


def require_sound_rollout(rollout: Rollout, iteration: int) -> None:
    """Check that an untrained policy is its reference.

    Raises:
        TrainingError: It is not. Nothing was updated.
    """
    if not rollout.in_full_precision:
        return
    kl = rollout.kl.max().item()
    if iteration == 1 and kl > MAX_START_KL:
        raise TrainingError(
            f"Before any training the policy is {kl:.2g} nats per token from its reference, which is the same model: "
            "either the adapter is not switched off when the reference is computed, or the model gives other numbers "
            "for a cached sequence, as in sampling, than for a whole one. Nothing was updated. Try plain LoRA "
            "(LoraConfig()) and model_kwargs={'attn_implementation': 'eager'}, and please report it."
        )


def find_nonfinite(rollout: Rollout, scores: Scores, policy: Policy) -> str | None:
    """The first number of a batch that is not finite, with its sample and what to do; None if there is none.

    A reward beyond ±1e15 counts too, because its square must fit into single precision with room for sums.
    """
    for name in ("log_probs", "ref_log_probs", "kl", "entropy", "values"):
        bad = (rollout.response_mask & ~getattr(rollout, name).isfinite()).any(dim=1).nonzero()
        if len(bad):
            prompt = rollout.batch.prompts[int(bad[0])]
            weight = next((n for n, w in policy.model.named_parameters() if not own_part(w).isfinite().all()), None)
            whose = f"{name} of the response to dataset row {prompt.row}, prompt {prompt.text[:100]!r}, are not finite."
            if weight:
                return f"{whose} The weights {weight} hold NaN or infinity: resume an earlier checkpoint."
            return f"{whose} All weights are finite: the model overflows; try model_kwargs={{'dtype': 'float32'}}."
    for prompt, reward in zip(rollout.batch.prompts, scores.rewards, strict=True):
        if abs(reward) > MAX_REWARD:
            return (
                f"The reward of the response to dataset row {prompt.row}, prompt {prompt.text[:100]!r}, is {reward:g}, "
                f"beyond ±{MAX_REWARD:g}: nothing can be learned from numbers of that size. Scale or clip your rewards."
            )
    return None


def require_not_all_dropped(history: History) -> None:
    """Check that a run with on_nonfinite="skip" does not drop everything.

    Raises:
        TrainingError: Several iterations in a row took no optimizer step.
    """
    recent = history[-PATIENCE:]
    if len(recent) == PATIENCE and all(result.was_dropped for result in recent):
        raise TrainingError(
            f"In each of the last {PATIENCE} iterations everything was dropped because numbers were not finite "
            "(on_nonfinite='skip'): the model no longer learns. The warnings above name the numbers. Go back to an "
            "earlier checkpoint, and lower the learning rate or fix the reward."
        )
