"""Trainings on Ray that are disturbed: workers are killed at random moments or hang, drivers are killed or interrupted.

python benchmarks/cluster.py KILLS OUTPUT
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import psutil
import ray
from ray.train import ScalingConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from bench import machine
from conftest import byte_tokenizer, tiny_model
from kill_test import differences
from konic.finetuning import KonicFinetuningCallback, KonicFinetuningEngine, RewardError
from konic.finetuning.cluster.desk import Desk
from konic.finetuning.cluster.embedded import embedded
from ranks import free_port
from ray_job import Rewards, make_agent
from test_engine import metrics

JOB = Path(__file__).with_name("ray_job.py")
ITERATIONS = 6
MAX_SECONDS = 30
"""From an error in one worker to the end of all."""
OPEN = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
"""Of a cluster of several nodes, and of who joins it. Its workers have the priority of other programs."""


class Watching(KonicFinetuningCallback):
    """Says when the training began and ended."""

    def __init__(self):
        super().__init__(verbose=False)
        self.begun = threading.Event()

    def on_train_begin(self, config):
        self.start = time.monotonic()
        self.begun.set()


def train(model, run, rewards=None, scaling=None, callback=None):
    engine = KonicFinetuningEngine.from_agent(
        make_agent(model, rewards or Rewards()),
        checkpoint_dir=run,
        callback=callback or Watching(),
        scaling=scaling or ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
    )
    return engine.train(ITERATIONS, save_every=1)


def workers(pid=None, kind="RayTrainWorker"):
    """The workers, or actors of another kind, below a process: this one, or that of a node."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline() and kind in process.cmdline()[0]:
                found.append(process)
    return found


def killed(model, run, after, choice):
    """Train, with one worker killed that many seconds after the training began; whether one was."""
    callback, done = Watching(), []

    def kill():
        callback.begun.wait()
        time.sleep(after)
        alive = workers()
        if alive and not ended.is_set():
            victim = choice.choice(alive)
            victim.send_signal(signal.SIGKILL)
            done.append(victim.pid)

    ended = threading.Event()
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    train(model, run, callback=callback)
    ended.set()
    return bool(done)


def random_kills(folder, model, count):
    choice, equal, wrong = random.Random(0), 0, []
    callback = Watching()
    train(model, folder / "whole", callback=callback)
    seconds = time.monotonic() - callback.start
    for number in range(count):
        run, after = folder / f"kill-{number}", choice.uniform(0, seconds)
        while not killed(model, run, after, choice):
            after *= 0.6
            run = folder / f"kill-{number}-{after:.2f}"
        found = differences(folder / "whole", run)
        equal += not found
        wrong += [f"kill {number} after {after:.2f} s: {'; '.join(found)}"] if found else []
        print(number, f"{after:.2f} s", found or "equal", flush=True)
    return equal, wrong


def user_error(folder, model):
    """Let a reward raise in one worker: the seconds from then until no worker is left, and the error.

    It must be over within MAX_SECONDS, and nothing is started again.
    """
    raised, desks = folder / "raised", []
    with mock.patch("konic.finetuning.cluster.driver.Desk", lambda *given: desks.append(Desk(*given)) or desks[-1]):
        try:
            train(model, folder / "error", Rewards("error", raised))
        except RewardError as error:
            line = str(error).splitlines()[0]
        else:
            raise AssertionError("no error")
    wait_for(lambda: not workers(), lambda: f"{workers()} have not ended")
    seconds = time.time() - float(raised.read_text())
    assert seconds <= MAX_SECONDS, f"it took {seconds:.1f} s"
    assert [(desk.attempts, desk.losses) for desk in desks] == [(1, 0)], "it was tried again"
    return seconds, line


def job(folder, model, what, iterations=4, address=None):
    """A driver that trains in `folder / what`: in the cluster of an address, or in one of its own."""
    env = OPEN | {"RAY_ADDRESS": address} if address else os.environ
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", JOB, model, folder / what, what, str(iterations)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env,
    )  # fmt: skip


def wait_for(condition, explain, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.1)


def wait_for_iterations(run, count):
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= count, lambda: f"{metrics}: nothing came")


def dead_driver(folder, model):
    """Kill a driver. The processes below it, and the seconds until no worker is left, and none of the others."""
    driver = job(folder, model, "slow", 200)
    wait_for_iterations(folder / "slow", 2)
    working = workers(driver.pid)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    start, seconds = time.monotonic(), []
    for processes in (working, family):
        _, alive = psutil.wait_procs(processes, timeout=180)
        assert not alive, alive
        seconds.append(time.monotonic() - start)
    driver.communicate()
    return len(family), *seconds


def interrupted(folder, model):
    (folder / "ctrl-c").mkdir()
    driver = job(folder / "ctrl-c", model, "slow", 200)
    wait_for_iterations(folder / "ctrl-c" / "slow", 2)
    start = time.monotonic()
    os.killpg(driver.pid, signal.SIGINT)
    output, errors = driver.communicate(timeout=60)
    assert "STOPPED interrupted" in output, errors
    assert (folder / "ctrl-c" / "slow" / "final").is_dir()
    return time.monotonic() - start


