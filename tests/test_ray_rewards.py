"""Rewards beside an actor of Ray give what workers on this machine give; reward models in actors of their own."""

import gc
import math
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")

import ray
from ray.train import ScalingConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from konic.finetuning import (
    ConfigError,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    RemoteRewardModel,
    RewardError,
    TrainingConfig,
    llm_reward,
)
from konic.finetuning.data.samples import samples_from_texts
from konic.finetuning.rewards import remote
from konic.finetuning.rewards.scoring import Scorer
from konic.finetuning.system.group import ProcessLostError
from ray_job import Rewards, make_agent
from test_processes import same
from test_ray import cluster, model, train  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of many kinds
RESPONSES = ["aa", "hangs", "b", "raises", "dies", "eio", "nan", ""]
DISTURBED = ("hangs", "dies")
"""Responses that end their worker, so that nobody knows the time of the call."""
RESOURCES = {"CPU": 0.5}


class Troubled(KonicLLMRewardComposer):
    """Rewards of every shape, which go wrong on some responses."""

    @llm_reward
    def vowels(self, prompt: str, response: str) -> float | None:
        if response == "hangs":
            time.sleep(60)
        if response == "raises":
            raise ValueError("no such word")
        if response == "dies":
            os._exit(7)
        return None if response == "b" else sum(letter in "aeiou" for letter in response)

    @llm_reward
    def lengths(self, prompts: list[str], responses: list[str]) -> list[dict[str, float]]:
        return [{"all": len(each), "first": each[:1] == "a"} for each in responses]

    @llm_reward
    async def waited(self, prompt: str, response: str) -> float:
        return math.nan if response == "nan" else len(response) / 2


def scored(composer, responses, **settings):
    config = TrainingConfig(on_reward_error="skip", reward_workers=2, reward_timeout_seconds=2, **settings)
    samples = samples_from_texts(["p"] * len(responses), responses, {})
    with Scorer(composer, config) as scorer:
        return [scorer.score(samples) for _ in range(2)], scorer


def test_order_timeouts_errors_and_numbers_are_those_of_workers_on_this_machine(cluster):  # noqa: F811
    (here, _), _ = scored(Troubled(), RESPONSES)
    there, scorer = scored(Troubled(), RESPONSES, reward_resources=RESOURCES)
    assert isinstance(scorer._pool, remote.RemoteRewardPool)
    for each in there:
        same(each.breakdown, here.breakdown)
        same(each.rewards, here.rewards)
        assert each.errors == here.errors
        assert {name: len(seconds) for name, seconds in each.seconds.items()} == dict.fromkeys(here.seconds, 8)
        assert [math.isnan(seconds) for seconds in each.seconds["vowels"]] == [each in DISTURBED for each in RESPONSES]
    assert sum(error is not None for error in here.errors) == 4
    assert "took longer than reward_timeout_seconds=2" in here.errors[1]
    assert "no such word" in here.errors[3]
    assert "ended its worker process (exit code 7)" in here.errors[4]


def test_a_reward_that_raises_ends_the_run_with_the_same_error(cluster):  # noqa: F811
    samples = samples_from_texts(["p"], ["raises"], {})
    found = []
    for more in ({}, {"reward_resources": RESOURCES}):
        with Scorer(Troubled(), TrainingConfig(reward_workers=1, **more)) as scorer:
            with pytest.raises(RewardError) as caught:
                scorer.score(samples)
            found.append(caught.value.args)
    assert found[0] == found[1]


def test_an_actor_that_is_gone_is_a_lost_process_and_its_processes_end(cluster):  # noqa: F811
    samples = samples_from_texts(["p"], ["aa"], {})
    with Scorer(Troubled(), TrainingConfig(reward_workers=1, reward_resources=RESOURCES)) as scorer:
        scorer.score(samples)
        ray.kill(scorer._pool._actor)
        with pytest.raises(ProcessLostError, match="The actor of the reward workers was lost"):
            scorer.score(samples)


def test_where_there_is_no_room_the_error_says_what_is_free(cluster, monkeypatch):  # noqa: F811
    monkeypatch.setattr(remote, "ROOM_SECONDS", 0.5)
    message = r"for 0.5 s the cluster has had no room for {'CPU': 99(.0)?}; free are {.*'CPU': 2.0"
    config = TrainingConfig(reward_workers=1, reward_resources={"CPU": 99})
    with Scorer(Troubled(), config) as scorer, pytest.raises(RewardError, match=f"reward_resources: {message}"):
        scorer.score(samples_from_texts(["p"], ["aa"], {}))
    model = RemoteRewardModel("quality", Quality, {"CPU": 99})  # noqa: F811
    with pytest.raises(RewardError, match=f"RemoteRewardModel 'quality': {message}"):
        model.score(["p"], ["aa"])


class Quality:
    """A reward model that tells where it is, and how many batches it has had."""

    name, batches = "quality", 0

    def score(self, prompts, responses):
        if "raises" in responses:
            raise ValueError("no such word")
        if "dies" in responses and self.batches:
            os._exit(9)
        self.batches += 1
        return [float(os.getpid()), float(self.batches)][: len(responses)]


