import copy
import math
import statistics
from dataclasses import fields, replace

import pytest
import torch

from conftest import loaded_model, prompt_batch, roll, shake_adapter, tiny_learner, tiny_model
from konic.finetuning.algorithms import ALGORITHMS, Algorithm
from konic.finetuning.config import GenerationConfig, TrainingConfig
from konic.finetuning.errors import NotFiniteError, TrainingError
from konic.finetuning.learning import update as update_module
from konic.finetuning.learning.estimators import compute_advantages
from konic.finetuning.learning.learner import make_learner
from konic.finetuning.learning.schedule import Schedule
from konic.finetuning.learning.update import _minibatches, make_optimizer, update
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.length_groups import group_by_length
from konic.finetuning.models.policy import Policy
from konic.finetuning.rewards.scoring import Scores
from konic.finetuning.rollout.sampler import RandomKey, find_special_tokens

GENERATION = GenerationConfig(max_new_tokens=8, temperature=0.9, eos_token_id=tuple(range(40)))  # so that lengths vary
NAN = math.nan
PINNED = [[3, 4], [0, 1], [5, 2], [7, 6], [7, 6], [4, 1], [0, 3], [2, 5]]
REWARDS = [0.3, -1.0, 2.0, 0.1, 0.7, -0.2, 1.1, 0.0]


def roll_and_score(learner, config, rewards=REWARDS, shake=True):
    if shake:
        shake_adapter(learner.policy)
    batch = prompt_batch(learner)
    rolled = roll(learner, batch, GENERATION, RandomKey(3, 1), config.micro_batch_size)
    scores = Scores(list(rewards), {}, parts={"all": list(rewards)}, weights={"all": 1.0})
    return rolled, compute_advantages(rolled, scores, config, config.kl_penalty_weight)


def run_update(
    architecture="llama", *, lora=True, rewards=REWARDS, shake=True, spoil=None, dtype=torch.float64, **settings
):
    place = {} if "algorithm" in settings else {"kl_placement": "reward"}
    config = TrainingConfig(**{"batch_size": 8, "ppo_epochs": 1, "learning_rate": 1e-2} | place | settings)
    learner = tiny_learner(architecture, lora=lora, training=config, generation=GENERATION, dtype=dtype)
    rolled, advantages = roll_and_score(learner, config, rewards, shake)
    if spoil:
        rolled, advantages = spoil(rolled, advantages)
    schedule = Schedule(0, config.steps_per_iteration, config.learning_rate)
    stats = update(learner.policy, learner.optimizer, rolled, advantages, config, schedule)
    return learner, rolled, advantages, stats


def gradients(architecture, monkeypatch, **settings):
    """The gradients of one optimizer step, taken instead of it, and clipped to nothing."""
    taken = {}

    def capture(self, closure=None):
        taken["step"] = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]

    monkeypatch.setattr(torch.optim.AdamW, "step", capture)
    run_update(architecture, **{"max_grad_norm": 1e9, "entropy_coef": 0.01} | settings)
    return torch.cat([gradient.flatten() for gradient in taken["step"]])


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("accumulation", [2, 3, 8, 16])
def test_gradients_are_the_same_for_every_split_into_micro_batches(architecture, lora, accumulation, monkeypatch):
    whole = gradients(architecture, monkeypatch, lora=lora)
    split = gradients(architecture, monkeypatch, lora=lora, gradient_accumulation_steps=accumulation)
    assert whole.norm() > 1e-3
    assert (split - whole).norm() / whole.norm() < 1e-9


@pytest.mark.parametrize("shake", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_the_log_ratio_is_zero_before_the_first_step(architecture, lora, shake):
    for splits in ({}, {"gradient_accumulation_steps": 4}):
        *_, stats = run_update(architecture, lora=lora, shake=shake, **splits)
        assert stats.first_log_ratio < 1e-9
        assert stats.sampler_gap < 1e-9
        assert stats.clip_fraction == 0.0
        assert stats.approx_kl < 1e-12


def test_in_16_bits_the_log_ratio_starts_at_exactly_zero():
    """There sampler and trainer differ by more than rounding: the old log-probs are the trainer's own."""
    config = TrainingConfig(batch_size=8, ppo_epochs=1, learning_rate=1e-2)
    learner = tiny_learner("llama", training=config, generation=GENERATION, dtype=torch.bfloat16)
    rolled, advantages = roll_and_score(learner, config)
    stats = update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 1e-2))
    assert stats.first_log_ratio == 0.0
    assert stats.sampler_gap > 1e-4


def test_later_epochs_see_the_policy_move():
    *_, stats = run_update("llama", ppo_epochs=4, learning_rate=3e-2)
    assert stats.first_log_ratio < 1e-9
    assert stats.approx_kl > 0
    assert stats.clip_fraction > 0


