"""Rewards in worker processes: the serial outcomes bit for bit, and every way that a worker can be lost."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from conftest import children_of
from konic.finetuning.config import TrainingConfig
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.data.samples import make_samples
from konic.finetuning.errors import ConfigError, RewardError
from konic.finetuning.rewards.composer import KonicLLMRewardComposer
from konic.finetuning.rewards.marks import llm_reward
from konic.finetuning.rewards.scoring import Scorer

RESPONSES = ["", "a", "bb", "the same", "0.1", "0.30000000000000004", "😀", "x" * 3000]


class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def share(self, prompt, response, number):
        return len(response) / 3 + number / 7

    @llm_reward
    def parts(self, prompt, response):
        return {"vowels": sum(char in "aeiou" for char in response), "none": None if "a" in response else 1}

    @llm_reward(batch=True)
    def rank(self, prompts, responses):
        return [sorted(responses).index(response) / len(responses) for response in responses]

    @llm_reward
    async def later(self, prompt, response):
        return None if response == "bb" else hash(len(response)) % 5

    @llm_reward
    def where(self, prompt, response):
        return {"faulty": self.trouble(response), "pid": 0.0}

    def trouble(self, response):
        if response == "raise":
            raise ValueError("no", 1)
        if response == "nan":
            return float("nan")
        if response == "hang":
            time.sleep(100)
        if response == "ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(100)
        if response == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if response.startswith("exit"):
            os._exit(int(response[4:]))
        return 0.0


class Model:
    name = "model"
    pid = None

    def score(self, prompts, responses):
        self.pid = os.getpid()
        return [len(response) % 2 for response in responses]


def trl_style(prompts, completions, number, **kwargs):
    return [None if n == 1 else len(text) + n for text, n in zip(completions, number, strict=True)]


def scored(composer, responses, workers, **settings):
    prompts = [Prompt(row, f"p{row}", {"number": row}) for row in range(len(responses))]
    config = TrainingConfig(reward_workers=workers, **settings)
    with Scorer(composer, config) as scorer:
        return [scorer.score(make_samples(prompts, [p.text for p in prompts], list(responses))) for _ in range(2)][1]


def workers_alive():
    return children_of(recursive=True)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    deadline = time.monotonic() + 5
    while workers_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers_alive()


def test_workers_give_the_serial_numbers_bit_for_bit_in_order():
    model = Model()
    composer = Rewards([model], {"share": 0.3, "parts.vowels": 2.0}, reward_functions=[trl_style])
    serial, pool = scored(composer, RESPONSES, 0), scored(composer, RESPONSES, 2)
    assert repr(pool) == repr(serial)
    assert model.pid == os.getpid()


def test_a_reward_that_is_added_during_a_run_reaches_the_workers():
    composer = Rewards()
    with Scorer(composer, TrainingConfig(reward_workers=1)) as scorer:
        samples = make_samples([Prompt(0, "p", {"number": 2})], ["p"], ["abc"])
        scorer.score(samples)
        composer.add_reward_function(trl_style, name="added")
        assert scorer.score(samples).breakdown["added"] == [5]


def test_faults_are_the_serial_ones_too():
    responses = ["a", "raise", "b", "nan", "c"]
    serial, pool = (scored(Rewards(), responses, n, on_reward_error="skip") for n in (0, 2))
    assert repr(pool) == repr(serial)
    assert [fault and fault.what for fault in pool.faults] == [
        None, "raised ValueError: ('no', 1)", None, "returned nan, not a finite number.", None,
    ]  # fmt: skip
    assert "self.trouble(response)" in pool.faults[1].traceback


@pytest.mark.parametrize("response", ["hang", "ignore"])
def test_a_hang_is_stopped_within_a_second_of_its_limit_and_the_rest_is_scored(response):
    prompts = [Prompt(row, "p", {"number": 0}) for row in range(4)]
    with Scorer(
        Rewards(), TrainingConfig(reward_workers=2, reward_timeout_seconds=1, on_reward_error="skip")
    ) as scorer:
        scorer.score(make_samples(prompts, ["p"] * 4, ["a"] * 4))
        started = time.monotonic()
        scores = scorer.score(make_samples(prompts, ["p"] * 4, ["a", response, "b", "c"]))
        assert 1 <= time.monotonic() - started < 2
        assert [fault and fault.what for fault in scores.faults] == [
            None, "took longer than reward_timeout_seconds=1 and was stopped.", None, None,
        ]  # fmt: skip
        assert scorer.score(make_samples(prompts, ["p"] * 4, ["a"] * 4)).faults == [None] * 4
        assert len(workers_alive()) == 2


@pytest.mark.parametrize(("response", "code"), [("die", -9), ("exit7", 7), ("exit0", 0)])
def test_a_worker_that_dies_is_a_fault_of_its_sample_alone(response, code):
    scores = scored(Rewards(), ["a", response, "b"], 2, on_reward_error="skip")
    assert [fault and fault.what for fault in scores.faults] == [
        None, f"ended its worker process (exit code {code}).", None,
    ]  # fmt: skip


def test_a_worker_that_has_done_its_calls_is_replaced_without_a_fault(monkeypatch):
    monkeypatch.setattr("konic.finetuning.rewards.workers.CALLS_PER_WORKER", 3)
    with Scorer(Rewards(), TrainingConfig(reward_workers=1)) as scorer:
        prompts = [Prompt(row, "p", {"number": 0}) for row in range(4)]
        for _ in range(2):
            assert scorer.score(make_samples(prompts, ["p"] * 4, ["a"] * 4)).faults == [None] * 4


def test_workers_killed_while_idle_are_replaced():
    prompts = [Prompt(row, "p", {"number": 0}) for row in range(4)]
    with Scorer(Rewards(), TrainingConfig(reward_workers=2)) as scorer:
        before = scorer.score(make_samples(prompts, ["p"] * 4, ["a"] * 4))
        for worker in workers_alive():
            worker.kill()
        time.sleep(0.5)
        assert repr(scorer.score(make_samples(prompts, ["p"] * 4, ["a"] * 4))) == repr(before)


class Waiting(KonicLLMRewardComposer):
    @llm_reward
    async def judge(self, prompt, response):
        import asyncio

        if response == "block":
            time.sleep(100)
        await asyncio.sleep(100 if response == "hang" else 0.2)
        return len(response)


def test_async_rewards_wait_together_and_each_has_its_own_limit():
    prompts = [Prompt(row, "p") for row in range(16)]
    config = TrainingConfig(reward_workers=2, reward_timeout_seconds=1, on_reward_error="skip")
    with Scorer(Waiting(), config) as scorer:
        scorer.score(make_samples(prompts[:1], ["p"], ["a"]))
        started = time.monotonic()
        assert scorer.score(make_samples(prompts, ["p"] * 16, ["a"] * 16)).rewards == [1.0] * 16
        assert time.monotonic() - started < 1
        scores = scorer.score(make_samples(prompts[:4], ["p"] * 4, ["a", "hang", "b", "block"]))
    stopped = "took longer than reward_timeout_seconds=1 and was stopped."
    assert [fault and fault.what for fault in scores.faults] == [None, stopped, None, stopped]


def test_the_first_fault_stops_scoring_at_once():
    with pytest.raises(RewardError, match=r"(?s)Reward 'where' raised ValueError.*response: 'raise'.*Traceback"):
        scored(Rewards(), ["raise", *["hang"] * 6], 2)


class Locked(KonicLLMRewardComposer):
    def __init__(self):
        import threading

        self.lock = threading.Lock()

    @llm_reward
    def kind(self, prompt, response):
        return 1


class WithOne(KonicLLMRewardComposer):
    @llm_reward
    def one(self, prompt, response):
        return 1


class WillNotLoad(KonicLLMRewardComposer):
    def __setstate__(self, state):
        raise OSError("gone")

    @llm_reward
    def kind(self, prompt, response):
        return 1


def test_what_cannot_be_sent_or_loaded_is_reported_before_anything_is_scored():
    with pytest.raises(RewardError, match=r"Locked cannot be sent to worker processes: TypeError: .*lock"):
        scored(Locked(), ["a"], 1)
    composer, lock = WithOne(), threading.Lock()
    composer.add_reward_function(lambda prompt, response: float(lock.locked()), name="guarded")
    with pytest.raises(RewardError, match=r"WithOne cannot be sent .*lock.* in reward 'guarded'"):
        scored(composer, ["a"], 1)
    with pytest.raises(RewardError, match="cannot be loaded in a worker process: OSError: gone"):
        scored(WillNotLoad(), ["a"], 1)


def test_workers_are_where_this_process_is_and_need_a_folder_that_exists(tmp_path, monkeypatch):
    class Where(KonicLLMRewardComposer):
        @llm_reward
        def where(self, prompt, response):
            return float(os.getcwd() == response)

    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(RewardError, match="reward_workers: the current folder no longer exists: change to one"):
        scored(Where(), [str(tmp_path)], 1)
    os.chdir(tmp_path)
    assert scored(Where(), [str(tmp_path)], 1).rewards == [1.0]


def test_a_limit_needs_a_process_that_can_be_stopped():
    with pytest.raises(ConfigError, match="reward_timeout_seconds=2 needs reward_workers"):
        TrainingConfig(reward_timeout_seconds=2)


UNGUARDED = """
    import sys
    print("top level", flush=True)
    import torch
    from konic.finetuning import KonicLLMRewardComposer, TrainingConfig, llm_reward
    from konic.finetuning.data.prompts import Prompt
    from konic.finetuning.data.samples import make_samples
    from konic.finetuning.rewards.scoring import Scorer
    FACTOR = 3

    def helper(text):
        return FACTOR * len(text)

    class Script(KonicLLMRewardComposer):
        @llm_reward
        def size(self, prompt, response):
            assert "torch" not in sys.modules, "a worker has loaded torch"
            return helper(response)

    {start}
    with Scorer(Script(), TrainingConfig(reward_workers=2)) as scorer:
        print(scorer.score(make_samples([Prompt(0, "p")] * 2, ["p"] * 2, ["a", "bb"])).rewards, flush=True)
        {end}
