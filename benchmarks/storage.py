"""Runs that are named by a URL of an S3 server on loopback: whole, resumed elsewhere, on Ray, and when it fails.

python benchmarks/storage.py MOTO_SERVER OUTPUT
"""

import contextlib
import hashlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
from pyarrow.fs import FileSelector, FileSystem, FileType, S3FileSystem
from ray.train import ScalingConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from bench import machine
from conftest import byte_tokenizer, tiny_model
from kill_test import differences
from konic.finetuning import KonicFinetuningCallback, KonicFinetuningEngine, OutputError
from konic.finetuning.cluster.embedded import embedded
from konic.finetuning.run.remote import fetched, mirror_of
from ranks import free_port
from ray_job import Rewards, make_agent

ITERATIONS = 6


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class Stopping(KonicFinetuningCallback):
    """Ends the server, or starts it again, after some iterations."""

    def __init__(self, steps=None):
        super().__init__(verbose=False)
        self.steps = steps or {}

    def on_iteration_end(self, result):
        self.steps.get(result.iteration, lambda: None)()


class Server:
    """The S3 server. It keeps what it has in memory, so it is paused rather than ended."""

    def __init__(self, program):
        self.port = free_port()
        self.process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            time.sleep(0.1)

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"


def train(model, place, iterations=ITERATIONS, resume=False, scaling=None, rewards=None, callback=None):
    engine = KonicFinetuningEngine.from_agent(
        make_agent(model, rewards or Rewards()),
        checkpoint_dir=str(place),
        callback=callback or Stopping(),
        scaling=scaling,
        device="cpu",
    )
    return engine, engine.train(iterations, save_every=1, resume_from_checkpoint=resume)


def there(url):
    """The files at a URL, and the SHA-256 of each."""
    files, root = FileSystem.from_uri(url)
    found = files.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    return {
        info.path.removeprefix(f"{root}/"): hashlib.sha256(files.open_input_stream(info.path).read()).hexdigest()
        for info in found
        if info.type == FileType.File
    }


def elsewhere(folder, name):
    """From now on this is another machine: it has no copy of any run."""
    os.environ["KONIC_CACHE"] = str(folder / name)


def plain(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def whole(folder, model):
    elsewhere(folder, "first")
    _, result = train(model, "s3://bucket/whole")
    copy = mirror_of("s3://bucket/whole").path
    at_url, on_disk = there("s3://bucket/whole"), plain(copy)
    assert at_url == on_disk, sorted(at_url.keys() ^ on_disk.keys())
    found = differences(folder / "plain", copy)
    assert not found, found
    return f"{len(at_url)} files there, equal to the run on a disk; `model_path` {result.model_path}"


def resumed_elsewhere(folder, model):
    elsewhere(folder, "first")
    train(model, "s3://bucket/resumed", 3)
    elsewhere(folder, "second")
    train(model, "s3://bucket/resumed", resume=True)
    elsewhere(folder, "third")
    train(model, folder / "halves", 3)
    train(model, folder / "halves", resume=True)
    found = differences(folder / "halves", fetched("s3://bucket/resumed"))
    assert not found, found
    return "equal bit for bit to a run on a disk that was resumed"


def on_ray(folder, model):
    elsewhere(folder, "workers")
    marker = folder / "marker"
    workers = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
    with embedded(ray, 2):
        engine, _ = train(model, "s3://bucket/ray", scaling=workers, rewards=Rewards("killed", marker))
        assert marker.exists()
        train(model, folder / "two", scaling=workers)
        answers = engine.generate(["ab", "why not"])
    elsewhere(folder, "fourth")
    found = differences(folder / "two", fetched("s3://bucket/ray"))
    assert not found, found
    assert len(answers) == 2
    return "a worker was killed and replaced; equal bit for bit to two undisturbed workers on a disk; `generate` works"


def refused_for_a_while(folder, model, files):
    """The bucket is gone for two of the checkpoints."""
    elsewhere(folder, "first")
    seen = Warnings()
    logging.getLogger("konic").addHandler(seen)
    steps = {2: lambda: files.delete_dir("other"), 4: lambda: files.create_dir("other")}
    train(model, "s3://other/run", callback=Stopping(steps))
    logging.getLogger("konic").removeHandler(seen)
    failed = [line for line in seen.lines if "cannot be written" in line]
    assert failed
    copy = plain(mirror_of("s3://other/run").path)
    at_url = there("s3://other/run")
    assert all(copy[name] == digest for name, digest in at_url.items())
    return f"{len(failed)} warnings, the training went on; “{failed[0][:110]} ...”"


def no_bucket(model):
    class Begun(KonicFinetuningCallback):
        def on_iteration_begin(self, iteration):
            raise AssertionError("an iteration began")

    try:
        train(model, "s3://nobody/run", 1, callback=Begun())
    except OutputError as error:
        return f"one error before the first iteration: “{str(error).partition('(Request ID')[0]}...”"
    raise AssertionError("no error")


def main():
    program, output = sys.argv[1], Path(sys.argv[2])
    lines = [
        "# Runs in an object store", "",
        f"Made by `make storage`: the S3 server of moto 5.2.5 on loopback; {machine('pyarrow', 'ray')}. A tiny GPT-2 "
        f"in float64, {ITERATIONS} iterations, a checkpoint after each.", "",
        "| what | result |", "|---|---|",
    ]  # fmt: skip

    def row(what, result):
        lines.append(f"| {what} | {result} |")
        print(lines[-1], flush=True)
        output.write_text("\n".join(lines) + "\n")

    server = Server(program)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "of-this-test", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    try:
        files = S3FileSystem(endpoint_override=server.endpoint, allow_bucket_creation=True, allow_bucket_deletion=True)
        files.create_dir("bucket")
        files.create_dir("other")
        with tempfile.TemporaryDirectory() as temp:
            folder = Path(temp)
            model = folder / "model"
            tiny_model("gpt2").save_pretrained(model)
            byte_tokenizer("gpt2").save_pretrained(model)
            train(model, folder / "plain")
            row('`checkpoint_dir="s3://bucket/run"`, one process', whole(folder, model))
            row("3 iterations, then resumed on another machine", resumed_elsewhere(folder, model))
            row("two workers on Ray", on_ray(folder, model))
            row("the bucket is gone for a while", refused_for_a_while(folder, model, files))
            row("there is no such bucket", no_bucket(model))
    finally:
        server.process.kill()
        server.process.wait()


if __name__ == "__main__":
    main()