def test_the_gradient_is_that_of_the_loss_written_out_token_by_token(architecture, monkeypatch):
    """One step against an oracle that loops over sequences and tokens without padding, in plain autograd."""
    config = TrainingConfig(
        batch_size=8, ppo_epochs=1, learning_rate=1e-2, vf_coef=0.3, entropy_coef=0.02, kl_placement="reward"
    )
    learner = tiny_learner(architecture, training=config, generation=GENERATION)
    rolled, advantages = roll_and_score(learner, config)
    policy, count, total = learner.policy, int(rolled.response_mask.sum()), 0.0
    for row in range(8):
        prompt = rolled.batch.ids[row][rolled.batch.mask[row]]
        response = rolled.samples.response_ids[row][rolled.response_mask[row]]
        output = policy.language_model.causal_lm(torch.cat([prompt, response])[None], output_hidden_states=True)
        for t, token in enumerate(response):
            at = len(prompt) + t - 1
            log_softmax = (output.logits[0, at] / GENERATION.temperature).log_softmax(-1)
            ratio = (log_softmax[token] - rolled.log_probs[row, t]).exp()
            a = advantages.advantages[row, t]
            value = policy.value_head(output.hidden_states[-1][0, at])
            clipped = rolled.values[row, t] + (value - rolled.values[row, t]).clamp(-0.2, 0.2)
            goal = advantages.returns[row, t]
            value_term = 0.5 * torch.maximum((value - goal) ** 2, (clipped - goal) ** 2)
            entropy = -(log_softmax.exp() * log_softmax).sum()
            total = total - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) + 0.3 * value_term - 0.02 * entropy
    (total / count).backward()
    expected = torch.cat([w.grad.flatten() for w in policy.trainable().values()])
    ours = gradients(architecture, monkeypatch, vf_coef=0.3, entropy_coef=0.02)
    assert (ours - expected).norm() / expected.norm() < 1e-9


def test_eos_gets_gradient(architecture, monkeypatch):
    """Advantage on nothing but the ends of responses that ended moves the weights; advantage on nothing does not."""

    def only_ends(value):
        def spoil(rolled, advantages):
            last = rolled.response_mask.sum(1) - 1
            ends = (
                torch.zeros_like(rolled.response_mask).scatter(1, last[:, None], True) & rolled.samples.ended[:, None]
            )
            assert ends.any()
            return rolled, replace(advantages, advantages=torch.where(ends, value, 0.0).double())

        return spoil

    options = {"vf_coef": 0.0, "entropy_coef": 0.0}
    assert gradients(architecture, monkeypatch, spoil=only_ends(1.0), **options).norm() > 1e-3
    assert gradients(architecture, monkeypatch, spoil=only_ends(0.0), **options).norm() == 0


def test_garbage_in_the_padding_changes_no_gradient(architecture, monkeypatch):
    def spoil(rolled, advantages):
        values = rolled.values.masked_fill(~rolled.response_mask, torch.nan)
        old = rolled.log_probs.masked_fill(~rolled.response_mask, -torch.inf)
        rolled = copy.copy(rolled)
        object.__setattr__(rolled, "values", values)
        object.__setattr__(rolled, "log_probs", old)
        garbage = advantages.advantages.masked_fill(~advantages.mask, 1e30)
        returns = advantages.returns.masked_fill(~advantages.mask, torch.nan)
        return rolled, replace(advantages, advantages=garbage, returns=returns)

    clean = gradients(architecture, monkeypatch)
    spoiled = gradients(architecture, monkeypatch, spoil=spoil)
    assert torch.equal(clean, spoiled)


def test_minibatches_take_every_sample_once_an_epoch_in_a_new_order(monkeypatch):
    seen = []
    hidden = LanguageModel.response_hidden

    def record(self, ids, mask, count):
        if torch.is_grad_enabled():
            seen.append([tuple(row) for row in ids.tolist()])
        return hidden(self, ids, mask, count)

    monkeypatch.setattr(LanguageModel, "response_hidden", record)
    _, rolled, *_ = run_update("llama", ppo_epochs=2, num_minibatches=4)
    everything = sorted(tuple(row) for row in rolled.ids.tolist())
    assert [len(rows) for rows in seen] == [2] * 8
    first, second = [row for rows in seen[:4] for row in rows], [row for rows in seen[4:] for row in rows]
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_unscored_samples_get_no_advantage_and_teach_the_value_head_nothing():
    some = [0.3, float("nan"), 2.0, 0.1, 0.7, float("nan"), 1.1, 0.0]
    _, _, advantages, _ = run_update("llama", rewards=some)
    for row in (1, 5):
        assert advantages.advantages[row].abs().sum() == 0
        assert not advantages.mask[row].any()
    scored = advantages.advantages[advantages.mask]
    assert abs(scored.mean()) < 1e-9
    assert abs(scored.std() - 1) < 1e-6


