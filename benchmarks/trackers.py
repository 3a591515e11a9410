"""Runs of konic in four experiment trackers, read back by the trackers' own packages.

python benchmarks/trackers.py FOLDER RESULT.md, where FOLDER holds their packages: `make trackers`. Packages that konic
has too are taken from konic's environment.

A tiny model trains four iterations with the tracker, a resume trains two more, and every number that the tracker holds
is compared with metrics.jsonl. Connections to other machines are counted, and refused.
"""

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TRACKERS = {"TensorBoard": "tensorboard", "MLflow": "mlflow-skinny", "W&B": "wandb", "Trackio": "trackio"}
BEFORE, AFTER = 4, 6
"""Iterations before the resume and after it."""


def main(packages, result):
    """Try every tracker in a process of its own, and write the table."""
    sys.path.append(packages)
    from bench import machine

    rows = ["| tracker | version | iterations | metrics | largest difference | samples | settings | connections |"]
    rows.append("|---" * 8 + "|")
    for label, package in TRACKERS.items():
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "one", packages, label, folder],
                capture_output=True, text=True, check=False, env=os.environ | places(folder),
            )  # fmt: skip
        if "FOUND" not in done.stdout:
            sys.exit(f"{label}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.rpartition("FOUND")[2].splitlines()[0])
        rows.append(f"| {label} | {version(package)} | " + " | ".join(map(str, found)) + " |")
        print(rows[-1], flush=True)
    about = (
        f"Made by `make trackers` on {machine()}. {BEFORE} iterations of a tiny model, then a resume to {AFTER}; the "
        "numbers are read back by each tracker's package and compared with metrics.jsonl (TensorBoard keeps float32)."
    )
    Path(result).write_text("\n\n".join(["# Trackers, read back", about, "\n".join(rows)]) + "\n", encoding="utf-8")


def places(folder):
    """Return the environment in which every tracker writes into the folder."""
    store = f"sqlite:///{folder}/mlflow.db"
    return {"TRACKIO_DIR": f"{folder}/trackio", "MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1", "HOME": folder}


def one(packages, label, name):
    """Train with one tracker, read it back and print the cells of its row."""
    sys.path.append(packages)
    folder, reached = Path(name), refuse_connections()
    os.chdir(folder)
    run = train(label, folder)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    iterations, settings, samples = READERS[label](run)
    expected = {line["iteration"]: expected_values(line) for line in lines}
    missing = {(step, name) for step, values in expected.items() for name in values.keys() - iterations[step].keys()}
    if missing or iterations.keys() != expected.keys():
        sys.exit(f"not found: {sorted(missing)[:9]}; iterations {sorted(iterations)}")
    differences = [
        abs(iterations[step][name] - value) / max(abs(value), 1e-12)
        for step, values in expected.items()
        for name, value in values.items()
    ]
    names = {name for values in expected.values() for name in values}
    print(
        "FOUND"
        + json.dumps([len(expected), len(names), f"{max(differences):.0e}", len(samples), settings, len(reached)])
    )


def refuse_connections():
    """Refuse connections to other machines; return the list in which they are noted."""
    reached, connect = [], socket.socket.connect

    def checked(self, address):
        if self.family != socket.AF_UNIX and not str(address[0]).startswith("127."):
            reached.append(address)
            raise ConnectionRefusedError(address)
        return connect(self, address)

    socket.socket.connect = checked
    return reached


def train(label, folder):
    """Train, and resume with new objects as a second process would; return the run's folder."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch

    from conftest import byte_tokenizer, tiny_model
    from konic import finetuning as f

    kinds = [f.TensorBoardCallback, f.MLflowCallback, f.WandbCallback, f.TrackioCallback]
    tracker = dict(zip(TRACKERS, kinds, strict=True))[label]
    tiny_model("llama", torch.float32).save_pretrained(folder / "model")
    byte_tokenizer("llama").save_pretrained(folder / "model")

    class Rewards(f.KonicLLMRewardComposer):
        @f.llm_reward
        def brief(self, prompt, response):
            return -len(response) / 8

    for iterations in (BEFORE, AFTER):
        agent = f.KonicFinetuningAgent(
            base_model=str(folder / "model"),
            reward_composer=Rewards(),
            lora_config=f.LoraConfig(r=2),
            dataset_config=f.DatasetConfig(prompts=["a | b", "<b>c", "d\ne"]),
            training_config=f.TrainingConfig(batch_size=4),
            generation_config=f.GenerationConfig(max_new_tokens=8, max_prompt_length=16),
        )
        callbacks = [f.KonicFinetuningCallback(verbose=False), tracker(samples_every=2)]
        engine = f.KonicFinetuningEngine.from_agent(
            agent, checkpoint_dir=folder / "run", device="cpu", callback=callbacks
        )
        engine.train(iterations, resume_from_checkpoint=iterations > BEFORE)
    return folder / "run"


def expected_values(line):
    """Return the numbers of a line of metrics.jsonl under the names of trackers."""
    numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "iteration"}
    return numbers | {f"reward/{name}": value for name, value in line["reward_breakdown"].items()}


def read_tensorboard(run):
    """Return the numbers by iteration, whether the settings are there, and the tables of samples."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "trackers" / "tensorboard"))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    settings = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    tables = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    return found, "model_name" in settings, tables


def read_mlflow(run):
    """Return the same from MLflow's store."""
    import mlflow

    client = mlflow.MlflowClient()
    [stored] = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    found = {}
    for name in stored.data.metrics:
        for metric in client.get_metric_history(stored.info.run_id, name):
            found.setdefault(metric.step, {})[name] = metric.value
    return found, "model_name" in stored.data.params, client.list_artifacts(stored.info.run_id, "samples")


def read_trackio(run):
    """Return the same from Trackio's store."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    [stored] = trackio.Api().runs("konic")
    logs = SQLiteStorage.get_logs("konic", stored.name)
    found = {log["step"]: log for log in logs}
    settings = SQLiteStorage.get_run_config("konic", stored.name) or {}
    return found, "model_name" in settings, [log["samples"] for log in logs if log.get("samples")]


def read_wandb(run):
    """Return the same from the offline files, one per process, which `wandb sync` joins."""
    from wandb.proto import wandb_internal_pb2

    found, settings, ids = {}, set(), set()
    for path in sorted((run / "trackers" / "wandb").glob("offline-run-*/*.wandb")):
        for raw in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(raw)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                settings |= {item.key for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                line = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
                found[line["iteration"]] = line
    if len(ids) != 1:
        sys.exit(f"the resume has another id: {ids}")
    return found, "model_name" in settings, [line["samples/path"] for line in found.values() if "samples/path" in line]


def leveldb_records(data):
    """Yield the records of W&B's file: seven bytes, then LevelDB's log format (blocks of 32 KiB)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


READERS = dict(zip(TRACKERS, [read_tensorboard, read_mlflow, read_wandb, read_trackio], strict=True))

if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1] == "one" else main(*sys.argv[1:])
