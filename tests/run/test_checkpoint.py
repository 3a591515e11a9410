import errno
import json
import os

import pytest
import torch

from conftest import byte_tokenizer, prompt_batch, shake_adapter, tiny_learner
from konic.finetuning.errors import OutputError
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.run.checkpoint import (
    checkpoints,
    load_checkpoint,
    read_record,
    save_checkpoint,
    snapshot,
    swapped_weights,
)
from konic.finetuning.run.resume import checkpoint_to_resume, newest_checkpoint, require_same_run
from konic.finetuning.run.state import TrainerState
from konic.finetuning.system import files as folders
from konic.finetuning.system.files import (
    creating_folder,
    discard,
    filling_folder,
    find_corruption,
    replacing_folder,
    seal,
)


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fail_half_way(target):
    with replacing_folder(target) as folder:
        (folder / "half").write_text("half")
        raise KeyError


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError):
        fail_half_way(tmp_path / "run" / "x")
    assert files_of(tmp_path) == ["run"]
    with replacing_folder(tmp_path / "run" / "x") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "run" / "x").exists()
    assert files_of(tmp_path) == ["run", "run/x", "run/x/file"]


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path):
    target = tmp_path / "x"
    with replacing_folder(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(KeyError), replacing_folder(target) as folder:
        raise KeyError
    assert files_of(tmp_path) == ["x", "x/old"]
    with replacing_folder(target) as folder:
        (folder / "new").write_text("new")
    assert files_of(tmp_path) == ["x", "x/new"]


@pytest.mark.parametrize("links", [True, False])
def test_files_of_others_stay_in_a_folder_that_is_replaced(links, tmp_path, monkeypatch):
    target = tmp_path / "x"
    with replacing_folder(target) as folder:
        (folder / "own").write_text("old")
    (target / "merged" / "empty").mkdir(parents=True)
    (target / "merged" / "model.gguf").write_text("theirs")
    (target / "eval.json").write_text("theirs")
    (target / "link").symlink_to("/nowhere")
    os.mkfifo(target / "pipe")
    if not links:
        monkeypatch.delattr(os, "link")
        monkeypatch.setattr(os, "link", lambda *_, **__: os.stat("/nowhere"), raising=False)
        (target / "pipe").unlink()  # cannot be copied
    with replacing_folder(target, keep_others=True) as folder:
        (folder / "own").write_text("new")
    names = ["eval.json", "link", "merged", "merged/empty", "merged/model.gguf", "own", *["pipe"] * links]
    assert files_of(target) == names
    assert ((target / "own").read_text(), (target / "merged" / "model.gguf").read_text()) == ("new", "theirs")
    assert os.readlink(target / "link") == "/nowhere"
    (target / "own").unlink()
    (target / "own").mkdir()
    with pytest.raises(OutputError, match="x: cannot be written"), replacing_folder(target, keep_others=True) as folder:
        (folder / "own").write_text("newer")
    assert files_of(target) == names
    assert files_of(tmp_path)[0] == "x"


def test_a_full_disk_is_one_error_and_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "x"
    with replacing_folder(target) as folder:
        (folder / "old").write_text("old")

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folders, "_sync", full)
    with pytest.raises(OutputError, match="No space left on device"), replacing_folder(target) as folder:
        (folder / "new").write_text("new")
    assert files_of(tmp_path) == ["x", "x/old"]


@pytest.mark.parametrize("context", [replacing_folder, creating_folder, filling_folder])
def test_a_full_disk_under_a_tokenizer_is_the_same_error(tmp_path, context):
    with pytest.raises(OutputError, match="x: cannot be written: Is a directory"), context(tmp_path / "x") as folder:
        byte_tokenizer("llama").backend_tokenizer.save(str(folder))  # a bare Exception, as for a full disk
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_brings_back_every_bit(architecture, lora, tmp_path):
    learner = tiny_learner(architecture, lora=lora)
    shake_adapter(learner.policy)
    for scale in (1.0, 0.3):  # two steps, so that the moments differ from any fresh ones
        sum((weight * scale).square().sum() for weight in learner.policy.trainable().values()).backward()
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    moments = {"kind": RunningMoments().after([0.1, 0.2, 1 / 3]), "other.part": RunningMoments()}
    state = TrainerState(
        iteration=7, num_steps=28, planned_iterations=10, falls_from=8, num_prompts=9, group_spreads={"3": 0.5},
        elapsed_seconds=1.5, best_weights=snapshot(learner.policy), reward_moments=moments,
    )  # fmt: skip
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


def saved(folder, number):
    learner = tiny_learner("llama")
    save_checkpoint(folder / f"checkpoint-{number}", learner.policy, learner.optimizer, TrainerState(), {})
    return folder / f"checkpoint-{number}"