def test_nothing_moves_when_no_sample_has_a_score():
    learner, *_, stats = run_update("llama", rewards=[float("nan")] * 8, ppo_epochs=2)
    assert (stats.num_steps, stats.learning_rate, stats.first_log_ratio) == (0, 0.0, 0.0)
    shown = (stats.policy_loss, stats.value_loss, stats.entropy_loss, stats.kl_loss, stats.approx_kl, stats.grad_norm)
    assert shown == (0.0,) * 6
    assert math.isnan(stats.explained_variance)
    fresh = tiny_learner("llama", training=TrainingConfig(batch_size=8), generation=GENERATION)
    shake_adapter(fresh.policy)
    for ours, theirs in zip(learner.policy.trainable().values(), fresh.policy.trainable().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_minibatches_and_micro_batches_without_a_score_are_passed_over(monkeypatch):
    some = [0.3, NAN, 2.0, NAN, 0.7, NAN, 1.1, 0.0]
    *_, stats = run_update("llama", rewards=some, num_minibatches=8, ppo_epochs=2)
    assert stats.num_steps == 10
    first_empty = [NAN, NAN, 2.0, 0.1, 0.7, NAN, 1.1, 0.0]
    whole, split = (
        gradients("llama", monkeypatch, rewards=first_empty, gradient_accumulation_steps=parts) for parts in (1, 4)
    )
    assert (whole - split).norm() / whole.norm() < 1e-9


@pytest.mark.parametrize("accumulation", [2, 4])
def test_no_pass_reads_more_rows_than_a_micro_batch(accumulation, monkeypatch):
    rows, plain = [], LanguageModel.response_hidden

    def record(self, ids, mask, num_response_tokens):
        rows.append(len(ids))
        return plain(self, ids, mask, num_response_tokens)

    monkeypatch.setattr(LanguageModel, "response_hidden", record)
    run_update("llama", num_minibatches=2, ppo_epochs=3, gradient_accumulation_steps=accumulation)
    assert max(rows) <= 4 // accumulation


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_micro_batch_without_a_score_does_not_end_the_step(which, monkeypatch):
    _, rolled, *_ = run_update("llama")
    empty = group_by_length(rolled.batch.mask, rolled.response_mask, 2)[which].tolist()
    some = [NAN if row in empty else reward for row, reward in enumerate(REWARDS)]
    whole, split = (gradients("llama", monkeypatch, rewards=some, gradient_accumulation_steps=n) for n in (1, 4))
    assert (whole - split).norm() / whole.norm() < 1e-9


def test_every_epoch_has_as_many_steps_as_minibatches():
    for number in (1, 2, 4):
        *_, stats = run_update("llama", num_minibatches=number, ppo_epochs=3)
        assert stats.num_steps == 3 * number


@pytest.mark.parametrize("bad", [[0], [1, 3], [0, 1, 2, 3]])
def test_steps_that_are_not_finite_are_dropped_counted_and_told(bad, monkeypatch, caplog):
    steps, plain = iter(range(4)), update_module._step

    def spoiled(*arguments):
        if next(steps) in bad:
            raise NotFiniteError("The gradient of q is not finite.")
        return plain(*arguments)

    monkeypatch.setattr(update_module, "_step", spoiled)
    *_, stats = run_update("llama", ppo_epochs=4, on_nonfinite="skip")
    assert (stats.num_nonfinite, stats.num_steps) == (len(bad), 4 - len(bad))
    told = "A step is dropped (on_nonfinite='skip'): The gradient of q is not finite."
    assert [record.getMessage() for record in caplog.records if record.name == update_module.__name__] == [told] * len(
        bad
    )


def test_a_minibatch_of_a_single_token_is_a_step():
    def spoil(rolled, advantages):
        only = torch.zeros_like(advantages.mask)
        only[4, 0] = True
        return rolled, replace(advantages, mask=only)

    *_, stats = run_update("llama", spoil=spoil)
    assert stats.num_steps == 1
    assert stats.grad_norm > 0


@pytest.mark.parametrize("accumulation", [2, 8])
def test_what_is_shown_is_the_same_for_every_split_into_micro_batches(accumulation):
    options = {"ppo_epochs": 2, "entropy_coef": 0.01, "kl_placement": "loss", "learning_rate": 3e-2}
    (*_, whole), (*_, split) = (
        run_update("llama", **options, gradient_accumulation_steps=parts) for parts in (1, accumulation)
    )
    for field in fields(whole):
        assert getattr(split, field.name) == pytest.approx(getattr(whole, field.name), rel=1e-9), field.name


def test_without_an_entropy_bonus_the_entropy_shown_is_that_of_the_sampling_policy():
    _, rolled, _, stats = run_update("llama", ppo_epochs=4, learning_rate=3e-2)
    sampled = -rolled.entropy[rolled.response_mask].mean().item()
    assert stats.entropy_loss == pytest.approx(sampled, rel=1e-12)
    *_, followed = run_update("llama", ppo_epochs=4, learning_rate=3e-2, entropy_coef=1e-6)
    assert abs(followed.entropy_loss - sampled) > 1e-4


def test_the_kl_of_the_update_is_shown_only_where_it_is_learned_from():
    *_, in_reward = run_update("llama")
    _, rolled, _, in_loss = run_update("llama", kl_placement="loss")
    assert in_reward.kl_loss == 0.0
    assert in_loss.kl_loss == pytest.approx(rolled.kl[rolled.response_mask].mean().item(), rel=1e-9)


def test_explained_variance_is_that_of_the_values_over_the_tokens_that_count():
    some = [0.3, NAN, 2.0, 0.1, 0.7, -0.2, 1.1, 0.0]
    _, rolled, advantages, stats = run_update("llama", rewards=some, ppo_epochs=2)
    pairs = [
        (rolled.values[row, t].item(), advantages.returns[row, t].item())
        for row, t in advantages.mask.nonzero().tolist()
    ]
    left = statistics.pvariance([goal - value for value, goal in pairs])
    assert stats.explained_variance == pytest.approx(1 - left / statistics.pvariance([goal for _, goal in pairs]))


def test_missing_eos_is_penalised_once():
    config = TrainingConfig(batch_size=8, ppo_epochs=1, gae_lambda=1.0, kl_penalty_weight=0.0)
    learner = tiny_learner("llama", training=config, generation=GENERATION)
    rolled, plain = roll_and_score(learner, config)
    with_penalty = config.model_copy(update={"missing_eos_penalty": 5.0})
    penalised = compute_advantages(rolled, Scores(REWARDS, {}), with_penalty, 0.0)
    difference = (plain.returns - penalised.returns)[:, 0]
    assert torch.allclose(difference, torch.where(rolled.samples.ended, 0.0, 5.0).double())


@pytest.mark.parametrize("lora", [True, False])
def test_gradient_checkpointing_saves_bytes_and_changes_no_gradient(architecture, lora, monkeypatch):
    def saved_bytes(checkpointing):
        config = TrainingConfig(batch_size=8, ppo_epochs=1, gradient_checkpointing=checkpointing)
        learner = tiny_learner(architecture, lora=lora, training=config, generation=GENERATION)
        rolled, _ = roll_and_score(learner, config)
        counted = {}

        def pack(tensor):
            if tensor.data_ptr() not in known:
                counted[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        known = {weight.data_ptr() for weight in learner.policy.model.parameters()}
        with learner.policy.saving_memory(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            learner.policy.language_model.response_hidden(rolled.ids, rolled.mask, 8)
        return sum(counted.values())

    assert saved_bytes(True) < 0.25 * saved_bytes(False)
    plain = gradients(architecture, monkeypatch, lora=lora)
    checkpointed = gradients(architecture, monkeypatch, lora=lora, gradient_checkpointing=True)
    assert (plain - checkpointed).norm() / plain.norm() < 1e-9


def test_large_batches_recompute_their_logits_and_change_no_gradient(architecture, monkeypatch):
    plain = gradients(architecture, monkeypatch)
    monkeypatch.setattr("konic.finetuning.models.token_scores.MAX_KEPT_LOGITS", 0)
    monkeypatch.setattr("konic.finetuning.models.token_scores.MAX_LOGITS", {"cpu": 257 * 3})
    chunked = gradients(architecture, monkeypatch)
    assert (plain - chunked).norm() / plain.norm() < 1e-9


@pytest.mark.parametrize("where", ["advantages", "returns"])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_sample(architecture, where):
    def spoil(rolled, advantages):
        getattr(advantages, where)[2, 0] = torch.nan
        return rolled, advantages

    config = TrainingConfig(batch_size=8, ppo_epochs=1)
    learner = tiny_learner(architecture, training=config, generation=GENERATION)
    rolled, advantages = spoil(*roll_and_score(learner, config))
    before = [weight.clone() for weight in learner.policy.trainable().values()]
    with pytest.raises(TrainingError) as error:
        update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 1e-3))
    assert str(error.value) == (
        "The loss is not finite for the sample of dataset row 2, prompt 'x'. The step was not taken. Usual causes: a "
        "learning rate that is too high, half precision, or damaged weights."
    )
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.trainable().values(), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_step_and_names_the_tensor(architecture):
    config = TrainingConfig(batch_size=8, ppo_epochs=1)
    learner = tiny_learner(architecture, training=config, generation=GENERATION)
    rolled, advantages = roll_and_score(learner, config)
    name, weight = next(iter(learner.policy.trainable().items()))
    weight.register_hook(lambda gradient: gradient * torch.inf)
    before = [w.clone() for w in learner.policy.trainable().values()]
    with pytest.raises(TrainingError) as error:
        update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 1e-3))
    told = f"The gradient of {name} is not finite. The step was not taken; lower the learning rate."
    assert str(error.value) == told
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.trainable().values(), strict=True))
    assert all(w.grad is None for w in learner.policy.trainable().values())


