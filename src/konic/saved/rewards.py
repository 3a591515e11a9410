"""A run's record -> the script of its rewards, if it may be imported: the record may be a stranger's."""

import hashlib
import os
from pathlib import Path
from typing import NoReturn

from konic.finetuning import ConfigError, KonicLLMRewardComposer
from konic.finetuning.system.places import read_regular
from konic.report.run import Run


def recorded_script(run: Run) -> Path:
    """Return the script that the run's record names.

    A run folder from elsewhere may name any file and its hash. So the file must be the caller's own and lie outside of
    the folder, and a command imports it only where its user asks for that.

    Raises:
        ConfigError: The record names none, or the file is not there, has changed, or does not qualify.
    """
    record = run.record.get("rewards")
    named, known = (record.get("file"), record.get("sha256")) if isinstance(record, dict) else (None, None)
    if not isinstance(named, str) or not isinstance(known, str):
        raise ConfigError(f"{run.path}: its record names no script of rewards. Give --rewards SCRIPT.")
    path, advice = Path(named), "Give --rewards SCRIPT."
    where = f"{run.path} names the script {named!r}"
    if not path.is_absolute():
        raise ConfigError(f"{where}, which is not a whole path. {advice}")
    try:
        actual, owner = path.resolve(strict=True), path.stat().st_uid
        content = read_regular(actual)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{where}, which cannot be read: {reason}. {advice}") from None
    if actual.is_relative_to(run.path.resolve()):
        raise ConfigError(f"{where}, which lies in the run's own folder: whoever made the folder wrote it. {advice}")
    if hasattr(os, "getuid") and owner != os.getuid():
        raise ConfigError(f"{where}, which is not your file. {advice}")
    if hashlib.sha256(content).hexdigest() != known:
        raise ConfigError(f"{where}, which has changed since the run. {advice}")
    return path


def require_rewards_given(run: Run) -> NoReturn:
    """Raise the ConfigError that names what the user may give for rewards."""
    try:
        also = f", or --recorded-rewards, which imports {recorded_script(run)} (unchanged since the run)"
    except ConfigError:
        also = ""
    raise ConfigError(f"Give the rewards: --rewards SCRIPT{also}.")


def difference_from_run(composer: KonicLLMRewardComposer, run: Run) -> str | None:
    """Return a sentence that says in what the rewards are not those of the run; None if they are the same."""
    own = composer.settings()
    words = {
        "rewards": "names", "reward_weights": "weights", "reducer": "reducer", "rewards_sha256": "code",
    }  # fmt: skip
    other = [word for name, word in words.items() if name in run.settings and run.settings[name] != own[name]]
    return f"The rewards are not those of the run: other {', '.join(other)}." if other else None
