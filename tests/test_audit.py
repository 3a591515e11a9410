"""`make audit`: which versions an advisory in OSV's format is about, and that no package goes missing."""

import io
import json
import sys
from pathlib import Path

import pytest
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import audit


def advisory(*events, **more):
    package = {"ecosystem": "PyPI", "name": "Some_Package"}
    return {"affected": [{"package": package, "ranges": [{"type": "ECOSYSTEM", "events": list(events)}]} | more]}


@pytest.mark.parametrize(
    ("events", "affected"),
    [
        ([{"introduced": "0"}, {"fixed": "2.0"}], {"1.9", "2.0rc1"}),
        ([{"introduced": "1.9"}], {"1.9", "2.0rc1", "2.0", "2.5", "3.1"}),
        ([{"introduced": "0"}, {"last_affected": "2.0"}], {"1.9", "2.0rc1", "2.0"}),
        ([{"introduced": "0"}, {"fixed": "1.9"}, {"introduced": "2.5"}, {"fixed": "3"}], {"2.5"}),
    ],
)
def test_an_advisory_is_about_the_versions_between_its_events(events, affected):
    versions = ("1.9", "2.0rc1", "2.0", "2.5", "3.1")
    found = {text for text in versions if audit.is_affected(advisory(*events), "some-package", Version(text))}
    assert found == affected


def test_listed_versions_count_and_withdrawn_advisories_and_other_packages_do_not():
    listed = advisory(versions=["4.2"])
    assert audit.is_affected(listed, "some-package", Version("4.2"))
    assert not audit.is_affected(listed, "some-other", Version("4.2"))
    assert not audit.is_affected(listed | {"withdrawn": "2026-01-01T00:00:00Z"}, "some-package", Version("4.2"))


def test_every_package_stands_in_the_table_and_one_without_an_answer_ends_it():
    packages = {"a": "1", "b": "2"}
    text, num_bad = audit.table(packages, {"a": [], "b": ["PYSEC-1"]}, "a test")
    assert num_bad == 1
    assert "| a | 1 | - |" in text
    assert "| b | 2 | PYSEC-1 |" in text
    with pytest.raises(SystemExit, match="No answer about b"):
        audit.table(packages, {"a": []}, "a test")


def test_a_project_page_answers_for_the_newest_release_alone(monkeypatch, capsys):
    pages = {
        "a": {"info": {"version": "1"}, "vulnerabilities": []},
        "b": {"info": {"version": "2"}, "vulnerabilities": [{"id": "PYSEC-1", "withdrawn": None}]},
        "c": {"info": {"version": "9"}, "vulnerabilities": []},
        "d": {"info": {"version": "4"}, "vulnerabilities": [{"id": "PYSEC-2", "withdrawn": "2026-01-01"}]},
    }

    def answer(address, timeout):
        name = address.split("/")[-2]
        if name not in pages:
            raise OSError("no such page")
        return io.BytesIO(json.dumps(pages[name]).encode())

    monkeypatch.setattr(audit.urllib.request, "urlopen", answer)
    packages = {"a": "1", "b": "2", "c": "3", "d": "4", "e": "5"}
    assert audit.ask_project_pages(packages) == {"a": [], "b": ["PYSEC-1"], "d": []}
    assert "e: PyPI did not answer: no such page" in capsys.readouterr().err