def test_gradients_are_clipped_to_the_norm_and_reported_before_it(monkeypatch):
    norms = []

    def capture(self, closure=None):
        taken = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([gradient.flatten() for gradient in taken]).norm().item())

    monkeypatch.setattr(torch.optim.AdamW, "step", capture)
    *_, stats = run_update("llama", max_grad_norm=1e-3)
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert stats.grad_norm > 1e-2


def test_adam_has_the_papers_epsilon_and_the_schedules_rate(monkeypatch):
    rates = []
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, closure=None: rates.append((self.defaults["eps"], self.param_groups[0]["lr"])),
    )
    *_, stats = run_update("llama", ppo_epochs=4, warmup_steps=2, lr_scheduler="linear", learning_rate=1e-2)
    assert [eps for eps, _ in rates] == [1e-5] * 4
    assert [rate for _, rate in rates] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])
    assert stats.learning_rate == pytest.approx(5e-3)
    rates.clear()
    run_update("llama", ppo_epochs=5, lr_scheduler="linear", learning_rate=1e-2)
    assert [rate for _, rate in rates] == pytest.approx([1e-2, 8e-3, 6e-3, 4e-3, 2e-3])


def test_weight_decay_reaches_the_optimizer_and_only_the_schedule_sets_a_rate():
    learner = tiny_learner("llama", training=TrainingConfig(weight_decay=0.3))
    assert learner.optimizer.param_groups[0]["lr"] == 0.0
    assert learner.optimizer.param_groups[0]["weight_decay"] == 0.3


