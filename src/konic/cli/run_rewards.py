"""--rewards SCRIPT, --recorded-rewards -> the composer that scores what saved weights say."""

from collections.abc import Callable
from pathlib import Path

from konic.cli.scripts import load_composer
from konic.finetuning import ConfigError, KonicLLMRewardComposer
from konic.report.run import Run
from konic.saved.rewards import difference_from_run, recorded_script


def load_rewards(
    run: Run, script: Path | None, uses_recorded: bool, say: Callable[[str], None]
) -> KonicLLMRewardComposer | None:
    """Return the composer of a script, or of the script that a run's record names; None if neither is asked for.

    Raises:
        ConfigError: Both are asked for, or the script cannot be imported.
    """
    if script is not None and uses_recorded:
        raise ConfigError("Give --rewards or --recorded-rewards, not both.")
    if uses_recorded:
        script = recorded_script(run)
        say(f"Importing {script}, which the run names ...")
    if script is None:
        return None
    composer = load_composer(script)
    difference = difference_from_run(composer, run)
    if difference:
        say(difference)
    return composer
