"""What `make setup` installs is pinned, and all of it but torch is checked by hash."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pins(file):
    return re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / file).read_text(), re.MULTILINE)


def normalised(found):
    return {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in found}


def test_every_pin_but_torchs_is_locked_with_its_hashes():
    locked = pins("requirements.lock")
    assert normalised(locked) == {pin for pin in normalised(pins("constraints.txt")) if pin[0] != "torch"}
    blocks = re.split(r"^(?=\w)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked)
    for block in blocks:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}$", block, re.MULTILINE), block


def test_the_build_uses_what_was_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["build-system"]["requires"]) <= {
        f"{name}=={version}" for name, version in pins("requirements.lock")
    }


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line).group()).lower() for line in wanted}
    assert names <= {name for name, _ in normalised(pins("constraints.txt"))}


def test_set_up_asks_pip_for_hashes_and_builds_without_downloads():
    makefile = (ROOT / "Makefile").read_text()
    assert "--require-hashes --no-deps -r requirements.lock" in makefile
    assert "--no-build-isolation" in makefile


@pytest.mark.parametrize(
    ("lock", "names"),
    [
        ("bitsandbytes.lock", ["bitsandbytes"]),
        ("browser.lock", ["greenlet", "playwright"]),
        ("ray.lock", ["msgpack", "protobuf", "ray", "tensorboardx"]),
    ],
)
def test_what_ci_adds_is_pinned_with_hashes_and_ends_in_time(lock, names):
    assert [name for name, _ in pins(f".ci/{lock}")] == names
    blocks = re.split(r"^(?=\w)", (ROOT / ".ci" / lock).read_text(), flags=re.MULTILINE)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}$", block, re.MULTILINE) for block in blocks)
    script = (ROOT / ".ci/run").read_text()
    assert f"--require-hashes --no-deps --only-binary :all: -r .ci/{lock}" in script
    assert script.endswith("make setup\ninstall_browser\ninstall_ray\ninstall_bitsandbytes\nmake check\nmake test\n")


@pytest.mark.skipif(shutil.which("timeout") is None or not Path("/bin/bash").exists(), reason="needs bash and timeout")
def test_ci_checks_and_tests_also_where_no_browser_can_be_installed(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dirname", "timeout"):
        (tools / name).symlink_to(shutil.which(name))
    for name, line in {"id": "echo 0", "make": 'echo "make $1"', "apt-get": "exit 100"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    command = ["/bin/bash", str(tmp_path / ".ci" / "run")]
    done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60)
    setup, word, ray, bits, *rest = done.stdout.splitlines()
    assert (setup, rest, done.returncode, done.stderr) == ("make setup", ["make check", "make test"], 0, "")
    assert word.startswith("Skipping the browser test: Chromium is missing")
    assert ray == "Skipping the tests on Ray: pip cannot install it here."
    assert bits == "Skipping the tests of quantised models: pip cannot install bitsandbytes here."