def test_the_shown_loss_is_the_weighted_sum_of_its_parts():
    *_, stats = run_update("llama", vf_coef=0.7, entropy_coef=0.03, ppo_epochs=2)
    assert stats.total_loss == pytest.approx(stats.policy_loss + 0.7 * stats.value_loss + 0.03 * stats.entropy_loss)
    assert min(abs(stats.policy_loss), stats.value_loss, -stats.entropy_loss) > 1e-6


def test_a_wrong_old_log_prob_is_seen_in_the_first_ratio():
    def spoil(rolled, advantages):
        rolled.log_probs[rolled.response_mask] -= 0.25
        return rolled, advantages

    *_, stats = run_update("llama", spoil=spoil, self_checks=False)
    assert stats.first_log_ratio == pytest.approx(0.25)
    assert stats.approx_kl == pytest.approx(torch.tensor(0.25).exp().item() - 1 - 0.25, rel=1e-6)
    assert stats.clip_fraction == 1.0  # e^0.25 is beyond 1.2


def test_a_gradient_norm_that_overflows_stops_before_the_step():
    config = TrainingConfig(batch_size=8, ppo_epochs=1)
    learner = tiny_learner("llama", training=config, generation=GENERATION)
    rolled, advantages = roll_and_score(learner, config)
    next(iter(learner.policy.trainable().values())).register_hook(
        lambda gradient: gradient.new_full(gradient.shape, 1e160)
    )
    with pytest.raises(TrainingError, match="gradient of all weights together is not finite"):
        update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 1e-3))


def test_a_first_ratio_that_is_not_one_stops_the_run_before_the_step():
    config = TrainingConfig(batch_size=8, ppo_epochs=1)
    learner = tiny_learner("llama", training=config, generation=GENERATION)
    rolled, advantages = roll_and_score(learner, config)
    rolled.log_probs[rolled.response_mask] += 2e-2
    before = [weight.clone() for weight in learner.policy.trainable().values()]
    limits = r"the limits are 0\.001 and 0\.01\. "
    with pytest.raises(TrainingError, match=r"by \S+e-\d+ nats per token on average and by up to 0\.02; " + limits):
        update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 1e-3))
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.trainable().values(), strict=True))
    assert all(weight.grad is None for weight in learner.policy.trainable().values())
    rolled.log_probs[rolled.response_mask] -= 2e-2
    rolled.samples.log_probs[rolled.response_mask] += 2e-3
    with pytest.raises(TrainingError, match=r"by 0\.002 nats per token on average and by up to 0; the limits are"):
        update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 1e-3))
    half = replace(rolled, in_full_precision=False)
    update(learner.policy, learner.optimizer, half, advantages, config, Schedule(0, 1, 1e-3))


@pytest.mark.parametrize("lora", [True, False])
def test_the_gradient_of_the_kl_in_the_loss_is_that_of_the_divergence_written_out(architecture, lora, monkeypatch):
    """Policy against reference, both whole and unpadded, one sequence at a time."""
    settings = {"kl_penalty_weight": 0.5, "kl_placement": "loss", "vf_coef": 0.0, "entropy_coef": 0.0}
    config = TrainingConfig(batch_size=8, ppo_epochs=1, learning_rate=1e-2, **settings)
    learner = tiny_learner(architecture, lora=lora, training=config, generation=GENERATION)
    rolled, advantages = roll_and_score(learner, config)
    policy, divergence, surrogate = learner.policy, 0.0, 0.0
    for row in range(8):
        prompt = rolled.batch.ids[row][rolled.batch.mask[row]]
        response = rolled.samples.response_ids[row][rolled.response_mask[row]]
        whole = torch.cat([prompt, response])[None]
        with torch.no_grad(), policy.reference() as reference:
            ref = (reference.causal_lm(whole).logits[0] / GENERATION.temperature).log_softmax(-1)
        own = (policy.language_model.causal_lm(whole).logits[0] / GENERATION.temperature).log_softmax(-1)
        for t, token in enumerate(response):
            at = len(prompt) + t - 1
            divergence = divergence + (own[at].exp() * (own[at] - ref[at])).sum()
            surrogate = surrogate - (own[at, token] - rolled.log_probs[row, t]).exp() * advantages.advantages[row, t]
    count = int(rolled.response_mask.sum())
    ((surrogate + advantages.kl_loss_weight * divergence) / count).backward()
    named = policy.trainable()
    expected = torch.cat([w.grad.flatten() for name, w in named.items() if not name.startswith("value_head")])
    ours = gradients(architecture, monkeypatch, lora=lora, **settings)
    assert (ours - expected).norm() / expected.norm() < 1e-9
    *_, stats = run_update(architecture, lora=lora, self_checks=True, **settings)
    assert stats.kl_loss == pytest.approx(divergence.item() / count, rel=1e-9)
    assert stats.total_loss == pytest.approx(stats.policy_loss + advantages.kl_loss_weight * stats.kl_loss)


