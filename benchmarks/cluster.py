"""Trainings on Ray that are disturbed: workers are killed at random moments or hang, drivers are killed or interrupted.

python benchmarks/cluster.py KILLS OUTPUT
"""

import contextlib
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import ray
from ray.train import ScalingConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import byte_tokenizer, tiny_model
from kill_test import differences
from konic.finetuning import KonicFinetuningCallback, KonicFinetuningEngine, RewardError
from konic.finetuning.cluster import connection
from ray_job import Rewards, make_agent

JOB = Path(__file__).with_name("ray_job.py")
ITERATIONS = 6


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


def workers():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline() and "RayTrainWorker" in process.cmdline()[0]:
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
    start = time.monotonic()
    try:
        train(model, folder / "error", Rewards("error"))
    except RewardError as error:
        return time.monotonic() - start, str(error).splitlines()[0]
    raise AssertionError("no error")


def job(folder, model, what, *, env=None, workers=2):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", JOB, model, folder / what, str(workers), what],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | (env or {}),
    )  # fmt: skip


def wait_for_lines(file, count, seconds=120):
    end = time.monotonic() + seconds
    while not (file.exists() and file.read_text().count("\n") >= count):
        assert time.monotonic() < end, f"{file}: nothing came"
        time.sleep(0.1)


def dead_driver(folder, model):
    """Seconds until no process of a training is left whose driver was killed."""
    driver = job(folder, model, "slow")
    wait_for_lines(folder / "slow" / "metrics.jsonl", 2)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    start = time.monotonic()
    _, alive = psutil.wait_procs(family, timeout=60)
    driver.communicate()
    assert not alive, alive
    return len(family), time.monotonic() - start


def interrupted(folder, model):
    (folder / "ctrl-c").mkdir()
    driver = job(folder / "ctrl-c", model, "slow")
    wait_for_lines(folder / "ctrl-c" / "slow" / "metrics.jsonl", 2)
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
    (line,) = [line for line in errors.splitlines() if "A worker was lost" in line]
    return time.monotonic() - start, line


@contextlib.contextmanager
def two_nodes(folder):
    """A cluster of two nodes, each with one CPU; yields its address and the processes of the second node."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = ["--num-cpus", "1", "--object-store-memory", str(100 * 2**20), "--node-ip-address", "127.0.0.1", "--block"]
    ray_command = [str(Path(sys.executable).with_name("ray")), "start"]
    env = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}
    heads = ["--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", str(folder)]
    started = []
    try:
        for more in (heads, ["--address", f"127.0.0.1:{port}"]):
            started.append(
                subprocess.Popen(
                    [*ray_command, *more, *common], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
            said = next((line for line in started[-1].stdout if "runtime started" in line), None)
            assert said, f"ray start {more} failed"
        yield f"127.0.0.1:{port}", started[1]
    finally:
        for process in started[::-1]:
            end_family(process)


def end_family(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def on_two_nodes(folder, model):
    """The lines that a training prints whose two workers are on two nodes."""
    with tempfile.TemporaryDirectory(prefix="ray") as short, two_nodes(Path(short)) as (address, _):
        env = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        output, errors = job(folder, model, "nothing", env=env).communicate(timeout=180)
        assert "STOPPED None" in output, errors
        return sum(line.startswith("[Iter") for line in output.splitlines())


def main():
    count, output = int(sys.argv[1]), Path(sys.argv[2])
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "transformers", "peft"))
    lines = [
        "# Trainings on Ray that are disturbed", "",
        f"Made by `make cluster` on {cpu.partition(':')[2].strip() or platform.machine()}, 2 workers; "
        f"Python {platform.python_version()}, {versions}. A tiny GPT-2 in float64, {ITERATIONS} iterations.", "",
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
        with connection._embedded(ray, 2):
            seconds, line = user_error(folder, model)
            row("a reward raises on one worker", f"ended after {seconds:.0f} s, the start included: “{line}”")
            equal, wrong = random_kills(folder, model, count)
        row("a worker is killed (SIGKILL) at a random moment", f"{equal} of {count} runs equal bit for bit")
        for problem in wrong:
            row("", problem)
        seconds, line = hung(folder, model)
        row("a worker hangs, `process_timeout_seconds=5`", f"started again, finished in {seconds:.0f} s: “{line}”")
        processes, seconds = dead_driver(folder, model)
        row("the driver is killed (SIGKILL)", f"all its {processes} processes have ended after {seconds:.1f} s")
        row("Ctrl-C", f"saved and ended after {interrupted(folder, model):.1f} s")
        printed = on_two_nodes(folder, model)
        row("two `ray start` nodes on one machine, a worker on each", f"trained: {printed} of 4 iterations reported")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
