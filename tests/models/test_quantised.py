"""A base in 4 or 8 bits, by bitsandbytes. peft imports it wherever it is installed, so it has a folder of its own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "bitsandbytes"
"""Where .ci/run installs it."""
IS_INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(not IS_INSTALLED and not FOLDER.is_dir(), reason="bitsandbytes is not installed")
def test_the_cases_of_quantised_models(tmp_path):
    cases = Path(__file__).parent.parent / "quantised_cases.py"
    paths = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--basetemp", str(tmp_path / "t"), cases]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout
    assert re.search(r"\[100%\]", done.stdout)
    assert "s" not in "".join(re.findall(r"^([.sFE]+) ", done.stdout, re.MULTILINE)), "a case was skipped"
