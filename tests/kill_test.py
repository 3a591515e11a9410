"""Runs killed with SIGKILL, resumed, and compared bit for bit with one that nobody disturbed.

python tests/kill_test.py 100 [OUTPUT]     the long version, `make chaos`; a table goes to standard output or OUTPUT

A child saves a checkpoint after every iteration. It is killed at its n-th file operation, or after a random time; then
another child resumes it, sometimes killed too, until one comes to the end. Children are forked from a process that has
imported everything and computed nothing, so that a kill costs a second.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from conftest import byte_tokenizer, tiny_model
from konic.finetuning.run.environment import environment
from test_engine import completions, make_engine, metrics

ITERATIONS = 4
WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
TIMES = {"elapsed_seconds", "generation_time_sec", "reward_compute_time_sec", "update_time_sec", "total_time_sec"}


class FileOperations:
    """Counts this process's operations under a folder, and kills it at one of them."""

    def __init__(self, folder, kill_at=None):
        self.folder, self.kill_at, self.seen = str(folder), kill_at, []
        sys.addaudithook(self._watch)
        plain = os.fsync
        os.fsync = lambda descriptor: (
            self._count("fsync", os.readlink(f"/proc/self/fd/{descriptor}")),
            plain(descriptor),
        )

    def _watch(self, event, arguments):
        if event in WATCHED:
            writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if writes:
                self._count(event, _whole_path(event, arguments))

    def _count(self, event, path):
        if isinstance(path, int) or self.folder not in os.fsdecode(path):
            return
        self.seen.append((event, os.fsdecode(path)[len(self.folder) :]))
        if len(self.seen) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _whole_path(event, arguments):
    """The path of an operation; one relative to an open folder is made whole."""
    path, *others = arguments
    if event in ("os.remove", "os.rmdir") and isinstance(others[0], int) and others[0] >= 0:
        return os.path.join(os.readlink(f"/proc/self/fd/{others[0]}"), os.fsdecode(path))
    return path


def train(model, run, algorithm, resume):
    engine = make_engine(model, run, algorithm=algorithm, num_minibatches=2, kl_target=0.5, kl_horizon=8)
    engine.train(ITERATIONS, save_every=1, resume_from_checkpoint=resume or None, save_total_limit=2)


def in_child(work):
    """Do `work` in a forked process; the number of the signal that ended it, 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise AssertionError("a child ended with an error")
    return os.WTERMSIG(status)


def counted(model, run, algorithm):
    """The file operations of a whole run, in order, and its seconds."""
    told = run.parent / f"{run.name}.json"

    def work():
        operations, start = FileOperations(run), time.monotonic()
        train(model, run, algorithm, resume=False)
        told.write_text(json.dumps([operations.seen, time.monotonic() - start]))

    assert in_child(work) == 0
    return json.loads(told.read_text())


def killed_and_resumed(model, run, algorithm, kill_at=None, kill_after=None, kill_resume_at=None):
    """A run killed at a file operation or after some seconds, and resumed to its end; how often it was killed."""
    kills = 0

    def attempt(at, after):
        def work():
            if at is not None:
                FileOperations(run, at)
            if after is not None:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            train(model, run, algorithm, resume=(run / "run.json").exists())

        return in_child(work)

    attempts = [(kill_at, kill_after), *([(kill_resume_at, None)] if kill_resume_at else []), (None, None)]
    for at, after in attempts:
        before = newest(run)
        ended_by = attempt(at, after)
        assert newest(run) >= before, "a checkpoint was lost"
        if not ended_by:
            break
        assert ended_by == signal.SIGKILL
        kills += 1
    return kills


def newest(run):
    whole = [int(f.name.rpartition("-")[2]) for f in run.glob("checkpoint-*") if (f / "complete.json").is_file()]
    return max(whole, default=0)


def differences(left, right):
    """What of two runs' folders is not the same, times aside; `earlier-1` is what a restart from the beginning kept."""
    found = []
    if metrics(left) != metrics(right):
        found.append("metrics.jsonl")
    if completions(left) != completions(right):
        found.append("completions")
    files = [{str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} for run in (left, right)]
    names = [sorted(name for name in group if not name.startswith("earlier-1/")) for group in files]
    if names[0] != names[1]:
        found.append(f"files: {sorted(set(names[0]) ^ set(names[1]))}")
    for path in sorted(left.rglob("*.safetensors")):
        other = right / path.relative_to(left)
        ours, theirs = load_file(path), load_file(other)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            found.append(str(path.relative_to(left)))
    for path in sorted(left.glob("checkpoint-*/trainer_state.json")):
        states = [_without_times(json.loads((run / path.relative_to(left)).read_text())) for run in (left, right)]
        if states[0] != states[1]:
            found.append(str(path.relative_to(left)))
    return found


