"""What `make setup` installs is pinned, and all of it but torch is checked by hash."""

import re
import tomllib
from pathlib import Path

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