def test_the_newest_checkpoint_is_the_highest_whole_one_and_broken_ones_are_named(tmp_path, caplog):
    with pytest.raises(OutputError, match="no whole checkpoint to resume from"):
        newest_checkpoint(tmp_path)
    whole = {number: saved(tmp_path, number) for number in (9, 10, 100, 200)}
    assert newest_checkpoint(tmp_path) == whole[200]
    assert not caplog.messages
    (whole[200] / "optimizer.safetensors").write_bytes(b"half")
    (whole[100] / "complete.json").unlink()
    (tmp_path / "checkpoint-300").mkdir()
    (tmp_path / "checkpoint-mine").mkdir()
    assert newest_checkpoint(tmp_path) == whole[10]
    for number, reason in (
        (300, "never finished"),
        (200, "optimizer.safetensors has changed since it was"),
        (100, "never fin"),
    ):
        assert any(f"checkpoint-{number}" in told and reason in told for told in caplog.messages)
    with pytest.raises(
        OutputError, match=r"is not a whole checkpoint: optimizer.safetensors has changed since it was written"
    ):
        checkpoint_to_resume(whole[200], None)


def test_every_byte_of_a_checkpoint_counts(tmp_path):
    folder = saved(tmp_path, 1)
    assert find_corruption(folder) is None
    for file in sorted(path for path in folder.iterdir() if path.name != "README.md"):  # that one is for people
        kept = file.read_bytes()
        file.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
        assert find_corruption(folder) is not None, file.name
        file.unlink()
        assert "missing" in find_corruption(folder), file.name
        file.write_bytes(kept)
    assert find_corruption(folder) is None
    (folder / "complete.json").write_text('{"files": {"../escape": {}}}')
    assert "escape" in find_corruption(folder)
    for text in ("", "[]", '{"files": 3}', '{"files": {"config.json": 3}}'):
        (folder / "complete.json").write_text(text)
        assert find_corruption(folder) is not None


def test_a_checkpoint_deleted_half_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    folder = saved(tmp_path, 1)

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        discard(folder)
    assert "never finished" in find_corruption(folder)


def test_a_resume_elsewhere_says_that_it_is_equal_but_for_rounding(tmp_path, caplog):
    record = read_record(saved(tmp_path, 1))
    cpu = torch.device("cpu")
    require_same_run(tmp_path, record, {}, cpu, allow_changes=False)
    assert not caplog.messages
    record.environment.update({"torch": "1.0", "threads": 99})
    require_same_run(tmp_path, record, {}, cpu, allow_changes=False)
    assert f"torch was 1.0 is {torch.__version__}".split("+")[0] in caplog.text.replace("and is", "is")
    assert "threads was 99" in caplog.text
    assert "may differ by rounding" in caplog.text


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
    with swapped_weights(learner.policy, kept):
        assert torch.equal(hidden(), before)
    assert torch.equal(hidden(), moved)


def test_only_folders_with_a_checkpoints_name_are_checkpoints(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-x-3", "checkpoint-\u0663", "old-checkpoint-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    (tmp_path / "checkpoint-50").symlink_to(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-60").symlink_to(tmp_path / "nowhere")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10", "checkpoint-50"]


def test_files_below_a_folder_are_sealed_too_and_none_outside_is_looked_at(tmp_path):
    folder = tmp_path / "folder"
    (folder / "templates").mkdir(parents=True)
    (folder / "templates" / "a").write_text("a")
    seal(folder)
    assert find_corruption(folder) is None
    (folder / "templates" / "a").write_text("b")
    assert find_corruption(folder) == "templates/a has changed since it was written"
    for name in ("../outside", "/etc/hostname"):
        (folder / "complete.json").write_text(json.dumps({"files": {name: {}}}))
        assert find_corruption(folder) == f"{name} is missing"


def test_a_folder_that_cannot_take_its_name_gives_it_back_to_the_old_one(tmp_path, monkeypatch):
    target, plain = tmp_path / "x", os.replace
    with replacing_folder(target) as folder:
        (folder / "old").write_text("old")

    def replace(source, destination):
        if destination == target and (source / "new").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        plain(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputError, match="Input/output error"), replacing_folder(target) as folder:
        (folder / "new").write_text("new")
    assert (target / "old").read_text() == "old"


def test_files_go_into_a_folder_beside_what_is_in_its_subfolders(tmp_path):
    (tmp_path / "x" / "templates").mkdir(parents=True)
    (tmp_path / "x" / "templates" / "kept").write_text("kept")
    with filling_folder(tmp_path / "x") as folder:
        (folder / "templates").mkdir()
        (folder / "templates" / "new").write_text("new")
    assert files_of(tmp_path) == ["x", "x/templates", "x/templates/kept", "x/templates/new"]
