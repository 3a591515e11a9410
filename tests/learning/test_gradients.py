"""What an optimizer step does with the other processes of a run; `test_update.py` tests its numbers."""

import dataclasses

import numpy as np
import pytest
import torch
from test_update import GENERATION, roll_and_score

from conftest import tiny_learner
from konic.finetuning.config import TrainingConfig
from konic.finetuning.errors import NotFiniteError
from konic.finetuning.learning.gradients import StepGradients
from konic.finetuning.system.world import ALONE


class WithAnother:
    """This process and another one, which tells `told` of its part of a step."""

    def __init__(self, **told):
        self.told = told

    def gather(self, mine):
        return [mine, mine | self.told]

    def sum_(self, tensors):
        for tensor in tensors:
            tensor.mul_(2)


def step(world, **settings):
    config = TrainingConfig(batch_size=8, ppo_epochs=1, **settings)
    learner = tiny_learner("llama", training=config, generation=GENERATION, dtype=torch.float64)
    rolled, advantages = roll_and_score(learner, config)
    return learner.policy, StepGradients(learner.policy, rolled, advantages, config, True, world), advantages


def test_a_problem_of_another_process_ends_the_step_in_this_one_too():
    _, gradients, advantages = step(WithAnother(problem=["The loss is not finite there."], sums={}, largest=0.0))
    with pytest.raises(NotFiniteError, match=r"^The loss is not finite there\.$"):
        gradients.accumulate(np.arange(8), int(advantages.mask.sum()))


def test_the_parts_of_all_processes_add_up_and_the_largest_ratio_of_any_counts():
    _, gradients, advantages = step(WithAnother(largest=3.5))
    num_tokens = int(advantages.mask.sum())
    twice = gradients.accumulate(np.arange(8), 2 * num_tokens)
    _, alone, _ = step(ALONE)
    once = alone.accumulate(np.arange(8), num_tokens)
    assert twice.largest_log_ratio == 3.5
    for field in dataclasses.fields(once):
        if field.name != "largest_log_ratio":
            assert getattr(twice, field.name) == pytest.approx(getattr(once, field.name), rel=1e-9, abs=1e-12)
    assert once.value_loss > 0


@pytest.mark.parametrize("train_policy", [True, False])
def test_a_pass_for_the_others_alone_has_gradients_of_0_where_the_policy_learns(train_policy):
    policy, gradients, _ = step(WithAnother())
    gradients._train_policy = train_policy
    passes, empty_pass = [], policy.language_model.empty_pass

    def noted():
        passes.append(torch.is_grad_enabled())
        return empty_pass()

    policy.language_model.empty_pass = noted
    gradients._take_part()
    adapter = [weight for name, weight in policy.trainable().items() if "lora" in name]
    assert passes == [train_policy]
    assert [weight.grad is not None for weight in adapter] == [train_policy] * len(adapter)
    assert all(not weight.grad.any() for weight in adapter if weight.grad is not None)
