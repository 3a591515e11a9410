"""The same training on Ray Train: one cluster on loopback for the module. Longer ones: `make cluster`."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

pytest.importorskip("ray")

import ray
from ray.train import ScalingConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from command import konic_here, script
from conftest import byte_tokenizer, tiny_model
from konic.finetuning import (
    ConfigError,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    OutputError,
    RewardError,
    TrainingError,
)
from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.cluster import connection, driver, embedded, nodes, ray_inside
from konic.finetuning.cluster.desk import Desk
from konic.finetuning.cluster.mailbox import _Stream, describe_losses
from konic.finetuning.cluster.worker import Outcome, _require_shared
from konic.finetuning.rewards.composer import own_weights
from konic.finetuning.run.reward_weights import RewardWeights
from konic.finetuning.system.pickling import own_paths
from ray_job import Rewards, make_agent
from test_processes import same

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of many kinds


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("gpt2").save_pretrained(folder)
    byte_tokenizer("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A Ray of its own for this module; trainings join it."""
    before = dict(os.environ)
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    with embedded.embedded(ray, num_workers=2):
        yield ray
    os.environ.clear()
    os.environ.update(before)


class Watching(KonicFinetuningCallback):
    """Remembers the events, in the process that started the training, and changes the weight of a reward in each."""

    def __init__(self, composer):
        super().__init__()
        self.composer, self.events, self.process = composer, [], os.getpid()

    def on_iteration_end(self, result):
        assert os.getpid() == self.process
        self.events.append(result.iteration)
        self.composer.set_reward_weight("vowels", 1 + result.iteration)
        super().on_iteration_end(result)


def train(model, run, rewards, scaling=None, callback=None, **training):
    engine = KonicFinetuningEngine.from_agent(
        make_agent(model, rewards, **training),
        checkpoint_dir=run,
        scaling=scaling,
        device="cpu",
        callback=callback or KonicFinetuningCallback(verbose=False),
    )
    return engine, engine.train(4, save_every=1)


def test_a_killed_worker_is_replaced_and_the_run_is_that_of_one_process(cluster, model, tmp_path, capsys, caplog):
    rewards = Rewards()
    one_engine, one = train(model, tmp_path / "one", rewards, callback=Watching(rewards))
    capsys.readouterr()
    rewards = Rewards("killed", tmp_path / "marker")
    seen, workers = Watching(rewards), ScalingConfig(num_workers=2)
    engine, two = train(model, tmp_path / "two", rewards, workers, seen)
    assert (tmp_path / "marker").exists()
    same([each.to_dict() for each in one.history], [each.to_dict() for each in two.history])
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (tmp_path / "one", tmp_path / "two")]
    assert names[0] == names[1]
    assert two.model_path == str(tmp_path / "two" / "final")

    assert seen.events == [1, 2, 3, 4]  # though the third was begun twice
    lines = capsys.readouterr().out.splitlines()
    assert [line[:11] for line in lines if line.startswith("[Iter")] == [f"[Iter    {n}]" for n in (1, 2, 3, 4)]
    assert sum("Starting RLHF Training" in line for line in lines) == 1
    assert any("A worker was lost" in record.message and "1 of 3" in record.message for record in caplog.records)

    prompts = ["ab", "why not"]
    assert engine.generate(prompts) == one_engine.generate(prompts)
    assert engine.evaluate(prompts)["rewards"] == pytest.approx(one_engine.evaluate(prompts)["rewards"], abs=1e-9)

    histories = []  # new engines, whose composers have the weights of the beginning
    for name, scaling in (("one", None), ("two", workers)):
        rewards = Rewards("killed", tmp_path / "marker")
        engine = KonicFinetuningEngine.from_agent(
            make_agent(model, rewards), checkpoint_dir=tmp_path / name, callback=Watching(rewards), scaling=scaling,
            device="cpu",
        )  # fmt: skip
        histories.append([each.to_dict() for each in engine.train(5, resume_from_checkpoint=True).history])
        assert own_weights(rewards) == {"vowels": 6.0}
    same(*histories)


