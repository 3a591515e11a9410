"""A run whose folder is named by a URL: of a folder on this disk, and of fsspec's memory."""

import shutil
from pathlib import Path, PurePosixPath

import pyarrow
import pyarrow.fs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from command import konic_here
from konic.finetuning import ConfigError, KonicFinetuningCallback, OutputError
from konic.finetuning.run import remote
from konic.finetuning.run.remote import copy_of, fetched, mirror_of, renew_copies
from konic.finetuning.system import mirror as mirror_module
from konic.finetuning.system.mirror import Mirror
from test_engine import completions, make_engine, metrics, same_tensors, weights


@pytest.fixture
def model_folder(model_folders):
    return model_folders["llama"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KONIC_CACHE", str(tmp_path / "cache"))


def another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("KONIC_CACHE", str(tmp_path / "other"))


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class Saved(KonicFinetuningCallback):
    """Remembers what was told of saving, and what was at the place by then."""

    def __init__(self, place):
        super().__init__(verbose=False)
        self.place, self.told, self.there = place, [], []

    def on_iteration_end(self, result):
        pass

    def on_checkpoint_saved(self, path, iteration):
        self.told.append(path)
        self.there.append((self.place / f"checkpoint-{iteration}").is_dir())


def test_a_run_at_a_url_is_the_run_on_a_disk_and_is_there_after_each_checkpoint(model_folder, tmp_path):
    there, url = tmp_path / "bucket" / "run", f"file://{tmp_path}/bucket/run"
    seen = Saved(there)
    result = make_engine(model_folder, url, seen).train(2, save_every=1)
    make_engine(model_folder, tmp_path / "plain").train(2, save_every=1)
    assert files(there) == files(tmp_path / "plain")
    assert metrics(there) == metrics(tmp_path / "plain")
    assert completions(there) == completions(tmp_path / "plain")
    same_tensors(weights(there / "final"), weights(tmp_path / "plain" / "final"))
    assert result.model_path == f"{url}/final"
    assert seen.told == [f"{url}/checkpoint-1", f"{url}/checkpoint-2"]
    assert seen.there == [True, True]


def test_another_machine_resumes_it_bit_for_bit(model_folder, tmp_path, monkeypatch):
    there, url = tmp_path / "bucket" / "run", f"file://{tmp_path}/bucket/run"
    make_engine(model_folder, url).train(2)
    another_machine(tmp_path, monkeypatch)
    make_engine(model_folder, url).train(4, resume_from_checkpoint=True)
    make_engine(model_folder, tmp_path / "plain").train(4)
    assert metrics(there) == metrics(tmp_path / "plain")
    same_tensors(weights(there / "final"), weights(tmp_path / "plain" / "final"))


def test_one_checkpoint_is_resumed_by_its_url(model_folder, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/bucket/run"
    make_engine(model_folder, url).train(2, save_every=1)
    another_machine(tmp_path, monkeypatch)
    resumed = make_engine(model_folder, url).train(2, resume_from_checkpoint=f"{url}/checkpoint-1")
    make_engine(model_folder, tmp_path / "plain").train(2)
    assert metrics(tmp_path / "bucket" / "run") == metrics(tmp_path / "plain")
    assert resumed.total_iterations == 2
    with pytest.raises(ConfigError, match="needs checkpoint_dir, the URL of the run"):
        make_engine(model_folder, None).train(2, resume_from_checkpoint=f"{url}/checkpoint-1")
    with pytest.raises(OutputError, match="checkpoint-7: nothing is there"):
        make_engine(model_folder, url).train(2, resume_from_checkpoint=f"{url}/checkpoint-7")


def test_an_earlier_run_is_set_aside_there_and_what_is_not_of_a_run_stays(model_folder, tmp_path):
    there, url = tmp_path / "bucket" / "run", f"file://{tmp_path}/bucket/run"
    there.mkdir(parents=True)
    (there / "notes.txt").write_text("mine")
    make_engine(model_folder, url).train(1)
    first = metrics(there)
    make_engine(model_folder, url).train(2, save_every=1, save_total_limit=1)
    assert metrics(there / "earlier-1") == first
    assert (there / "notes.txt").read_text() == "mine"
    assert {path.name for path in there.glob("checkpoint-*")} == {"checkpoint-2"}


def test_the_trainer_goes_on_where_a_checkpoint_cannot_be_sent_and_sends_it_later(
    model_folder, tmp_path, monkeypatch, caplog
):
    there, url = tmp_path / "bucket" / "run", f"file://{tmp_path}/bucket/run"
    upload, failures = Mirror._upload, [OSError("no route to host")]

    def upload_later(self, name):
        if failures and name.startswith("checkpoint-1/"):
            raise failures.pop()
        upload(self, name)

    monkeypatch.setattr(Mirror, "_upload", upload_later)
    make_engine(model_folder, url).train(2, save_every=1)
    assert "cannot be written: OSError: no route to host" in caplog.text
    assert files(there) == files(copy_of(url))


def test_a_run_that_could_not_be_sent_at_its_end_says_where_it_is_and_is_sent_by_the_next(
    model_folder, tmp_path, monkeypatch
):
    there, url = tmp_path / "bucket" / "run", f"file://{tmp_path}/bucket/run"
    upload = Mirror._upload

    def never(self, name):
        raise OSError("no route to host")

    monkeypatch.setattr(Mirror, "_upload", never)
    with pytest.raises(OutputError) as caught:
        make_engine(model_folder, url).train(2)
    assert str(copy_of(url)) in str(caught.value)
    assert not files(there)

    monkeypatch.setattr(Mirror, "_upload", upload)
    make_engine(model_folder, url).train(3, resume_from_checkpoint=True)
    assert [row["iteration"] for row in metrics(there)] == [1, 2, 3]


def test_what_was_never_sent_is_kept_where_the_url_has_changed_elsewhere(tmp_path, caplog):
    there, mirror = tmp_path / "there", mirror_of(f"file://{tmp_path}/there")
    there.mkdir()
    (there / "a.txt").write_text("one")
    mirror.fetch()
    (mirror.path / "a.txt").write_text("changed here")
    (there / "a.txt").write_text("changed there")
    mirror.fetch()
    assert (mirror.path / "a.txt").read_text() == "changed there"
    aside = mirror.path.with_name(f"{mirror.path.name}-unsent-1")
    assert (aside / "a.txt").read_text() == "changed here"
    assert str(aside) in caplog.text


def test_what_somebody_deleted_from_the_copy_stays_at_the_url_and_is_fetched_again(tmp_path):
    there, mirror = tmp_path / "there", mirror_of(f"file://{tmp_path}/there")
    for name in ("a.txt", "b.txt"):
        there.mkdir(exist_ok=True)
        (there / name).write_text("one")
    mirror.fetch()
    for unsent in (False, True):
        (mirror.path / "a.txt").unlink()
        if unsent:
            (mirror.path / "c.txt").write_text("never sent")
        mirror.fetch()
        assert {"a.txt", "b.txt"} <= files(there)
        assert files(mirror.path) == files(there)
    assert files(there) == {"a.txt", "b.txt", "c.txt"}


def test_only_what_differs_is_copied(tmp_path, monkeypatch):
    mirror, sent = mirror_of(f"file://{tmp_path}/there"), []
    upload = Mirror._upload
    monkeypatch.setattr(Mirror, "_upload", lambda self, name: (sent.append(name), upload(self, name)))
    mirror.fetch()
    for name in ("a.txt", "b/c.txt", ".hidden", "b/.part"):
        (mirror.path / name).parent.mkdir(exist_ok=True)
        (mirror.path / name).write_text("one")
    mirror.send()
    assert sent == ["a.txt", "b/c.txt"]
    (mirror.path / "b" / "c.txt").write_text("two")
    mirror.send()
    mirror.send()
    assert sent == ["a.txt", "b/c.txt", "b/c.txt"]
    shutil.rmtree(mirror.path / "b")
    mirror.send()
    assert [path.name for path in (tmp_path / "there").rglob("*")] == ["a.txt"]

    downloaded = []
    download = Mirror._download
    monkeypatch.setattr(Mirror, "_download", lambda self, name, at: (downloaded.append(name), download(self, name, at)))
    mirror_of(f"file://{tmp_path}/there").fetch()
    (tmp_path / "there" / "new").mkdir()
    (tmp_path / "there" / "new" / "d.txt").write_text("x")
    mirror_of(f"file://{tmp_path}/there").fetch()
    assert downloaded == ["new/d.txt"]
    shutil.rmtree(tmp_path / "there" / "new")
    mirror_of(f"file://{tmp_path}/there").fetch()
    assert sorted(path.name for path in mirror.path.iterdir()) == [".hidden", "a.txt"]


def test_a_copy_for_reading_sends_nothing_and_keeps_a_report(tmp_path):
    there, url = tmp_path / "there", f"file://{tmp_path}/there"
    there.mkdir()
    (there / "a.txt").write_text("one")
    copy = fetched(url, only_reads=True)
    (copy / "report.html").write_text("page")
    (copy / "a.txt").write_text("changed by mistake")
    (there / "b.txt").write_text("two")
    assert fetched(url, only_reads=True) == copy != copy_of(url)
    assert {name: (copy / name).read_text() for name in ("a.txt", "b.txt", "report.html")} == {
        "a.txt": "one", "b.txt": "two", "report.html": "page",
    }  # fmt: skip
    assert files(there) == {"a.txt", "b.txt"}


class TwoHosts:
    """What a process of several on two machines sees of the others."""

    def __init__(self, hosts, rank):
        self.hosts, self.rank, self.calls = hosts, rank, 0

    def gather(self, message):
        self.calls += 1
        return [{"host": host} for host in self.hosts]


@pytest.mark.parametrize(
    ("hosts", "rank", "fetches"),
    [("ab", 1, True), ("ab", 0, False), ("aa", 1, False), ("abb", 2, False), ("aab", 2, True)],
)
def test_the_first_process_of_every_other_machine_fetches_the_run(tmp_path, hosts, rank, fetches):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_text("one")
    url, world = f"file://{tmp_path}/there", TwoHosts(hosts, rank)
    renew_copies(world, url, True)
    assert (copy_of(url) / "a.txt").exists() == fetches
    assert world.calls == 2  # all wait until the copies are there
    renew_copies(world, tmp_path / "run", None)
    assert world.calls == 2


def test_file_systems_of_fsspec_serve_too(tmp_path):
    mirror = mirror_of("memory://place/run")
    mirror.fetch()
    (mirror.path / "final").mkdir(parents=True)
    (mirror.path / "final" / "a.txt").write_text("one")
    mirror.send()
    shutil.rmtree(mirror.path)
    assert (fetched("memory://place/run") / "final" / "a.txt").read_text() == "one"


class StoreError(Exception):
    """What the library of a store raises, such as botocore's ClientError; it is no OSError."""


@pytest.mark.parametrize(
    ("method", "call", "what"),
    [
        ("find", Mirror.fetch, "read"), ("info", Mirror.fetch, "read"), ("_open", Mirror.send, "written"),
        ("_open", Mirror.require_writable, "written"), ("rm_file", Mirror.require_writable, "written"),
    ],
)  # fmt: skip
def test_an_error_of_a_stores_own_kind_is_one_error_too(method, call, what, monkeypatch):
    mirror = mirror_of("memory://place/broken")
    mirror.path.mkdir(parents=True)
    (mirror.path / "a.txt").write_text("one")

    def fails(*_, **__):
        raise StoreError("403: this key may not")

    monkeypatch.setattr(MemoryFileSystem, method, fails)
    with pytest.raises(OutputError, match=rf"memory://place/broken: cannot be {what}: .*403: this key may not"):
        call(mirror)


@pytest.mark.parametrize("name", ["../a", "b/../../a", ".a", "b/.c/d"])
def test_names_that_lead_out_or_are_hidden_are_not_of_the_run(name):
    assert not mirror_module._belongs(PurePosixPath(name))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://bucket/run?nosuch=3", r"s3://bucket/run: is no URL of a folder: .*Unexpected query parameter.*nosuch"),
        ("nowhere://bucket/run", "nowhere://bucket/run: is no URL of a folder: .*nowhere"),
        ("s3://", "names no folder there"),
        ("file://machine/run", "names a folder of another machine. A folder here is file:///folder"),
        (Path("s3://bucket/run"), "give a URL as text"),
        ("file:///runs/kind#1", r"kind: a folder's URL has no part after #\. Write %23"),
        ("https://", "is no URL of a folder|names no folder"),
    ],
)
def test_a_url_that_cannot_be_is_one_error_before_anything_is_loaded(place, message):
    with pytest.raises(OutputError, match=message):
        make_engine("no-such-model", place)


