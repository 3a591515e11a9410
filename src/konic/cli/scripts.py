"""A user's script -> the agent or composer that it defines. The script is imported, not run as `__main__`."""

import difflib
import importlib.util
import sys
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from konic.cli.paths import require_file
from konic.finetuning import ConfigError, DatasetConfig, KonicError, KonicFinetuningAgent, KonicLLMRewardComposer
from konic.finetuning.agent import read_agent
from konic.finetuning.system.signals import raising_on_signals
from konic.runtime.agent import forget_registered_agent, get_registered_agent
from konic.text import indented


def load_agent(script: Path) -> KonicFinetuningAgent:
    """Load the agent of a script: registered, or its module-level `agent`, or what its `build_agent()` returns.

    Raises:
        ConfigError: The file does not exist, defines no agent, or raised an error while it was imported.
    """
    require_file(script)
    return _find_agent(script, import_script(script))


def _find_agent(script: Path, module: Any) -> KonicFinetuningAgent:
    agent: Any = get_registered_agent()[0] or getattr(module, "agent", None)
    if agent is None:
        build = getattr(module, "build_agent", None)
        if not callable(build):
            names = [name for name in vars(module) if not name.startswith("_")]
            near = difflib.get_close_matches("agent", names, n=1) or difflib.get_close_matches(
                "build_agent", names, n=1
            )
            hint = f" It defines {near[0]!r}: rename it." if near else ""
            raise ConfigError(f"{script}: defines neither a module-level `agent` nor a function `build_agent()`.{hint}")
        agent = run_user_code(script, build)
    if not hasattr(agent, "get_base_model"):
        raise ConfigError(f"{script}: its agent is a {type(agent).__name__}, not a KonicFinetuningAgent.")
    return agent if isinstance(agent, KonicFinetuningAgent) else read_agent(agent)


def load_composer(script: Path) -> KonicLLMRewardComposer:
    """Load a script's composer: its agent's, else its module-level one, else an instance of its only composer class."""
    return load_composer_and_dataset(script)[0]


def load_composer_and_dataset(script: Path) -> tuple[KonicLLMRewardComposer, DatasetConfig]:
    """Load a script's composer, and the dataset config of its agent, which says what a prompt is."""
    require_file(script)
    module = import_script(script)
    if get_registered_agent()[0] or hasattr(module, "agent") or hasattr(module, "build_agent"):
        agent = _find_agent(script, module)
        return agent.get_reward_composer(), agent.get_dataset_config()
    own = {id(value): value for value in vars(module).values()}.values()
    found = [value for value in own if isinstance(value, KonicLLMRewardComposer)]
    kinds = [kind for kind in own if isinstance(kind, type) and kind.__module__ == module.__name__]
    if not found:
        found = [run_user_code(script, kind) for kind in kinds if issubclass(kind, KonicLLMRewardComposer)]
    if len(found) != 1:
        raise ConfigError(
            f"{script}: defines {len(found) or 'no'} composers and no agent. Define one composer, or an `agent` that "
            "has the composer to try."
        )
    KonicLLMRewardComposer.check(found[0])
    return found[0], DatasetConfig()


def import_script(script: Path) -> Any:
    """Import a script, and return it as a module."""
    package = _package_of(script)
    if package:
        sys.path.insert(0, str(script.absolute().parents[len(package)]))
        return run_user_code(script, importlib.import_module, ".".join([*package, script.stem]))
    name = (
        script.stem if script.stem.isidentifier() and script.stem not in sys.modules else f"konic_script_{script.stem}"
    )
    if script.suffix != ".py":
        raise ConfigError(f"{script}: is not a Python file.")
    spec = importlib.util.spec_from_loader(name, _FromSource(name, str(script.absolute())))
    assert spec is not None and spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    forget_registered_agent()
    sys.path.insert(0, str(script.absolute().parent))
    run_user_code(script, spec.loader.exec_module, module)
    return module


class _FromSource(SourceFileLoader):
    """Runs what the file says. A compiled copy beside it may say something else, and nobody reads it."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the code, compiled again."""
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def _package_of(script: Path) -> list[str]:
    """Return the names of the packages that a script is in, the outermost first; relative imports need them."""
    names: list[str] = []
    folder = script.absolute().parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        names.insert(0, folder.name)
        folder = folder.parent
    return names if script.stem.isidentifier() else []


def run_user_code(script: Path, function: Any, *values: Any) -> Any:
    """Call the user's code; an error becomes a ConfigError that shows the user's part of the traceback."""
    try:
        with raising_on_signals():
            return function(*values)
    except KonicError:
        raise
    except SystemExit:
        raise ConfigError(f"{script}: called sys.exit() while it was loaded; it must only define its agent.") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
        lines = "".join(traceback.format_list(own) + traceback.format_exception_only(error)).rstrip().split("\n")
        raise ConfigError(f"{script}: raised {type(error).__name__} while it was loaded:", *indented(lines)) from None