def test_an_error_of_one_worker_is_raised_here_with_its_name_and_is_not_tried_again(cluster, model, tmp_path, caplog):
    with pytest.raises(RewardError) as caught:
        train(model, tmp_path / "run", Rewards("error"), ScalingConfig(num_workers=2))
    what = "Reward 'vowels' raised ValueError: no such word"
    assert str(caught.value).startswith(f"In process 1 of 2 on {socket.gethostname()}: {what}")
    assert "A worker was lost" not in caplog.text, "nothing was started again"


def test_workers_train_into_a_url_and_the_engine_goes_on_with_their_weights(cluster, model, tmp_path, monkeypatch):
    monkeypatch.setenv("KONIC_CACHE", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/bucket/run"
    rewards = Rewards("killed", tmp_path / "marker")
    engine, result = train(model, url, rewards, ScalingConfig(num_workers=2))
    one_engine, one = train(model, tmp_path / "one", Rewards())
    same([each.to_dict() for each in one.history], [each.to_dict() for each in result.history])
    assert result.model_path == f"{url}/final"
    assert (tmp_path / "bucket" / "run" / "final" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "marker").exists()
    assert engine.generate(["ab", "why not"]) == one_engine.generate(["ab", "why not"])


class Listening(KonicFinetuningCallback):
    """Remembers the addresses on which Ray and its workers listen while they train."""

    def on_iteration_end(self, result):
        self.addresses = []
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
                self.addresses += [(process.name(), each.laddr.ip.removeprefix("::ffff:")) for each in found]


def test_ray_and_its_workers_listen_on_loopback_alone_and_its_files_are_the_users(cluster, model, tmp_path):
    seen = Listening(verbose=False)
    train(model, tmp_path / "run", Rewards(), ScalingConfig(num_workers=2), seen)
    assert any("RayTrainWorker" in name for name, _ in seen.addresses)
    assert {address for _, address in seen.addresses} == {"127.0.0.1"}
    folder = Path(ray._private.worker._global_node.get_session_dir_path()).parents[1]
    assert folder.stat().st_mode & 0o077 == 0
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize(
    ("scaling", "options", "message"),
    [
        ({"num_workers": 0}, {}, "num_workers=0, and there must be at least 1"),
        ({"num_workers": 13}, {}, "batch_size=12 is fewer responses than num_workers=13"),
        ({"num_workers": 2}, {"device": "cuda"}, "ScalingConfig\\(use_gpu=True\\)"),
        ({"num_workers": 2, "use_gpu": True}, {"device": "cpu"}, "would not use"),
        ({"num_workers": 2, "resources_per_worker": {"CPU": 0}}, {}, "and one of them more, such as"),
        ({"num_workers": 2, "resources_per_worker": {"CPU": -1}}, {}, "a number of at least 0"),
        ({"num_workers": 2, "resources_per_worker": {"CPU": None}}, {}, "a number of at least 0"),
        ({"num_workers": 2, "resources_per_worker": {"CPU": math.nan}}, {}, "a number of at least 0"),
        ({"num_workers": True}, {}, "num_workers=True, and there must be at least 1"),
        ({"num_workers": 2, "label_selector": {"a": 1}}, {}, r"label_selector=.'a': 1. must be a dict of text by text"),
        ({"num_workers": 2, "label_selector": "x"}, {}, "label_selector='x' must be a dict of text by text"),
        ({"num_workers": 2, "label_selector": [{"a": "b"}, None]}, {}, "or a list of one for each worker"),
        ({"num_workers": 2, "placement_strategy": "NEAR"}, {}, "'NEAR' must be one of PACK, SPREAD, STRICT_PACK"),
    ],
)
def test_what_cannot_be_is_refused_before_ray_starts(model, scaling, options, message):
    with pytest.raises(ConfigError, match=message):
        KonicFinetuningEngine.from_agent(make_agent(model, Rewards()), scaling=ScalingConfig(**scaling), **options)


def test_scaling_that_is_set_after_the_engine_was_made_is_refused_and_not_ignored(model):
    engine = KonicFinetuningEngine.from_agent(make_agent(model, Rewards()))
    engine.scaling = ScalingConfig(num_workers=2)
    with pytest.raises(ConfigError, match="scaling is chosen when an engine is made: from_agent"):
        engine.train(1)


def test_a_run_in_the_memory_of_one_process_is_refused_before_ray_starts(model):
    agent = make_agent(model, Rewards())
    engine = KonicFinetuningEngine.from_agent(
        agent, checkpoint_dir="memory://run", scaling=ScalingConfig(num_workers=1)
    )
    with pytest.raises(OutputError, match="memory://run: this is the memory of one process"):
        engine.train(1)


def test_workers_for_which_there_is_no_room_are_refused(cluster, model, tmp_path):
    for resources in ({"GPU": 1}, {"CPU": 1000}):
        scaling = ScalingConfig(num_workers=2, resources_per_worker=resources, use_gpu="GPU" in resources)
        engine = KonicFinetuningEngine.from_agent(make_agent(model, Rewards()), scaling=scaling)
        with pytest.raises(ConfigError, match="has room for 0"):
            engine.train(1)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "give host:port.*ray job submit"),
        ("head", "give host:port"),
        ("127.0.0.1:9", "nothing answers there"),
        ("[::1]:9", "nothing answers there"),
        ("..:1", "nothing answers there"),
        (f"{'a' * 70}:1", "nothing answers there"),
        ("127.0.0.1:²", "give host:port"),
        ("127.0.0.1:99999", "give host:port"),
    ],
)
def test_an_address_where_no_ray_is_is_one_error(address, message):
    with pytest.raises(ConfigError, match=message):
        connection._connect(ray, address)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what answers there is no Ray"),
        (b"+OK", "what answers there is no Ray"),
        (b"", "what answers there is no Ray"),
        (None, r"nothing answers there \(TimeoutError"),
    ],
)
def test_something_else_at_the_address_is_one_error_at_once(monkeypatch, answer, message):
    if answer is None:
        monkeypatch.setattr(connection, "_CONNECT_SECONDS", 0.5)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve():
            with contextlib.suppress(OSError), server.accept()[0] as client:
                client.recv(100)
                if answer is None:
                    time.sleep(1)
                else:
                    client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConfigError, match=message):
            connection._connect(ray, f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_the_head_of_a_ray_is_known_by_how_it_answers(cluster, monkeypatch):
    host, port = ray.get_runtime_context().gcs_address.split(":")
    assert connection._speaks_http2(host, int(port))
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert connection._speaks_http2("127.0.0.1", silent.getsockname()[1])


def test_a_ray_without_what_is_used_inside_it_is_named():
    with pytest.raises(ConfigError, match=f"^Ray {ray.__version__} is not one that this konic knows .*no attribute"):
        ray_inside.worker_resources(SimpleNamespace())


def test_workers_have_the_priority_of_the_process_that_starts_them(cluster):
    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


def test_a_second_training_asks_no_callback_again_about_the_first():
    class Asked(KonicFinetuningCallback):
        seen = ()

        def should_stop_early(self, result):
            self.seen += (result.iteration,)
            return False

    callback = Asked(verbose=False)
    desk = Desk(Callbacks(callback), RewardWeights(Rewards()), iterations_before=2)
    assert not any(desk.should_stop_early(SimpleNamespace(iteration=number)) for number in (1, 2, 3, 3))
    assert callback.seen == (3,)


def test_a_training_after_an_error_goes_on_from_the_newest_checkpoint(model, tmp_path, monkeypatch):
    given = []

    def fails(ray, scaling, job, desk):
        given.append(dict(job.options))
        desk.on_checkpoint_saved(f"{tmp_path}/run/checkpoint-3", 3)
        desk.failure = ConfigError("the callback has failed")
        return Outcome()

    monkeypatch.setattr(driver, "_run", fails)
    monkeypatch.setattr(driver, "connected", lambda scaling: contextlib.nullcontext((None, None)))
    agent = make_agent(model, Rewards())
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path / "run", scaling=ScalingConfig())
    for _ in range(2):
        with pytest.raises(ConfigError, match="the callback has failed"):
            engine.train(4)
    assert [(each["max_iterations"], each["resume_from_checkpoint"]) for each in given] == [
        (4, None), (7, f"{tmp_path}/run/checkpoint-3")
    ]  # fmt: skip