def test_a_place_that_cannot_be_written_is_an_error_before_the_training(model_folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    seen = Saved(tmp_path)
    with pytest.raises(OutputError, match=r"file/run: cannot be (read|written)"):
        make_engine(model_folder, f"file://{tmp_path}/file/run", seen).train(2, save_every=1)
    assert seen.told == []


@pytest.mark.parametrize("form", ["file://{}", "FILE://{}", "file://localhost{}"])
def test_a_folder_of_this_machine_has_any_name_in_a_url(tmp_path, form):
    mirror = mirror_of(form.format(tmp_path / "ü ñ%20x"))
    mirror.require_writable()
    assert (tmp_path / "ü ñ x").is_dir()


def test_a_secret_in_a_url_is_in_no_name():
    mirror = mirror_of("s3://AKID:plain9Secret@bucket/run?endpoint_override=127.0.0.1:9000&scheme=http")
    assert mirror.address == "s3://bucket/run"
    assert "plain9" not in str(mirror.path)


def test_a_model_is_saved_in_a_path_alone(model_folder, tmp_path):
    engine = make_engine(model_folder, tmp_path / "run")
    with pytest.raises(OutputError, match="this is a URL, and it takes a path"):
        engine.save_pretrained("s3://bucket/model")


def test_commands_read_a_run_at_a_url(model_folder, tmp_path):
    url = f"file://{tmp_path}/bucket/run"
    make_engine(model_folder, url).train(1)
    before = files(tmp_path / "bucket")
    shown = konic_here("inspect", url, "--iteration", "1")
    assert shown.returncode == 0
    assert konic_here("report", url).returncode == 0
    assert (copy_of_reading(url) / "report.html").is_file()
    assert files(tmp_path / "bucket") == before
    followed = konic_here("report", url, "--watch")
    assert followed.returncode == 2
    assert "not those at a URL" in followed.stderr
    missing = konic_here("report", f"file://{tmp_path}/bucket/none")
    assert missing.returncode != 0
    assert "nothing is there" in missing.stderr
    assert "Traceback" not in missing.stderr


def copy_of_reading(url):
    return remote.mirror_of(url, only_reads=True).path


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("gs://bucket/run", "gs://bucket/run?retry_limit_seconds=30"),
        ("gs://bucket/run?anonymous=true", "gs://bucket/run?anonymous=true&retry_limit_seconds=30"),
        ("gs://bucket/run?retry_limit_seconds=5", "gs://bucket/run?retry_limit_seconds=5"),
        ("s3://bucket/run", "s3://bucket/run"),
    ],
)
def test_google_cloud_storage_is_not_asked_for_a_quarter_of_an_hour(url, asked, monkeypatch):
    seen = []

    class Files:
        @staticmethod
        def from_uri(given):
            seen.append(given)
            raise OSError("nobody answers")

    monkeypatch.setattr(pyarrow.fs, "FileSystem", Files)
    with pytest.raises(OutputError, match="cannot be reached: OSError: nobody answers"):
        Mirror(url, Path("copies")).check()
    assert seen == [asked]


def test_errors_that_pyarrow_alone_has_are_one_error_too(tmp_path):
    mirror = Mirror(f"file://{tmp_path}/there", tmp_path / "copies")
    with (
        pytest.raises(OutputError, match="cannot be read: ArrowException: no credentials"),
        mirror._naming_failures("cannot be read"),
    ):
        raise pyarrow.ArrowException("no credentials")