def hung(folder, model):
    start = time.monotonic()
    output, errors = job(folder, model, "hang").communicate(timeout=180)
    assert "STOPPED None" in output, errors
    return time.monotonic() - start, loss(errors)


def loss(errors):
    """The line that says which worker was lost; there is one."""
    (line,) = [line for line in errors.splitlines() if "A worker was lost" in line]
    return line


@contextlib.contextmanager
def node_folder():
    """A folder with a short name: the sockets of a node have paths of at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ray") as name:
        yield Path(name)


@contextlib.contextmanager
def nodes(folder, count):
    """A cluster of nodes with one CPU each; yields its address and the process of each node, the head first.

    Nodes that are added to the list are ended too.
    """
    address, started = f"127.0.0.1:{free_port()}", []
    try:
        for number in range(1, count + 1):
            started.append(start_node(folder, address, number))
        yield address, started
    finally:
        for process in started[::-1]:
            end_family(process)


def start_node(folder, address, number):
    """Start a node of a cluster; number 1 is the head."""
    head = ["--head", "--port", address.rpartition(":")[2], "--include-dashboard", "false", "--temp-dir", str(folder)]
    which = head if number == 1 else ["--address", address, "--node-ip-address", f"127.0.0.{number}"]
    common = ["--num-cpus", "1", "--object-store-memory", str(100 * 2**20), "--block"]
    log = folder / f"node-{number}.log"
    with log.open("w") as file:
        command = [Path(sys.executable).with_name("ray"), "start", *which, *common]
        process = subprocess.Popen(command, env=OPEN, stdout=file, stderr=file)
    wait_for(lambda: "runtime started" in log.read_text(), log.read_text)
    return process


def end_family(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def on_two_nodes(folder, model):
    """The iterations that a training on two nodes reports, and on how many of them it had a worker."""
    with nodes(folder, 2) as (address, processes):
        driver = job(folder, model, "slow", address=address)
        wait_for_iterations(folder / "slow", 2)
        used = sum(bool(workers(process.pid)) for process in processes)
        output, errors = driver.communicate(timeout=180)
        assert "STOPPED None" in output, errors
        return sum(line.startswith("[Iter") for line in output.splitlines()), used


def grown(folder, model):
    """Train with one worker of at most two, until a second node comes.

    The seconds until it has a worker, the iterations before that, and the largest difference of a metric from those of
    one process.
    """
    with elastic(folder, model, 1) as (processes, address, differences_from_one):
        processes.append(start_node(folder, address, 2))
        start = time.monotonic()
        wait_for(lambda: workers(processes[1].pid), lambda: "the second node got no worker")
        seconds, before = time.monotonic() - start, len(metrics(folder / "grow"))
        return seconds, before, differences_from_one()[0]


def shrunk(folder, model):
    """Train with two workers of at least one, until a node is killed.

    The seconds until the training has ended, the largest difference of a metric from those of one process, and what is
    said of the loss.
    """
    with elastic(folder, model, 2) as (processes, _, differences_from_one):
        assert workers(processes[1].pid), "the second node has no worker"
        start = time.monotonic()
        end_family(processes[1])
        difference, errors = differences_from_one()
        return time.monotonic() - start, difference, loss(errors)


@contextlib.contextmanager
def elastic(folder, model, count):
    """A training of one or two workers on `count` nodes, after two iterations.

    Yields the nodes, their address, and a function that waits for its end: the largest difference of a metric from
    those of one process, and the errors that were printed.
    """
    iterations, alone = 12, folder / "alone"
    KonicFinetuningEngine.from_agent(
        make_agent(model, Rewards()), checkpoint_dir=alone, callback=Watching(), device="cpu"
    ).train(iterations)
    with nodes(folder, count) as (address, processes):
        driver = job(folder, model, "grow", iterations, address)
        wait_for_iterations(folder / "grow", 2)

        def differences_from_one():
            output, errors = driver.communicate(timeout=240)
            assert "STOPPED None" in output, errors
            rows = zip(metrics(alone), metrics(folder / "grow"), strict=True)
            numbers = [(one[name], two[name]) for one, two in rows for name in one if isinstance(one[name], float)]
            return max(abs(one - two) for one, two in numbers), errors

        yield processes, address, differences_from_one


def dead_driver_of_a_cluster(folder, model):
    """Kill a driver in a cluster of two nodes that is not its own: the seconds until no worker is left."""
    with nodes(folder, 2) as (address, processes):
        driver = job(folder, model, "slow", 200, address)
        wait_for_iterations(folder / "slow", 2)
        working = [worker for process in processes for worker in workers(process.pid)]
        assert working
        driver.kill()
        start = time.monotonic()
        _, alive = psutil.wait_procs(working, timeout=180)
        assert not alive, alive
        driver.communicate()
        return time.monotonic() - start


def lost_actor(folder, model, what, kind):
    """Kill the actor of rewards in a training. What differs from an undisturbed one, and what is said of it."""
    for name in ("whole", "killed"):
        place = folder / f"{what}-{name}"
        place.mkdir()
        driver = job(place, model, what, ITERATIONS)
        if name == "killed":
            wait_for_iterations(place / what, 2)
            victims = workers(driver.pid, kind)
            assert victims, f"no process of {kind}"
            for victim in victims:
                victim.kill()
        output, errors = driver.communicate(timeout=240)
        assert "STOPPED None" in output, errors
    found = differences(*(folder / f"{what}-{name}" / what for name in ("whole", "killed")))
    return found, [line for line in errors.splitlines() if "was lost" in line]


def lost_node(folder, model, count):
    """Kill a node with a worker, not the head, of `count` nodes. Seconds from then on, what is printed, its errors."""
    with nodes(folder, count) as (address, processes):
        driver = job(folder, model, "slow", 10, address)
        wait_for_iterations(folder / "slow", 2)
        end_family(next(process for process in processes[1:] if workers(process.pid)))
        start = time.monotonic()
        output, errors = driver.communicate(timeout=240)
        return time.monotonic() - start, output, errors


def survived_node(folder, model):
    seconds, output, errors = lost_node(folder, model, 3)
    assert "STOPPED None" in output, errors
    return seconds, loss(errors)


def no_room_left(folder, model):
    seconds, output, errors = lost_node(folder, model, 2)
    assert "STOPPED" not in output
    return seconds, next(line for line in errors.splitlines() if line.startswith("konic") and "TrainingError" in line)


def main():
    num_kills, output = int(sys.argv[1]), Path(sys.argv[2])
    lines = [
        "# Trainings on Ray that are disturbed", "",
        f"Made by `make cluster` on {machine('ray')}, 2 workers. A tiny GPT-2 in float64, {ITERATIONS} iterations.", "",
        "| what | result |", "|---|---|",
    ]  # fmt: skip

    def row(what, result):
        lines.append(f"| {what} | {result} |")
        print(lines[-1], flush=True)
        output.write_text("\n".join(lines) + "\n")

    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        model = folder / "model"
        tiny_model("gpt2").save_pretrained(model)
        byte_tokenizer("gpt2").save_pretrained(model)
        with embedded(ray, 2):
            seconds, line = user_error(folder, model)
            row("a reward raises on one worker", f"both ended {seconds:.1f} s later, and were started once: “{line}”")
            equal, wrong = random_kills(folder, model, num_kills)
        row("a worker is killed (SIGKILL) at a random moment", f"{equal} of {num_kills} runs equal bit for bit")
        for problem in wrong:
            row("", problem)
        seconds, line = hung(folder, model)
        row("a worker hangs, `process_timeout_seconds=5`", f"started again, finished in {seconds:.0f} s: “{line}”")
        for what, kind, name in (
            ("pool", "_RewardHost", "the actor of the reward workers"),
            ("model", "_ModelHost", "the actor of a reward model"),
        ):
            found, lines_of_it = lost_actor(folder, model, what, kind)
            said = f": “{lines_of_it[0]}”" if lines_of_it else ""
            row(f"{name} is killed", f"{'; '.join(found) or 'equal bit for bit'}{said}")
            wrong += found
        num_processes, first, last = dead_driver(folder, model)
        row(
            "the driver is killed (SIGKILL)",
            f"both workers ended after {first:.1f} s, all {num_processes} processes after {last:.0f} s",
        )
        row("Ctrl-C", f"saved and ended after {interrupted(folder, model):.1f} s")
        with node_folder() as short:
            printed, used = on_two_nodes(short, model)
        row("two `ray start` nodes on one machine", f"workers on {used} of them; {printed} of 4 iterations reported")
        with node_folder() as short:
            seconds, before, difference = grown(short, model)
        row(
            "a second node comes to a training of one worker, `num_workers=(1, 2)`",
            f"a worker on it {seconds:.0f} s later, after iteration {before} of 12; metrics differ from those of one "
            f"process by {difference:.1g} at most",
        )
        with node_folder() as short:
            seconds, difference, line = shrunk(short, model)
        row(
            "one of two nodes is killed, with its worker, `num_workers=(1, 2)`",
            f"finished {seconds:.0f} s later with one worker; metrics differ from those of one process by "
            f"{difference:.1g} at most: “{line}”",
        )
        with node_folder() as short:
            seconds = dead_driver_of_a_cluster(short, model)
        row("the driver of a training on two nodes is killed", f"its workers ended after {seconds:.1f} s")
        with node_folder() as short:
            seconds, line = survived_node(short, model)
        row("one of three nodes is killed, with its worker", f"finished {seconds:.0f} s later: “{line}”")
        with node_folder() as short:
            seconds, line = no_room_left(short, model)
        row("one of two nodes is killed, with its worker", f"ended {seconds:.0f} s later: “{line}”")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