def test_an_earlier_ray_train_is_refused_by_name(monkeypatch):
    class Earlier:
        num_workers = 2

    monkeypatch.setattr(ray.train, "ScalingConfig", Earlier)
    with pytest.raises(ConfigError, match="RAY_TRAIN_V2_ENABLED=0 selects an earlier Ray Train"):
        connection.check_scaling(Earlier(), "cpu", 12)


def test_folders_of_modules_go_to_the_workers_and_those_of_packages_do_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert str(tmp_path) in own_paths()
    assert not any("site-packages" in path or path.startswith(os.path.dirname(os.__file__)) for path in own_paths())


def test_rewards_sent_by_value_keep_their_order_and_their_source(tmp_path):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import functools, json, sys
        from konic.finetuning import KonicLLMRewardComposer, llm_reward
        from konic.finetuning.rewards.composer import keep_origin, origin_of
        from konic.finetuning.system.pickling import pickled_by_value

        @functools.cache
        def doubled(number):
            return 2 * number

        class Base(KonicLLMRewardComposer):
            @llm_reward
            def zeal(self, prompt: str, response: str) -> float:
                return 1.0

        class Mine(Base):
            @llm_reward
            def vowels(self, prompt: str, response: str) -> float:
                return doubled(1.0)

            @functools.lru_cache(maxsize=7)
            def kept(self, word):
                return word

            @llm_reward
            def low(self, prompt: str, response: str) -> float:
                return 3.0

        if __name__ == "__main__":
            import mine
            composer = mine.Mine()
            keep_origin(composer)
            open("sent", "wb").write(pickled_by_value(composer, [mine]))
            print(json.dumps([composer.settings(), origin_of(composer).file]))
        """)
    )
    load = (
        "import json, cloudpickle; from konic.finetuning.rewards.composer import origin_of; "
        "c = cloudpickle.load(open('sent', 'rb')); print(json.dumps([c.settings(), origin_of(c).file])); "
        "assert c.vowels('', '') == 2 and c.kept('a') == 'a' and c.kept.cache_info().maxsize == 7"
    )
    here = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / "mine.py").rename(tmp_path / "other.py")  # as on a node that has no such file
    there = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(here.stdout) == json.loads(there.stdout)
    settings, file = json.loads(there.stdout)
    assert settings["rewards"] == ["zeal", "vowels", "low"]
    assert file["class"] == "Mine" and file["file"].endswith("mine.py")


def test_repeated_iterations_get_the_weights_that_they_had():
    composer = Rewards()

    class Raising(KonicFinetuningCallback):
        def on_iteration_end(self, result):
            composer.set_reward_weight("vowels", 1 + own_weights(composer)["vowels"])

    desk = Desk(Callbacks(Raising(verbose=False)), RewardWeights(composer))
    desk.answer("on_train_begin", {}, {"vowels": 1.0})

    def iteration(number):
        result = SimpleNamespace(iteration=number)
        return [desk.answer("on_iteration_begin", number)[1], desk.answer("on_iteration_end", result)[1]]

    first = [iteration(number) for number in (1, 2, 3)]
    assert [end["vowels"] for _, end in first] == [2, 3, 4]
    assert iteration(1) == first[0]
    desk.answer("on_train_begin", {}, {"vowels": 2.0})  # of the checkpoint of iteration 1
    assert [iteration(number) for number in (2, 3)] == first[1:]
    assert iteration(4) == [{"vowels": 4}, {"vowels": 5}]


def test_an_agent_that_cannot_be_sent_is_one_error_that_names_what_it_holds(model):
    rewards = Rewards()
    rewards.guard = threading.Lock()
    engine = KonicFinetuningEngine.from_agent(make_agent(model, rewards))
    with pytest.raises(ConfigError, match=r"cannot be sent to the workers: TypeError: .*lock.* in .*guard.*Open a"):
        driver._pickled(engine)


def test_workers_lost_too_often_are_named_without_what_ray_has_printed():
    desk = Desk(Callbacks([]), RewardWeights(Rewards()))
    desk.on_attempt(2)
    for _ in range(4):
        desk.note("lost", "worker 1: its process ended")
    error = driver._lost_too_often(RuntimeError("Traceback (most recent call last): ..."), desk)
    assert str(error).startswith("Workers were lost 4 times, and are not started again: worker 1: its process ended.")


@pytest.mark.parametrize(
    ("by_node", "placement", "room"),
    [
        ([2, 0, 3], "PACK", 5),
        ([2, 0, 3], "SPREAD", 5),
        ([2, 0, 3], "STRICT_SPREAD", 2),
        ([2, 0, 3], "STRICT_PACK", 3),
        ([], "STRICT_PACK", 0),
    ],
)
def test_room_is_what_the_placement_leaves(by_node, placement, room):
    assert nodes._room(by_node, placement) == room


def test_workers_that_may_not_share_a_node_are_refused_where_there_is_one(cluster):
    apart = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.1}, placement_strategy="STRICT_SPREAD")
    with pytest.raises(ConfigError, match=r"has room for 1 by placement_strategy='STRICT_SPREAD'\. Ask for fewer"):
        nodes.require_room(ray, apart)
    nodes.require_room(ray, ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0}))


def test_workers_that_no_node_may_take_by_its_labels_are_refused(cluster):
    here = dict(ray.nodes()[0]["Labels"])
    name, value = next(iter(here.items()))
    nodes.require_room(ray, ScalingConfig(num_workers=1, label_selector={name: value}))
    nodes.require_room(ray, ScalingConfig(num_workers=1, label_selector={"zone": "!in(a,b)"}))
    with pytest.raises(ConfigError, match=r"has room for 0 on nodes with the labels zone=a\. Ask for fewer"):
        nodes.require_room(ray, ScalingConfig(num_workers=1, label_selector={"zone": "a"}))


def test_sockets_get_a_short_folder_where_the_usual_one_is_long(monkeypatch):
    for usual, chosen in (("/tmp", None), ("/scratch/of/a/job/1234567", "/tmp")):
        monkeypatch.setattr(tempfile, "tempdir", usual)
        assert embedded._short_folder() == chosen
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"cannot be in /scratch/.*, whose name is too long: set TMPDIR"):
        embedded._short_folder()


def test_a_ray_that_cannot_start_is_one_error():
    class Broken:
        def init(self, **_):
            raise OSError("no room for sockets")

        def shutdown(self):
            pass

    with (
        pytest.raises(ConfigError, match=r"Ray cannot start on this machine: OSError: no room for sockets"),
        embedded.embedded(Broken(), 1),
    ):
        pass


@pytest.mark.parametrize(("has_started", "is_lost", "needed"), [(False, False, 1), (True, False, 2), (True, True, 1)])
def test_a_ctrl_c_ends_the_wait_at_once_while_no_worker_runs(has_started, is_lost, needed):
    pressed = []

    def wait(*_, **__):
        pressed.append(1)
        raise KeyboardInterrupt

    desk = Desk(Callbacks([]), RewardWeights(Rewards()))
    if has_started:
        desk.on_attempt(2)
    if is_lost:
        desk.note("lost", "worker 1: its process ended")
    mailbox = SimpleNamespace(next=SimpleNamespace(remote=lambda: None))
    with pytest.raises(KeyboardInterrupt):
        driver._serve(SimpleNamespace(wait=wait), mailbox, desk, threading.current_thread(), None)
    assert len(pressed) == needed


def test_what_workers_print_by_any_way_arrives_by_lines():
    sent = []
    stream = _Stream(SimpleNamespace(post=lambda *event: sent.append(event)), "stdout")
    stream.writelines(["a", "b\nc", "d"])
    print("e", file=stream, flush=True)
    stream.buffer.write("é\n".encode())
    stream.write("f")
    assert not stream.isatty() and stream.writable()
    stream.end_line()
    assert sent == [("text", "stdout", text) for text in ("ab", "cde", "é", "f")]


def test_another_konic_on_a_node_is_named(cluster, monkeypatch):
    monkeypatch.setattr(nodes.konic, "__version__", "9.9")
    with pytest.raises(ConfigError, match=r"Node 127\.0\.0\.1 \(.*\) has konic .*, and this process has konic 9\.9"):
        nodes.require_equal_nodes(ray, ScalingConfig(num_workers=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Version mismatch: the cluster has Ray 2.59.0"), r"cannot join .*: Version mismatch.*2\.59\.0$"),
        (ConnectionError("Failed to connect to Ray"), "Failed to connect to Ray. If the cluster asks for a token, set"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_error(monkeypatch, error, message):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)  # an embedded Ray sets it

    def init(**options):
        raise error

    monkeypatch.setattr(connection, "_speaks_http2", lambda host, port: True)
    with pytest.raises(ConfigError, match=message):
        connection._connect(SimpleNamespace(init=init), "10.0.0.1:6379")


def test_a_worker_that_does_not_see_the_folder_of_the_others_or_cannot_write_it_says_so(tmp_path):
    class Two:
        """This worker and another one, which has another disk, or the same."""

        def __init__(self, has_own_disk):
            self.has_own_disk = has_own_disk

        def gather(self, message):
            if message and not self.has_own_disk:
                assert (tmp_path / "a run" / message["name"]).is_file()
                (tmp_path / "a run" / ".worker-other").touch()
            return [{"name": ".worker-other"}, message]

    for place in (tmp_path / "a run", (tmp_path / "a run").as_uri()):
        with pytest.raises(OutputError, match=r"run: this node does not see what process 0 writes there\. Name a"):
            _require_shared(str(place), Two(has_own_disk=True))
        assert list((tmp_path / "a run").iterdir()) == []
        _require_shared(str(place), Two(has_own_disk=False))
        (tmp_path / "a run" / ".worker-other").unlink()
        assert list((tmp_path / "a run").iterdir()) == []
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", (tmp_path / "file" / "run").as_uri()):
        with pytest.raises(OutputError, match="file/run: cannot be written"):
            _require_shared(str(place), Two(has_own_disk=True))


def test_no_secret_goes_into_a_runtime_environment_which_the_dashboard_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted")
    trainer = driver._trainer(ScalingConfig(num_workers=1), None, None, str(tmp_path))
    assert trainer.run_config.worker_runtime_env == {"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}}


def test_a_node_where_torch_finds_no_gpu_is_named(cluster):
    needs = SimpleNamespace(_resources_per_worker_not_none={"CPU": 1}, use_gpu=True)  # as if the node had announced one
    with pytest.raises(ConfigError, match=r"Node 127\.0\.0\.1 \(.*\): torch finds no GPU there"):
        nodes.require_equal_nodes(ray, needs)


def test_a_process_that_ended_is_named_rather_than_what_the_others_say():
    ended = RuntimeError("gone")
    ended.health_check_failure = True
    assert describe_losses({0: ValueError("connection reset"), 1: ended}) == "worker 1: its process ended"
    assert describe_losses({0: ValueError("it hangs")}) == "worker 0: ValueError: it hangs"


def test_without_room_to_start_again_a_training_ends_with_the_newest_checkpoint(cluster, monkeypatch):
    desk = Desk(Callbacks([]), RewardWeights(Rewards()))
    assert not desk.has_waited(60)
    assert desk.has_waited(0)
    assert not desk.has_waited(0)  # it is told once
    desk.note("lost", "worker 1: its process ended")
    assert desk.has_waited(0)
    desk.on_attempt(2)
    assert not desk.has_waited(0)
    desk.checkpoint = Path("runs/kind/checkpoint-3")
    scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1000})
    with pytest.raises(TrainingError, match=r"cannot be started again: num_workers=2.*room for 0") as caught:
        driver._explain_waiting(ray, desk, scaling)
    assert caught.value.args[1] == "The newest checkpoint is runs/kind/checkpoint-3."


def test_workers_that_do_not_start_are_reported_with_what_they_take(cluster, caplog):
    driver._explain_waiting(ray, Desk(Callbacks([]), RewardWeights(Rewards())), ScalingConfig(num_workers=2))
    assert "No worker has started for 60 s" in caplog.text
    assert "Each takes 1 CPU, and free is " in caplog.text


def test_the_extra_is_named_where_ray_is_missing(model, monkeypatch):
    monkeypatch.setattr(connection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'konic\[ray\]'"):
        KonicFinetuningEngine.from_agent(make_agent(model, Rewards()), scaling=object())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-workers", "2"], "--min-workers 2 needs"),
        (["--ray-address", "x:1"], "--ray-address 'x:1' needs"),
        (["--num-workers", "2", "--min-workers", "3"], "--min-workers 3 is above"),
        (["--num-workers", "2", "--ray-address", "127.0.0.1:9"], "nothing answers there"),
    ],
)
def test_options_of_the_command_that_do_not_fit_are_one_error(tmp_path, model, monkeypatch, options, message):
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    job = script(
        tmp_path,
        f"""
        from ray_job import Rewards, make_agent
        agent = make_agent({str(model)!r}, Rewards())
        """,
    )
    done = konic_here("train", job, "--output", tmp_path / "run", *options)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert json.dumps(done.stdout) == '""'


def test_the_command_trains_a_script_in_workers_and_sigterm_saves_the_run(model, tmp_path):
    """Ray replaces the handler of SIGTERM by one that ends the process without saving."""
    job = script(
        tmp_path,
        f"""
        import sys
        import time
        from konic.finetuning import KonicLLMRewardComposer, llm_reward
        from ray_job import make_agent

        class Mine(KonicLLMRewardComposer):
            @llm_reward
            def patience(self, prompt: str, response: str) -> float:
                time.sleep(0.05)
                print("given:", sys.argv[1:3])
                return len(response) / 10

        agent = make_agent({str(model)!r}, Mine())
        """,
    )
    run = tmp_path / "run"
    command = [sys.executable, "-W", "ignore", "-m", "konic", "train", job, "--num-workers", "1", "--output", run]
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(BENCHMARKS)]))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": paths}
    started = subprocess.Popen(
        [*map(str, command), "--max-iterations", "200"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment,
    )  # fmt: skip
    printed = []
    try:
        for line in started.stdout:
            printed.append(line)
            if "[Iter    2]" in line:
                started.terminate()
        assert started.wait(60) == -signal.SIGTERM, printed
    finally:
        started.kill()
        started.stdout.close()
    assert f"given: ['train', '{job}']\n" in printed, "what rewards print arrives, and they see the driver's arguments"
    record = json.loads((run / "run.json").read_text())
    assert record["command"].endswith("--max-iterations 200") and " train " in record["command"]
    assert record["process"]["id"] == started.pid, "the process to stop"
    assert record["rewards"]["file"] and (run / "final" / "adapter_model.safetensors").is_file()
    assert 2 <= len((run / "metrics.jsonl").read_text().splitlines()) < 200