"""


@pytest.mark.parametrize("how", ["script", "standard input", "module"])
def test_a_script_that_trains_at_top_level_is_not_run_again_by_workers(how, tmp_path):
    code = textwrap.dedent(UNGUARDED.format(start="", end="pass"))
    (tmp_path / "unguarded.py").write_text(code)
    command = {"script": ["unguarded.py"], "standard input": ["-"], "module": ["-m", "unguarded"]}[how]
    done = subprocess.run(
        [sys.executable, *command], input=code, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["top level", "[3.0, 6.0]"]


def test_workers_end_when_the_run_is_killed(tmp_path):
    code = textwrap.dedent(UNGUARDED.format(start="import time", end="time.sleep(100)"))
    run = subprocess.Popen(
        [sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    run.stdin.write(code)
    run.stdin.close()
    assert [run.stdout.readline() for _ in range(2)][1] == "[3.0, 6.0]\n"
    workers = children_of(psutil.Process(run.pid))
    assert len(workers) == 2
    run.kill()
    run.wait()
    gone, alive = psutil.wait_procs(workers, timeout=5)
    assert len(gone) == 2
    assert not alive
    run.stdout.close()


def test_memory_and_files_stay_where_they_are_over_many_batches():
    prompts = [Prompt(row, "p", {"number": 0}) for row in range(8)]
    process = psutil.Process()
    with Scorer(Rewards(), TrainingConfig(reward_workers=1)) as scorer:
        sizes = []
        for _ in range(4):
            for _ in range(15):
                scorer.score(make_samples(prompts, ["p"] * 8, ["a"] * 8))
            sizes.append((process.memory_info().rss, process.num_fds(), workers_alive()[0].memory_info().rss))
    assert sizes[-1][1] == sizes[0][1]
    assert sizes[-1][0] < 1.05 * sizes[0][0]
    assert sizes[-1][2] < 1.05 * sizes[0][2]


class SlowToLoad(KonicLLMRewardComposer):
    def __setstate__(self, state):
        time.sleep(1.5)
        self.__dict__.update(state)

    @llm_reward
    def kind(self, prompt, response):
        if response == "hang":
            time.sleep(100)
        return 1


def test_loading_the_rewards_counts_against_no_sample():
    config = TrainingConfig(reward_workers=2, reward_timeout_seconds=0.5, on_reward_error="skip")
    with Scorer(SlowToLoad(), config) as scorer:
        prompts = [Prompt(row, "p") for row in range(12)]
        scores = scorer.score(make_samples(prompts, ["p"] * 12, ["a", "hang", *["a"] * 10]))
    assert [bool(fault) for fault in scores.faults] == [False, True, *[False] * 10]


class Starting(KonicLLMRewardComposer):
    @llm_reward
    def kind(self, prompt, response):
        subprocess.run(["sleep", "31.4159"], check=False)


def test_what_a_hanging_reward_has_started_ends_with_it():
    config = TrainingConfig(reward_workers=1, reward_timeout_seconds=0.5, on_reward_error="skip")
    with Scorer(Starting(), config) as scorer:
        assert scorer.score(make_samples([Prompt(0, "p")], ["p"], ["a"])).num_faults == 1
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "31.4159"]]


class WrongLength(KonicLLMRewardComposer):
    @llm_reward(batch=True)
    def kind(self, prompts, responses):
        return [1.0]


def test_a_batch_of_the_wrong_length_is_a_fault_of_every_sample_here_and_in_workers():
    serial, pool = (scored(WrongLength(), ["a", "b"], workers, on_reward_error="skip") for workers in (0, 1))
    assert repr(pool) == repr(serial)
    assert [fault.what for fault in pool.faults] == ["returned 1 values for 2 responses."] * 2


def test_a_worker_imports_nothing_from_the_current_folder(tmp_path):
    """As the `konic` command starts it, which stands in a folder of its own."""
    (tmp_path / "command").mkdir()
    (tmp_path / "command" / "run.py").write_text(
        "from konic.finetuning.rewards.workers import RewardPool\n"
        "from test_workers import Rewards\n"
        "pool = RewardPool(Rewards(), 1, None)\n"
        "pool.start()\n"
        "print(pool._loaded.result())\n"
        "pool.close()\n"
    )
    (tmp_path / "here").mkdir()
    for name in ("multiprocessing", "pickle", "socket", "runpy"):
        (tmp_path / "here" / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    places = [*filter(None, sys.path), os.path.dirname(__file__)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    child = subprocess.run(
        [sys.executable, tmp_path / "command" / "run.py"], cwd=tmp_path / "here", timeout=100, capture_output=True,
        text=True, env=environment | {"PYTHONPATH": os.pathsep.join(places)},
    )  # fmt: skip
    assert not (tmp_path / "ran").exists()
    assert child.stdout == "None\n", child.stderr