def test_a_reward_model_is_made_once_in_an_actor_that_all_share(cluster):  # noqa: F811
    model = RemoteRewardModel("quality", Quality, {"CPU": 0.5})  # noqa: F811
    process, batches = model.score(["p", "q"], ["a", "b"])
    assert process != os.getpid()
    other = ray.cloudpickle.loads(ray.cloudpickle.dumps(model))  # as a worker gets it
    assert [*other.score(["p", "q"], ["a", "b"])] == [process, batches + 1]
    with pytest.raises(ValueError, match="no such word"):
        model.score(["p"], ["raises"])
    started_again, batches = model.score(["p", "q"], ["dies", "b"])  # the actor dies, and a new one scores the batch
    assert started_again != process
    assert batches == 1


class Locked(Exception):
    """An error that cannot be sent to another process."""

    def __init__(self, *numbers):
        super().__init__(*numbers)
        self.lock = threading.Lock()


class Hopeless:
    """A reward model that fails each time."""

    name = "hopeless"

    def score(self, prompts, responses):
        if responses == ["dies"]:
            os._exit(9)
        if responses == ["hangs"]:
            time.sleep(60)
        raise Locked(1, 2)


def test_a_reward_model_that_fails_each_time_is_one_error_of_one_line_and_never_hangs(cluster):  # noqa: F811
    model = RemoteRewardModel("quality", Hopeless, timeout_seconds=1)  # noqa: F811
    composer = KonicLLMRewardComposer(reward_models=[model])
    with Scorer(composer, TrainingConfig()) as scorer:
        for response, message in {
            "raises": r"Reward model 'quality' raised Locked: \(1, 2\)\Z",
            "dies": r"quality' raised RewardError: RemoteRewardModel 'quality': its actor was lost 3 times: .*[^.]\Z",
            "hangs": r"RewardError: RemoteRewardModel 'quality' did not answer for 1 s, for 1 responses\. If it needs",
        }.items():
            with pytest.raises(RewardError) as caught:
                scorer.score(samples_from_texts(["p"], [response], {}))
            first, *more = caught.value.args
            assert re.search(message, first.removesuffix(".")), caught.value.args
            assert not [line for line in more if "ray" in line or "remote.py" in line or "Redacted" in line], more


def test_without_ray_a_reward_model_is_made_here(monkeypatch):
    monkeypatch.setattr(remote, "is_connected", lambda: False)
    model = RemoteRewardModel("quality", Quality, {"GPU": 1})  # noqa: F811
    assert model.score(["p", "q"], ["a", "b"]) == [os.getpid(), 1]
    assert model.score(["p", "q"], ["a", "b"]) == [os.getpid(), 2]


class Asking:
    """A reward model that asks for the chat and for a column."""

    def score(self, prompts, responses, label, messages=None):
        return [len(chat) + number for chat, number in zip(messages, label, strict=True)]


def test_a_reward_model_gets_the_columns_that_it_asks_for(monkeypatch):
    monkeypatch.setattr(remote, "is_connected", lambda: False)
    composer = KonicLLMRewardComposer([RemoteRewardModel("asking", Asking)])
    chats = [[{"role": "user", "content": "p"}]]
    assert composer.compose_batch(["p"], ["r"], label=[3], messages=chats, other=[0])[0] == [4.0]
    with pytest.raises(RewardError, match="Reward model 'asking' asks for the column 'label'"):
        composer.compose_batch(["p"], ["r"], messages=chats)


@pytest.mark.parametrize(
    ("make", "resources", "message"),
    [
        (Quality(), {}, "make must be a function"),
        (Quality, {"GPU": -1}, r"resources\['GPU'\] must be 0 or more, got -1"),
        (Quality, {"timeout_seconds": 0}, "timeout_seconds must be above 0, or None, got 0"),
        (Quality, {"timeout_seconds": math.inf}, "timeout_seconds must be above 0, or None, got inf"),
        (Quality, {"timeout_seconds": True}, "timeout_seconds must be above 0, or None, got True"),
    ],
)
def test_a_reward_model_that_cannot_be_is_refused(make, resources, message):
    options = resources if "timeout_seconds" in resources else {"resources": resources}
    with pytest.raises(ConfigError, match=message):
        RemoteRewardModel("quality", make, **options)


def test_reward_resources_without_ray_are_refused(model):  # noqa: F811
    settings = {"reward_workers": 1, "reward_resources": RESOURCES}
    with pytest.raises(ConfigError, match="reward_resources places reward workers in a Ray cluster"):
        KonicFinetuningEngine.from_agent(make_agent(model, Rewards(), **settings))
    with pytest.raises(ConfigError, match="needs reward_workers"):
        TrainingConfig(reward_resources=RESOURCES)


class Length:
    """A reward model."""

    name = "length"

    def score(self, prompts, responses):
        return [len(each) / 10 for each in responses]


def test_a_training_on_ray_scores_in_actors_and_is_that_of_one_process(cluster, model, tmp_path, request):  # noqa: F811
    one = train(model, tmp_path / "one", Rewards().add_reward_model(Length()))[1]
    rewards = Rewards().add_reward_model(RemoteRewardModel("length", Length))
    left = [RemoteRewardModel("left", Length, {"CPU": 0.5})]  # both workers have room only without it
    left[0].score(["p"], ["r"])
    left.append(left)
    del left
    gc.disable()  # as where no garbage collection happens to come
    request.addfinalizer(gc.enable)
    settings = {"reward_workers": 1, "reward_resources": {}}
    two = train(model, tmp_path / "two", rewards, ScalingConfig(num_workers=2), **settings)[1]
    same([each.to_dict() for each in one.history], [each.to_dict() for each in two.history])