def _without_times(value):
    if isinstance(value, dict):
        return {name: _without_times(item) for name, item in value.items() if name not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def saved_model(folder):
    """A tiny model as a user would name it; made in a child, for this process must not compute."""

    def work():
        tiny_model("llama", torch.float32).save_pretrained(folder)
        byte_tokenizer("llama").save_pretrained(folder)

    assert in_child(work) == 0
    return str(folder)


def plan(operations, seconds, count, part=0, parts=1):
    """(kind, options) of each kill: the second checkpoint's operations, random ones and moments for the rest.

    Its writing and its removal are one operation after the other; a part takes every `parts`-th of them, so that all
    parts together take every one, where there is room for them.
    """
    save = [n for n, (_, path) in enumerate(operations, start=1) if "checkpoint-2" in path]
    choice = random.Random(part)
    own, room = save[part::parts], max(1, count * 3 // 5)
    chosen = own if len(own) <= room else [own[number * len(own) // room] for number in range(room)]
    kills = [("file operation of a save", {"kill_at": n}) for n in chosen]
    while len(kills) < count:
        kind = len(kills) % 3
        if kind == 0:
            kills.append(("any file operation", {"kill_at": choice.randint(1, len(operations))}))
        elif kind == 1:
            kills.append(("random moment", {"kill_after": choice.uniform(0.05, seconds)}))
        else:
            options = {"kill_at": choice.choice(save), "kill_resume_at": choice.randint(1, len(operations) // 2)}
            kills.append(("a save, then its resume", options))
    return kills


def run_kills(folder, count, algorithms):
    """For every kind of kill (tried, equal); and what differed."""
    model = saved_model(folder / "model")
    tried, equal, wrong, killed = Counter(), Counter(), [], 0
    for position, algorithm in enumerate(algorithms):
        whole = folder / f"whole-{algorithm}"
        operations, seconds = counted(model, whole, algorithm)
        share = count // len(algorithms) + (position < count % len(algorithms))
        for number, (kind, options) in enumerate(plan(operations, seconds, share, position, len(algorithms))):
            run = folder / f"{algorithm}-{number}"
            tried[kind] += 1
            try:
                kills = killed_and_resumed(model, run, algorithm, **options)
                while not kills and "kill_after" in options:  # it was faster: once more, earlier
                    shutil.rmtree(run)
                    options["kill_after"] *= 0.6
                    kills = killed_and_resumed(model, run, algorithm, **options)
                assert kills, "it was never killed"
                killed += kills
                found = differences(whole, run)
            except AssertionError as error:
                found = [str(error)]
            if found:
                wrong.append(f"{algorithm}, {kind} {options}: {'; '.join(found)}")
            else:
                equal[kind] += 1
                shutil.rmtree(run)
    return tried, equal, wrong, killed


def main():
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        tried, equal, wrong, killed = run_kills(Path(folder), count, ("ppo", "rloo", "grpo", "dr_grpo", "reinforce++"))
    lines = ["| killed at | runs | equal bit for bit to the undisturbed run |", "|---|---|---|"]
    lines += [f"| {kind} | {tried[kind]} | {equal[kind]} |" for kind in tried]
    lines += [f"| **all** ({killed} kills) | **{sum(tried.values())}** | **{sum(equal.values())}** |"]
    heading = ", ".join(f"{name} {value}" for name, value in environment(torch.device("cpu")).items())
    text = "\n".join([f"`make chaos`: {heading}.", "", *lines]) + "\n"
    print(text + "\n".join(wrong))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
