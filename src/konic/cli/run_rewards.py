"""--rewards SCRIPT_OR_YAML, --recorded-rewards -> the composer that scores what saved weights say."""

from collections.abc import Callable
from pathlib import Path

from konic.cli.jobs import load_rewards as load_rewards_of_job
from konic.finetuning import ConfigError, KonicLLMRewardComposer
from konic.report.run import Run
from konic.saved.rewards import difference_from_run, recorded_script


def load_rewards(
    run: Run, file: Path | None, uses_recorded: bool, say: Callable[[str], None]
) -> KonicLLMRewardComposer | None:
    """Return the composer of a file, or of the script that a run's record names; None if neither is asked for.

    Raises:
        ConfigError: Both are asked for, or the file cannot be loaded.
    """
    if file is not None and uses_recorded:
        raise ConfigError("Give --rewards or --recorded-rewards, not both.")
    if uses_recorded:
        file = recorded_script(run)
        say(f"Importing {file}, which the run names ...")
    if file is None:
        return None
    composer, _ = load_rewards_of_job(file)
    difference = difference_from_run(composer, run)
    if difference:
        say(difference)
    return composer