def test_a_kl_in_the_loss_survives_chunks_and_recomputation(architecture, monkeypatch):
    settings = {"kl_placement": "loss", "kl_penalty_weight": 0.5}
    plain = gradients(architecture, monkeypatch, **settings)
    split = gradients(architecture, monkeypatch, gradient_accumulation_steps=4, **settings)
    monkeypatch.setattr("konic.finetuning.models.token_scores.MAX_KEPT_LOGITS", 0)
    monkeypatch.setattr("konic.finetuning.models.token_scores.MAX_LOGITS", {"cpu": 257 * 3})
    chunked = gradients(architecture, monkeypatch, **settings)
    for other in (split, chunked):
        assert (plain - other).norm() / plain.norm() < 1e-9
    without = gradients(architecture, monkeypatch, kl_placement="loss", kl_penalty_weight=0.0)
    assert (plain - without).norm() / plain.norm() > 1e-3


@pytest.mark.parametrize("head", [("lm_head",), ()])
def test_a_trained_head_is_switched_off_where_the_reference_is_made(head):
    """With the head among what the adapter saves, the reference has another head than the policy."""
    import peft

    config = TrainingConfig(batch_size=8, ppo_epochs=1, kl_placement="loss", kl_penalty_weight=0.5)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=list(head) or None, task_type="CAUSAL_LM")
    policy = Policy(loaded_model("llama"), adapter)
    special = find_special_tokens(GENERATION, policy.language_model, policy.tokenizer)
    learner = make_learner(policy, make_optimizer(policy, config), special, "llama")
    base = tiny_model("llama")
    rolled, advantages = roll_and_score(learner, config)
    row = 3
    whole = torch.cat([rolled.batch.ids[row][rolled.batch.mask[row]], rolled.samples.response_ids[row]])[None]
    count = int(rolled.response_mask[row].sum())
    with torch.no_grad():
        logits = base(whole).logits[0, -rolled.response_mask.shape[1] - 1 : -1][:count] / GENERATION.temperature
    truth = logits.log_softmax(-1).gather(-1, rolled.samples.response_ids[row, :count, None])[:, 0]
    assert torch.allclose(rolled.ref_log_probs[row, :count], truth, atol=1e-9)
    before = {name: weight.clone() for name, weight in policy.trainable().items()}
    stats = update(policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 1e-3))
    assert stats.kl_loss == pytest.approx(rolled.kl[rolled.response_mask].mean().item(), rel=1e-9)
    moved = {name for name, weight in policy.trainable().items() if not torch.equal(weight, before[name])}
    assert any("lm_head" in name for name in moved) == bool(head)


@pytest.mark.parametrize(
    ("limit", "measure"), [("MAX_SAMPLER_GAP", "sampler_gap"), ("MAX_FIRST_LOG_RATIO", "first_log_ratio")]
)
def test_sampler_and_trainer_may_differ_by_what_is_allowed_and_no_more(limit, measure, monkeypatch):
    *_, stats = run_update("llama", dtype=torch.float32)
    differ = getattr(stats, measure)
    assert differ > 0
    monkeypatch.setattr(update_module, limit, differ)
    *_, again = run_update("llama", dtype=torch.float32)
    assert (getattr(again, measure), again.num_steps) == (differ, 1)
    monkeypatch.setattr(update_module, limit, differ * 0.99)
    with pytest.raises(TrainingError) as error:
        run_update("llama", dtype=torch.float32)
    assert str(error.value) == (
        "Before the first step the policy is the one that sampled, but the log-probs of sampler and trainer differ by "
        f"{stats.sampler_gap:.2g} nats per token on average and by up to {stats.first_log_ratio:.2g}; the limits are "
        f"{update_module.MAX_SAMPLER_GAP:g} and {update_module.MAX_FIRST_LOG_RATIO:g}. Either the model computes a "
        "cached sequence differently from a whole one (try model_kwargs={'attn_implementation': 'eager'}; on a GPU, "
        "full fp32 products: torch.set_float32_matmul_precision('highest')), or another engine samples in lower "
        "precision, or something in the model changes from one pass to the next, such as dropout, a batch norm or "
        "random routing. The step was not taken. "
        "To continue anyway, set TrainingConfig(self_checks=False)."
    )


def test_minibatches_depend_on_the_seed_the_step_and_the_epoch_alone():
    def orders(seed=3, first_step=0):
        config = TrainingConfig(batch_size=8, num_minibatches=4, ppo_epochs=2, seed=seed)
        return [rows.tolist() for rows in _minibatches(8, config, first_step)]

    assert orders() == orders()
    assert len({str(order) for order in (orders(), orders(seed=4), orders(first_step=8))}) == 3
    # pinned: a checkpoint of an earlier release resumes with the same minibatches
    assert orders() == PINNED


def test_a_long_prompt_is_named_by_its_first_hundred_characters():
    config = TrainingConfig(batch_size=1, ppo_epochs=1)
    learner = tiny_learner("llama", training=config, generation=GENERATION)
    batch = prompt_batch(learner, ["".join(chr(97 + n % 26) for n in range(150))])
    rolled = roll(learner, batch, GENERATION, RandomKey(3, 1))
    advantages = compute_advantages(rolled, Scores([1.0], {}), config, 0.0)
    advantages.returns[0, 0] = NAN
    with pytest.raises(TrainingError) as error:
        update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 1e-3))
    assert f"prompt {batch.prompts[0].text[:100]!r}. The step" in str(error.value)


