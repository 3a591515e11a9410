"""Installed packages -> those with a known vulnerability, and a table in which every package stands.

python benchmarks/audit.py OUTPUT PIP_AUDIT            asks PyPI, with pip-audit installed in the folder PIP_AUDIT
python benchmarks/audit.py OUTPUT --database FOLDER    where pip-audit gets no answer: reads a checkout of
                                                       github.com/pypa/advisory-database, and asks PyPI's page of each
                                                       project, which speaks of its newest release alone
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import distributions
from pathlib import Path

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pip._internal.models.index import PyPI

OURS = "konic"
"""The only package that is left out: it is this checkout."""


def installed():
    """Return {name: version} of every package of this environment but konic, without local parts such as +cpu."""
    found = {canonicalize_name(package.metadata["Name"]): package.version for package in distributions()}
    return {name: version.partition("+")[0] for name, version in sorted(found.items()) if name != OURS}


def ask_pypi(packages, pip_audit):
    """Return {name: vulnerabilities} by pip-audit, and what was asked. A package that PyPI does not know ends it."""
    with tempfile.TemporaryDirectory() as folder:
        listed, report = Path(folder, "installed.txt"), Path(folder, "report.json")
        listed.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
        command = [sys.executable, "-m", "pip_audit", "--strict", "--no-deps", "--disable-pip", "-r", str(listed)]
        environment = os.environ | {"PYTHONPATH": str(pip_audit)}
        command += ["--format", "json", "--output", str(report), "--progress-spinner", "off"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not report.exists():
            sys.exit(f"pip-audit could not ask PyPI, so nothing was audited:\n{done.stderr}")
        rows = json.loads(report.read_text())["dependencies"]
    return {row["name"]: [found["id"] for found in row["vulns"]] for row in rows}, "PyPI's advisories, by pip-audit"


def read_database(packages, database):
    """Return {name: vulnerabilities} by the files of the advisory database, and the state of its checkout."""
    folders = {canonicalize_name(folder.name): folder for folder in (database / "vulns").iterdir()}
    found = {}
    for name, version in packages.items():
        files = sorted(folders[name].glob("*.yaml")) if name in folders else []
        advisories = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
        found[name] = [advisory["id"] for advisory in advisories if is_affected(advisory, name, Version(version))]
    command = ["git", "-C", str(database), "log", "-1", "--format=%h of %cs"]
    state = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found, f"github.com/pypa/advisory-database, commit {state}; what came later is not in it"


def ask_project_pages(packages):
    """Return {name: vulnerabilities} of the packages that are installed at their newest release."""
    found = {}
    for name, version in packages.items():
        try:
            with urllib.request.urlopen(f"{PyPI.pypi_url}/{name}/json", timeout=30) as answer:
                page = json.load(answer)
        except OSError as error:
            print(f"{name}: PyPI did not answer: {error}", file=sys.stderr)
            continue
        if page["info"]["version"] == version:
            found[name] = [each["id"] for each in page["vulnerabilities"] if not each["withdrawn"]]
    return found


def is_affected(advisory, name, version):
    """True if an advisory in OSV's format (https://ossf.github.io/osv-schema) is about this version."""
    if advisory.get("withdrawn"):
        return False
    for part in advisory["affected"]:
        if canonicalize_name(part["package"]["name"]) != name:
            continue
        ranges = [entry["events"] for entry in part.get("ranges", ()) if entry["type"] == "ECOSYSTEM"]
        if str(version) in part.get("versions", ()) or any(_is_within(events, version) for events in ranges):
            return True
    return False


def _is_within(events, version):
    """True if the last event at or before the version leaves it affected."""
    is_in = False
    for event in events:
        ((kind, text),) = event.items()
        try:
            bound = Version(text)
        except InvalidVersion:
            continue  # a commit; the versions are listed then
        if kind == "introduced" and version >= bound:
            is_in = True
        elif (kind == "fixed" and version >= bound) or (kind == "last_affected" and version > bound):
            is_in = False
    return is_in


def table(packages, found, source):
    """Return the text of the result; a package without an answer is an error."""
    missing = packages.keys() - found.keys()
    if missing:
        sys.exit(f"No answer about {', '.join(sorted(missing))}, so nothing was audited.")
    num_bad = sum(bool(found[name]) for name in packages)
    lines = [
        "# Known vulnerabilities",
        "",
        f"`make audit`, {time.strftime('%d %B %Y')}: {num_bad} of {len(packages)} packages have one. Source: {source}. "
        f"None was left out but {OURS} itself.",
        "",
        "| package | version | advisories |",
        "|---|---|---|",
        *(f"| {name} | {version} | {', '.join(found[name]) or '-'} |" for name, version in packages.items()),
    ]
    return "\n".join(lines) + "\n", num_bad


def main():
    """Write the table; the exit code is 1 if a package has a known vulnerability."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("pip_audit", type=Path, nargs="?")
    parser.add_argument("--database", type=Path)
    options = parser.parse_args()
    packages = installed()
    if options.database:
        found, source = read_database(packages, options.database)
        newest = ask_project_pages(packages)
        found = {name: sorted({*found[name], *newest.get(name, ())}) for name in packages}
        source += f"; and PyPI, of this day, about the {len(newest)} packages that are at their newest release. About "
        source += f"{', '.join(sorted(packages.keys() - newest.keys())) or 'no package'} it said nothing"
    else:
        found, source = ask_pypi(packages, options.pip_audit)
    text, num_bad = table(packages, found, source)
    options.output.write_text(text)
    print(f"{num_bad} of {len(packages)} packages have a known vulnerability: {options.output}")
    sys.exit(num_bad > 0)


if __name__ == "__main__":
    main()
