"""`completions/`: what a replay needs of every token, and the time of every reward."""

import time

import pyarrow.parquet
import pytest

from konic.finetuning import DatasetConfig, KonicLLMRewardComposer, llm_reward
from test_engine import completions, make_engine

TOKENS = ("advantages", "values", "token_kl", "log_probs", "entropy")


class Timed(KonicLLMRewardComposer):
    """Prompts of more than three letters have groups of equal rewards."""

    @llm_reward
    def slow(self, prompt, response):
        time.sleep(0.01)
        return len(set(response)) / 9 if len(prompt) <= 3 else 0.0

    @llm_reward(batch=True)
    def together(self, prompts, responses):
        time.sleep(0.04)
        return [0.0] * len(responses)


@pytest.fixture
def run(model_folders, tmp_path):
    def run_of(**settings):
        settings = {"batch_size": 8, **settings}
        data = DatasetConfig(prompts=["long one", "a", "another", "bb"], shuffle=False)
        make_engine(model_folders["llama"], tmp_path, composer=Timed(), dataset=data, **settings).train(2)
        return completions(tmp_path)

    return run_of


def test_every_token_has_its_numbers(run):
    for rows in run():
        for row in rows:
            assert {len(row[name]) for name in TOKENS} == {len(row["token_ids"])}
            assert sum(row["token_kl"]) == pytest.approx(row["kl"], abs=1e-5)
            assert all(value < 0 for value in row["log_probs"]) and all(value > 0 for value in row["entropy"])
        signal = [value for row in rows for value in row["advantages"]]
        assert sum(signal) / len(signal) == pytest.approx(0, abs=1e-5), "those of PPO are whitened"
        assert sum(value**2 for value in signal) / len(signal) == pytest.approx(1, abs=0.1)


def test_what_is_left_out_has_no_advantage_and_groups_share_theirs(run):
    settings = {"algorithm": "grpo", "num_generations": 4, "filter_equal_groups": True, "resampling_budget": 2}
    for rows in run(**settings):
        assert len(rows) > 8, "groups were replaced"
        assert [row["advantages"] is None for row in rows] == [row["left_out"] is not None for row in rows]
        assert "values" not in rows[0], "the algorithm learns none"
        learned = [row for row in rows if row["advantages"] is not None]
        assert learned and all(len(set(row["advantages"])) == 1 for row in learned)
        groups = [[row["advantages"][0] for row in learned[at : at + 4]] for at in range(0, len(learned), 4)]
        assert all(sum(group) == pytest.approx(0, abs=1e-5) for group in groups)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_reward_has_its_time(run, tmp_path, workers):
    run(reward_workers=workers, batch_size=4)
    rows = pyarrow.parquet.read_table(tmp_path / "completions" / "000001.parquet").to_pylist()
    assert all(row["seconds/slow"] >= 0.01 for row in rows)
    assert rows[0]["seconds/together"] >= 0.01
    assert len({row["seconds/together"] for row in rows}) == 1, "each has its share of the call"
