import errno
import os

import pytest
import torch

from conftest import prompt_batch, shake_adapter, tiny_learner
from konic.finetuning import checkpoint
from konic.finetuning.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    snapshot,
    weights_of,
    written_whole,
)
from konic.finetuning.errors import OutputError
from konic.finetuning.moments import RunningMoments
from konic.finetuning.state import TrainerState


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fail_half_way(target):
    with written_whole(target) as folder:
        (folder / "half").write_text("half")
        raise KeyError


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError):
        fail_half_way(tmp_path / "run" / "x")
    assert files_of(tmp_path) == ["run"]
    with written_whole(tmp_path / "run" / "x") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "run" / "x").exists()
    assert files_of(tmp_path) == ["run", "run/x", "run/x/file"]


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path):
    target = tmp_path / "x"
    with written_whole(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(KeyError), written_whole(target) as folder:
        raise KeyError
    assert files_of(tmp_path) == ["x", "x/old"]
    with written_whole(target) as folder:
        (folder / "new").write_text("new")
    assert files_of(tmp_path) == ["x", "x/new"]


def test_a_full_disk_is_one_error_and_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "x"
    with written_whole(target) as folder:
        (folder / "old").write_text("old")

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(OutputError, match="No space left on device"), written_whole(target) as folder:
        (folder / "new").write_text("new")
    assert files_of(tmp_path) == ["x", "x/old"]


@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_brings_back_every_bit(architecture, lora, tmp_path):
    learner = tiny_learner(architecture, lora=lora)
    shake_adapter(learner.policy)
    for scale in (1.0, 0.3):  # two steps, so that the moments differ from any fresh ones
        sum((weight * scale).square().sum() for weight in learner.policy.trainable().values()).backward()
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    moments = {"kind": RunningMoments().after([0.1, 0.2, 1 / 3]), "other.part": RunningMoments()}
    state = TrainerState(7, 28, 1.5, [], snapshot(learner.policy), moments)
    save_checkpoint(tmp_path / "checkpoint-7", learner.policy, learner.optimizer, state, {"a": 1})

    fresh = tiny_learner(architecture, lora=lora)
    loaded = load_checkpoint(tmp_path / "checkpoint-7", fresh.policy, fresh.optimizer)
    assert (loaded.iteration, loaded.num_steps, loaded.elapsed_seconds) == (7, 28, 1.5)
    theirs, ours = learner.policy.trainable(), fresh.policy.trainable()
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name
        assert torch.equal(loaded.best_weights[name], theirs[name]), name
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            left, right = learner.optimizer.state[theirs[name]][moment], fresh.optimizer.state[ours[name]][moment]
            assert torch.equal(left, right), (name, moment)


def test_a_checkpoint_holds_only_safe_formats(tmp_path):
    learner = tiny_learner("llama")
    save_checkpoint(tmp_path / "c", learner.policy, learner.optimizer, TrainerState(), {})
    assert {path.suffix for path in (tmp_path / "c").iterdir()} <= {".safetensors", ".json", ".md", ".jinja"}


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.safetensors"])
def test_a_broken_checkpoint_is_one_error(name, tmp_path):
    learner = tiny_learner("llama")
    folder = tmp_path / "checkpoint-1"
    save_checkpoint(folder, learner.policy, learner.optimizer, TrainerState(), {})
    (folder / name).write_bytes(b"\x00broken")
    with pytest.raises(OutputError, match="is not a whole checkpoint"):
        load_checkpoint(folder, learner.policy, learner.optimizer)
    (folder / name).unlink()
    with pytest.raises(OutputError, match="is not a whole checkpoint"):
        load_checkpoint(folder, learner.policy, learner.optimizer)


def test_the_newest_checkpoint_is_the_highest_iteration_not_the_last_name(tmp_path):
    with pytest.raises(OutputError, match="no checkpoint to resume from"):
        newest_checkpoint(tmp_path)
    for number in (9, 10, 100):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-200").mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-100"


def test_other_weights_are_lent_and_given_back(architecture):
    learner = tiny_learner(architecture)
    batch = prompt_batch(learner)
    model = learner.policy.language_model

    def hidden():
        with torch.no_grad():
            return model.response_hidden(batch.ids, batch.mask, 1)

    before, kept = hidden(), snapshot(learner.policy)
    shake_adapter(learner.policy)
    moved = hidden()
    with weights_of(learner.policy, kept):
        assert torch.equal(hidden(), before)
    assert torch.equal(hidden(), moved)