def test_target_kl_leaves_out_the_steps_after_the_policy_has_moved_that_far():
    *_, free = run_update("llama", ppo_epochs=4, learning_rate=3e-2)
    assert free.num_steps == 4
    stopped_learner, *_, stopped = run_update("llama", ppo_epochs=4, learning_rate=3e-2, target_kl=1e-9)
    assert stopped.num_steps == 1
    assert stopped.approx_kl == 0.0
    *_, first = run_update("llama", dtype=torch.float32, ppo_epochs=2, learning_rate=3e-2, target_kl=1e-300)
    assert first.num_steps == 1  # rounding alone stops no update
    once_learner, *_ = run_update("llama", ppo_epochs=1, learning_rate=3e-2)
    same = zip(stopped_learner.policy.trainable().values(), once_learner.policy.trainable().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert all(weight.grad is None for weight in stopped_learner.policy.trainable().values())
    *_, wide = run_update("llama", ppo_epochs=4, learning_rate=3e-2, target_kl=1e9)
    assert wide == free
    *_, two = run_update("llama", ppo_epochs=2, learning_rate=3e-2)
    moved = 2 * two.approx_kl  # the mean of 0 before the first step and this before the second
    for target, steps in ((moved, 2), (0.999 * moved, 1)):
        *_, stats = run_update("llama", ppo_epochs=2, learning_rate=3e-2, target_kl=target)
        assert stats.num_steps == steps


def test_while_values_warm_up_the_policy_stays_where_it_is(architecture):
    config = TrainingConfig(batch_size=8, ppo_epochs=4, learning_rate=1e-2, entropy_coef=0.01)
    learner = tiny_learner(architecture, training=config, generation=GENERATION)
    rolled, advantages = roll_and_score(learner, config)
    before = {name: weight.clone() for name, weight in learner.policy.trainable().items()}
    schedule = Schedule(0, 4, 1e-2, train_policy=False)
    stats = update(learner.policy, learner.optimizer, rolled, advantages, config, schedule)
    moved = {name for name, weight in learner.policy.trainable().items() if not torch.equal(weight, before[name])}
    assert moved == {"value_head.weight", "value_head.bias"}
    assert stats.approx_kl < 1e-12
    assert stats.num_steps == 4
    assert stats.total_loss == pytest.approx(config.vf_coef * stats.value_loss)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "dr_grpo", "reinforce++"])
def test_algorithms_without_values_leave_the_value_head_alone(algorithm):
    learner, _, advantages, stats = run_update("llama", algorithm=algorithm, shake=False)
    assert all((weight == 0).all() for weight in learner.policy.value_head.parameters())
    assert stats.value_loss == 0.0
    assert advantages.value_loss_weight == 0.0
    assert math.isnan(stats.explained_variance)


@pytest.mark.parametrize("lora", [True, False])
def test_a_kl_in_the_loss_pulls_at_nothing_while_the_policy_is_its_reference(lora):
    """In fp32, where a gradient made of rounding would be followed by Adam at its full step size."""
    config = TrainingConfig(algorithm="grpo", batch_size=8, ppo_epochs=4, learning_rate=1e-2)
    learner = tiny_learner("llama", lora=lora, training=config, generation=GENERATION, dtype=torch.float32)
    rolled, advantages = roll_and_score(learner, config, rewards=[1.0] * 8, shake=False)
    advantages = replace(advantages, has_signal=True)  # as if one reward somewhere differed
    before = [weight.clone() for weight in learner.policy.trainable().values()]
    stats = update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 4, 1e-2))
    assert (stats.num_steps, stats.grad_norm, stats.kl_loss) == (4, 0.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.trainable().values(), strict=True))


def test_micro_batches_change_single_precision_gradients_by_rounding_only(architecture, monkeypatch):
    whole, split = (
        gradients(architecture, monkeypatch, dtype=torch.float32, gradient_accumulation_steps=n) for n in (1, 8)
    )
    assert 0 < (split - whole).norm() / whole.norm() < 1e-5


def test_a_row_names_its_loss_its_ratio_and_its_clip(monkeypatch):
    """A row with a ratio of the whole response, after one step: its loss and clipped share, written out."""
    row = Algorithm(advantages="group_centred", compares_groups=True, ratio_level="sequence", clip_ratios=(1e-4, 3e-2))
    monkeypatch.setitem(ALGORITHMS, "grpo", row)
    config = TrainingConfig(algorithm="grpo", batch_size=8, ppo_epochs=1, learning_rate=1e-2, kl_penalty_weight=0.0)
    assert (config.responses_per_prompt, config.clip_ratios) == (4, (1e-4, 3e-2))
    learner = tiny_learner("llama", training=config, generation=GENERATION)
    rolled, advantages = roll_and_score(learner, config)
    shake_adapter(learner.policy, scale=0.01, seed=9)  # so that the ratios are not one
    config = config.model_copy(update={"self_checks": False})
    stats = update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 0.0))
    mask, losses, clipped = rolled.response_mask, [], []
    for index in range(8):
        prompt = rolled.batch.ids[index][rolled.batch.mask[index]]
        response = rolled.samples.response_ids[index][mask[index]]
        with torch.no_grad():
            logits = learner.policy.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        scaled = (logits / GENERATION.temperature).log_softmax(-1)
        new = scaled.gather(-1, response[:, None]).squeeze(-1)
        ratio = math.exp(statistics.mean((new - rolled.log_probs[index][mask[index]]).tolist()))
        advantage = advantages.advantages[index, 0].item()
        kept = min(max(ratio, 1 - 1e-4), 1 + 3e-2)
        losses += [-min(ratio * advantage, kept * advantage)] * len(response)
        clipped += [ratio < 1 - 1e-4 or ratio > 1 + 3e-2] * len(response)
    assert stats.policy_loss == pytest.approx(statistics.mean(losses), abs=1e-9)
    assert stats.clip_fraction == pytest.approx(statistics.mean(clipped))
    assert 0 < stats.clip_fraction < 1


