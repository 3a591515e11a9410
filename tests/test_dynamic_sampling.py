"""Which prompts a run asks and which responses it learns from: groups replaced, left out, drawn by weight; resumed."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import PROMPTS
from konic.finetuning import (
    BaseKonicFinetuningCallback,
    ConfigError,
    DatasetConfig,
    DatasetError,
    KonicLLMRewardComposer,
    OutputError,
    TrainingError,
    llm_reward,
)
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.run.checkpoint import read_record
from konic.finetuning.system.files import seal
from test_engine import completions, make_engine, metrics, same_tensors, weights

GROUPS = {"algorithm": "grpo", "batch_size": 8, "num_generations": 4, "filter_equal_groups": True}
DATA = DatasetConfig(prompts=PROMPTS)


class OnlyShortPrompts(KonicLLMRewardComposer):
    """Responses differ in reward where the prompt is short; all others get the same."""

    @llm_reward
    def letters(self, prompt, response):
        return sum(map(ord, response)) / 999 if len(prompt) <= 3 else 0.1


class Never(KonicLLMRewardComposer):
    @llm_reward
    def nothing(self, prompt, response):
        return 0.1


def short(row):
    return len(row["prompt"]) <= 3


def test_equal_groups_are_replaced_by_groups_of_the_next_prompts(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path, composer=OnlyShortPrompts(), dataset=DATA, **GROUPS)
    history = engine.train(4).history
    order = [prompt.text for prompt in load_prompts(DATA).batch(0, 100)]
    position = 0
    for result, rows in zip(history, completions(tmp_path), strict=True):
        asked = [row["prompt"] for row in rows[::4]]
        assert asked == order[position : position + len(asked)]
        position += len(asked)
        kept = 0
        for at in range(2, len(asked) + 1):  # after the first batch, one prompt more for every equal group
            kept = sum(len(text) <= 3 for text in asked[:at])
            if kept == 2:
                break
        assert kept == 2 and at == len(asked), "no prompt more than needed"
        assert [row["left_out"] for row in rows] == [None if short(row) else "equal group" for row in rows]
        assert result.num_samples == len(rows)
        assert result.num_in_equal_groups == sum(not short(row) for row in rows)
        assert result.reward_mean == pytest.approx(sum(row["reward"] for row in rows) / len(rows))
        assert result.no_signal_fraction == 0.0
    assert position > 8
    assert read_record(tmp_path / "checkpoint-4").state.num_prompts == position


def test_the_budget_ends_the_search_and_what_is_left_is_not_learned_from(model_folders, tmp_path):
    engine = make_engine(
        model_folders["llama"], tmp_path, composer=Never(), dataset=DATA, resampling_budget=2, **GROUPS
    )
    before = {name: weight.clone() for name, weight in engine._session.learner.policy.trainable().items()}
    result = engine.train(1).history[0]
    assert (result.num_samples, result.num_in_equal_groups, result.num_steps) == (24, 24, 0)
    assert all(torch.equal(before[name], weight) for name, weight in engine._session.learner.policy.trainable().items())
    without = make_engine(
        model_folders["llama"], tmp_path / "0", composer=Never(), dataset=DATA, resampling_budget=0, **GROUPS
    )
    assert without.train(1).history[0].num_samples == 8


def test_the_same_prompt_asked_again_in_an_iteration_gets_other_responses(model_folders, tmp_path):
    data = DatasetConfig(prompts=["the same prompt", "the other prompt"])
    engine = make_engine(
        model_folders["llama"], tmp_path, composer=Never(), dataset=data, resampling_budget=1, **GROUPS
    )
    engine.train(1)
    (rows,) = completions(tmp_path)
    assert len(rows) == 16
    assert len({(row["row"], tuple(row["token_ids"])) for row in rows}) == 16


def test_callbacks_see_every_round(model_folders, tmp_path):
    class Rounds(BaseKonicFinetuningCallback):
        def __init__(self):
            self.seen = []

        def on_generation_begin(self, prompts):
            self.seen.append(len(prompts))

        def on_reward_computed(self, rewards, reward_breakdown):
            self.seen.append((len(rewards), len(reward_breakdown["nothing"])))

    callback = Rounds()
    engine = make_engine(
        model_folders["llama"], tmp_path, callback, composer=Never(), dataset=DATA, resampling_budget=1, **GROUPS
    )
    engine.train(1)
    assert callback.seen == [8, (8, 8), 8, (8, 8)]


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (DATA, GROUPS),
        (DATA, {"algorithm": "dapo", "batch_size": 8, "overlong_penalty": 0.0}),
        (DatasetConfig(prompts=PROMPTS, prefer_undecided=True), {**GROUPS, "filter_equal_groups": False}),
        (DatasetConfig(prompts=PROMPTS, prefer_undecided=True), GROUPS),
    ],
)
def test_a_resumed_run_is_the_same_run_bit_for_bit(model_folders, data, settings, tmp_path):
    def engine(name):
        return make_engine(
            model_folders["llama"], tmp_path / name, composer=OnlyShortPrompts(), dataset=data, **settings
        )

    engine("whole").train(4)
    engine("parts").train(2)
    engine("parts").train(4, resume_from_checkpoint=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert completions(tmp_path / "parts") == completions(tmp_path / "whole")
    same_tensors(weights(tmp_path / "parts" / "final"), weights(tmp_path / "whole" / "final"))


def test_prompts_whose_groups_differ_are_drawn_more_often(model_folders, tmp_path):
    data = DatasetConfig(prompts=PROMPTS, prefer_undecided=True)
    settings = {**GROUPS, "filter_equal_groups": False, "batch_size": 16, "learning_rate": 1e-4, "ppo_epochs": 1}
    make_engine(model_folders["llama"], tmp_path, composer=OnlyShortPrompts(), dataset=data, **settings).train(12)
    late = [row for rows in completions(tmp_path)[4:] for row in rows[::4]]
    assert sum(map(short, late)) / len(late) > 0.75  # 4 of 8 prompts are short
    spreads = read_record(tmp_path / "checkpoint-12").state.group_spreads
    assert all((spread > 0) == (len(PROMPTS[int(row)]) <= 3) for row, spread in spreads.items())


def test_rows_are_drawn_by_their_weights_and_the_same_again():
    rows = [{"prompt": f"p{n}", "weight": weight} for n, weight in enumerate([0, 1, "3", 4.0])]
    config = DatasetConfig(prompts=rows, weights_column="weight")
    drawn = [prompt.row for prompt in load_prompts(config).batch(0, 4000)]
    counts = Counter(drawn)
    assert counts[0] == 0
    assert [counts[row] / 4000 for row in (1, 2, 3)] == pytest.approx([1 / 8, 3 / 8, 4 / 8], abs=0.03)
    again = load_prompts(config)
    assert [again.batch(at, 1)[0].row for at in (7, 0, 3999)] == [drawn[7], drawn[0], drawn[3999]]
    other = load_prompts(DatasetConfig(prompts=rows, weights_column="weight", shuffle_seed=1))
    assert [prompt.row for prompt in other.batch(0, 4000)] != drawn


def test_weights_may_be_as_large_as_a_float():
    rows = [{"prompt": f"p{n}", "weight": weight} for n, weight in enumerate([1e308, 1e308, 1e308, 1])]
    drawn = load_prompts(DatasetConfig(prompts=rows, weights_column="weight")).batch(0, 300)
    assert {prompt.row for prompt in drawn} == {0, 1, 2}


def test_a_dropped_batch_changes_no_prompts_chance(model_folders, tmp_path):
    class Far(OnlyShortPrompts):
        @llm_reward
        def far(self, prompt: str, response: str) -> float:
            return 1e300

    data = DatasetConfig(prompts=PROMPTS, prefer_undecided=True)
    settings = {**GROUPS, "filter_equal_groups": False, "on_nonfinite": "skip"}
    make_engine(model_folders["llama"], tmp_path, composer=Far(), dataset=data, **settings).train(1)
    assert read_record(tmp_path / "checkpoint-1").state.group_spreads == {}


def test_prompts_chosen_by_what_the_policy_can_need_others_to_compare_it_by(model_folders, tmp_path, caplog):
    settings = {**GROUPS, "filter_equal_groups": False}
    for held_out, every, is_said in ((0, None, True), (2, 1, False)):
        caplog.clear()
        data = DatasetConfig(prompts=PROMPTS, prefer_undecided=True, held_out=held_out)
        folder = tmp_path / str(held_out)
        make_engine(
            model_folders["llama"], folder, composer=OnlyShortPrompts(), dataset=data, eval_every=every, **settings
        ).train(1)
        assert ("so the rewards of two batches cannot be compared" in caplog.text) == is_said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, -1], r"row 1 \(-1\)"),
        ([1, "much"], r"row 1 \('much'\)"),
        ([None, 1], r"row 0 \(None\)"),
        ([True, 1], r"row 0 \(True\)"),
        ([np.True_, 1], r"row 0 \(np\.True_\)"),
        ([10**5000, 1], r"row 0 \(of the type int\)"),
        ([1, float("nan")], r"row 1 \(nan\)"),
        ([0, 0], "only zeros"),
    ],
)
def test_weights_that_are_none_are_refused_by_row(values, said):
    rows = [{"prompt": f"p{n}", "weight": value} for n, value in enumerate(values)]
    with pytest.raises(DatasetError, match=said):
        load_prompts(DatasetConfig(prompts=rows, weights_column="weight"))
    with pytest.raises(DatasetError, match=r"no column 'weigth'.* Did you mean 'weight'"):
        load_prompts(DatasetConfig(prompts=rows, weights_column="weigth"))


@pytest.mark.parametrize(
    "settings",
    [
        {"weights_column": "w", "shuffle": False},
        {"prefer_undecided": True, "shuffle": False},
        {"name": "org/data", "streaming": True, "weights_column": "w"},
        {"name": "org/data", "streaming": True, "prefer_undecided": True},
    ],
)
def test_drawing_by_weight_needs_all_rows_in_any_order(settings):
    with pytest.raises(ConfigError, match=r"weights_column|prefer_undecided"):
        DatasetConfig(**({"prompts": PROMPTS} if "name" not in settings else {}) | settings)


def test_settings_that_compare_groups_need_groups(model_folders, tmp_path):
    with pytest.raises(ConfigError, match=r"prefer_undecided=True.*num_generations"):
        make_engine(model_folders["llama"], tmp_path, dataset=DatasetConfig(prompts=PROMPTS, prefer_undecided=True))
    with pytest.raises(ConfigError, match=r"filter_equal_groups=True.*num_generations"):
        make_engine(model_folders["llama"], tmp_path, filter_equal_groups=True)


@pytest.mark.parametrize("lora", [True, False])
def test_dppo_learns_with_an_adapter_and_refuses_a_head_that_is_trained(model_folders, tmp_path, lora):
    settings = {"algorithm": "dppo", "ppo_epochs": 4, "divergence_limit": 1e-4}
    engine = make_engine(model_folders["llama"], tmp_path, lora=lora, **settings)
    if not lora:
        with pytest.raises(ConfigError, match=r"divergence_limit=0.0001 .*the head is trained too.* or another algo"):
            engine.train(1)
        settings |= {"algorithm": "grpo", "batch_size": 8}
        with pytest.raises(ConfigError, match=r"the head is trained too.* or leave it out\."):
            make_engine(model_folders["llama"], tmp_path, lora=lora, **settings).train(1)
        return
    assert engine.train(2).history[1].clip_fraction > 0.1  # tokens that had moved already


def test_a_sampler_of_other_numbers_is_corrected_and_one_of_old_weights_is_reported(model_folders, tmp_path, caplog):
    def noisy(engine, scale):
        sampler = engine._session.learner.sampler

        def sample(batch, generation, rng_key):
            samples = sampler(batch, generation, rng_key)
            noise = torch.randn(samples.log_probs.shape, generator=torch.Generator().manual_seed(0)) * scale
            numbers = torch.where(samples.response_mask, samples.log_probs + noise, 0.0)
            return type(samples)(**vars(samples) | {"log_probs": numbers, "hidden": None})

        object.__setattr__(engine._session.learner, "sampler", sample)
        return engine

    close = noisy(make_engine(model_folders["llama"], tmp_path / "close"), 0.02).train(1).history[0]
    assert 0.99 < close.effective_sample_size < 1
    assert close.sampler_gap > 1e-3
    assert close.num_steps == 2
    own = make_engine(model_folders["llama"], tmp_path / "own").train(1).history[0]
    assert own.effective_sample_size == 1.0
    far = noisy(make_engine(model_folders["llama"], tmp_path / "far", ppo_epochs=1), 3.0).train(3).history
    assert far[-1].checks == ("sampler_differs",)
    assert "may hold old weights" in caplog.text
    with pytest.raises(TrainingError, match="log-probs of sampler and trainer differ"):
        noisy(make_engine(model_folders["llama"], tmp_path / "off", sampler_correction=None), 0.02).train(1)


def test_a_checkpoint_of_the_version_before_is_resumed_where_it_stood(model_folders, tmp_path):
    """It names neither the prompts used nor the settings that came later."""
    make_engine(model_folders["llama"], tmp_path / "whole", kl_limit=None, kl_placement="reward").train(4)
    run = tmp_path / "parts"
    make_engine(model_folders["llama"], run, kl_limit=None, kl_placement="reward").train(2)
    file = run / "checkpoint-2" / "trainer_state.json"
    record = json.loads(file.read_text())
    for name in ("num_prompts", "group_spreads"):
        del record[name]
    for name in ("filter_equal_groups", "resampling_budget", "divergence", "divergence_limit", "kl_limit"):
        del record["settings"][name]
    for name in ("weights_column", "prefer_undecided"):
        del record["settings"]["dataset_config"][name]
    del record["settings"]["selection"]["kl_price"], record["settings"]["sampler_correction"]
    record["settings"]["kl_placement"] = None
    file.write_text(json.dumps(record))
    (run / "checkpoint-2" / "complete.json").unlink()
    seal(run / "checkpoint-2")
    engine = make_engine(model_folders["llama"], run, kl_limit=None, kl_placement="reward")
    with pytest.raises(OutputError, match="kl_placement was 'reward' and is 'loss'"):
        make_engine(model_folders["llama"], run, kl_limit=None).train(4, resume_from_checkpoint=True)
    engine.train(4, resume_from_checkpoint=True)
    assert metrics(run) == metrics(tmp_path / "whole")