def new_log_probs(learner, rolled):
    """Per response, the log-probs of its tokens under the policy as it is now, from its own unpadded pass."""
    for index, mask in enumerate(rolled.response_mask):
        prompt = rolled.batch.ids[index][rolled.batch.mask[index]]
        response = rolled.samples.response_ids[index][mask]
        with torch.no_grad():
            logits = learner.policy.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        scaled = (logits / GENERATION.temperature).log_softmax(-1)
        yield scaled.gather(-1, response[:, None]).squeeze(-1).tolist(), rolled.log_probs[index][mask].tolist()


def gspo_loss(news, olds, advantage):
    ratio = math.exp(statistics.mean(new - old for new, old in zip(news, olds, strict=True)))
    return -min(ratio * advantage, min(max(ratio, 1 - 3e-4), 1 + 4e-4) * advantage)


def sapo_loss(news, olds, advantage):
    tau = 1.0 if advantage > 0 else 1.05
    ratios = [math.exp(new - old) for new, old in zip(news, olds, strict=True)]
    return statistics.mean(-advantage * 4 / tau / (1 + math.exp(-tau * (ratio - 1))) for ratio in ratios)


@pytest.mark.parametrize(("algorithm", "loss"), [("gspo", gspo_loss), ("sapo", sapo_loss)])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_response_counts_the_same_however_long_it_is(algorithm, loss, accumulation):
    config = TrainingConfig(
        algorithm=algorithm, batch_size=8, ppo_epochs=1, gradient_accumulation_steps=accumulation, self_checks=False
    )
    learner = tiny_learner("llama", training=config, generation=GENERATION)
    rolled, advantages = roll_and_score(learner, config)
    assert len(set(rolled.response_mask.sum(dim=1).tolist())) > 2
    shake_adapter(learner.policy, scale=0.01, seed=9)  # so that the ratios are not one
    expected = statistics.mean(
        loss(news, olds, advantages.advantages[row, 0].item())
        for row, (news, olds) in enumerate(new_log_probs(learner, rolled))
    )
    stats = update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 0.0))
    assert stats.policy_loss == pytest.approx(expected, abs=1e-9)
    assert abs(stats.policy_loss) > 1e-4


@pytest.mark.parametrize("algorithm", ["gspo", "sapo", "cispo", "gdpo"])
def test_the_gradients_of_every_average_are_the_same_for_every_split(algorithm, monkeypatch):
    settings = {"algorithm": algorithm, "kl_penalty_weight": 0.3}
    whole = gradients("llama", monkeypatch, **settings)
    split = gradients("llama", monkeypatch, gradient_accumulation_steps=8, **settings)
    assert (split - whole).norm() / whole.norm() < 1e-9


def trained_parts(learner):
    """Copies of the adapter and of the value head."""
    named = {name: weight.detach().clone() for name, weight in learner.policy.trainable().items()}
    return [{n: w for n, w in named.items() if n.startswith("value_head") == is_head} for is_head in (False, True)]


@pytest.mark.parametrize(
    ("settings", "adapter_moves", "head_moves", "steps"),
    [
        ({"algorithm": "ppo"}, False, True, 2),
        ({"algorithm": "grpo"}, False, False, 0),
        ({"algorithm": "reinforce++"}, False, False, 0),
        ({"algorithm": "grpo", "entropy_coef": 0.01}, True, False, 2),  # what you ask for beside the reward
    ],
)
def test_scores_that_teach_nothing_do_not_move_the_policy_even_by_momentum(settings, adapter_moves, head_moves, steps):
    config = TrainingConfig(**{"batch_size": 8, "ppo_epochs": 2, "learning_rate": 1e-2} | settings)
    learner = tiny_learner("llama", training=config, generation=GENERATION)
    rolled, advantages = roll_and_score(learner, config)
    update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 4, 1e-2))  # momentum to go on
    rolled, advantages = roll_and_score(learner, config, rewards=[1.0] * 8, shake=False)
    before = trained_parts(learner)
    stats = update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(2, 4, 1e-2))
    moved = [
        any(not torch.equal(part[name], weight) for name, weight in then.items())
        for then, part in zip(before, trained_parts(learner), strict=True)
    ]
    assert (*moved, stats.num_steps) == (adapter_moves, head_moves, steps)
