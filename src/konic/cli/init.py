"""`konic init [FOLDER]`: a script, a YAML file and rewards to start from, which run as they are."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from konic.cli.paths import read_name, read_path
from konic.output import write_line

_REWARDS = '''\
"""The rewards: methods that score a response. Try them without training: konic rewards {job}"""

from konic.finetuning import KonicLLMRewardComposer, llm_reward

CHEERFUL_WORDS = ("great", "love", "wonderful", "fun")


class Cheerful(KonicLLMRewardComposer):
    """Each method marked with @llm_reward is a reward. What is trained is their sum, by weights."""

    @llm_reward
    def brief(self, prompt: str, response: str) -> float:
        """From 1 for nothing down to 0 at 300 characters."""
        return max(0.0, 1.0 - len(response) / 300)

    @llm_reward
    def cheerful(self, prompt: str, response: str) -> float:
        """A half for each cheerful word, at most 1."""
        return min(1.0, sum(word in response.lower() for word in CHEERFUL_WORDS) / 2)
'''

_SCRIPT = '''\
"""The same job as {yaml}, in Python: konic train {script} --max-iterations 20"""

from {rewards} import Cheerful

from konic.finetuning import DatasetConfig, GenerationConfig, KonicFinetuningAgent, LoraConfig, TrainingConfig


def build_agent():
    return KonicFinetuningAgent(
        base_model={model!r},  # a Hub id, a folder, a .gguf file, or "smollm2-135m", which a package carries
        reward_composer=Cheerful(reward_weights={{"cheerful": 2.0}}),
        lora_config=LoraConfig(r=8, lora_alpha=16),  # None trains every weight
        dataset_config=DatasetConfig({dataset}),
        training_config=TrainingConfig(
            algorithm="ppo",  # or grpo, rloo, dapo, ...
            batch_size=8,  # responses per iteration; more of them are less noisy
        ),
        generation_config=GenerationConfig(max_new_tokens=32, max_prompt_length=64),
    )
'''

_YAML = """\
# konic train {yaml}
# Settings and their defaults: docs/configuration.md of konic. Paths are relative to the folder of this file.

base_model: {model}  # a Hub id, a folder, a .gguf file, or "smollm2-135m", which a package carries

reward_composer:
  path: {rewards}.py:Cheerful
  arguments:
    reward_weights: {{cheerful: 2.0}}

lora_config:  # without it, every weight is trained
  r: 8
  lora_alpha: 16

dataset_config:
{dataset}
training_config:
  algorithm: ppo  # or grpo, rloo, dapo, ...
  batch_size: 8  # responses per iteration; more of them are less noisy

generation_config:
  max_new_tokens: 32
  max_prompt_length: 64

train:
  max_iterations: 20
  # output: runs/cheerful  # without it, a new folder under runs/, in the folder that you are in
"""


def init(
    folder: Annotated[
        Path, typer.Argument(help="The folder to write into.", parser=read_path, metavar="[FOLDER]")
    ] = Path(),
    model: Annotated[
        str,
        typer.Option(
            help="The base model: a Hub id, a folder, a .gguf file or a packaged model.",
            parser=read_name,
            metavar="<str>",
        ),
    ] = "smollm2-135m",
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A file of prompts, or a dataset of the Hub. Default: the shipped prompts.",
            parser=read_name,
            metavar="<str>",
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="With --dataset: the column of the prompts. Default: prompt.")
    ] = None,
) -> None:
    """Write a job to start from: rewards, a YAML file and the same as a script. They run as they are.

    No file is overwritten.

    Example: konic init my-job
    """
    if column is not None and dataset is None:
        raise typer.BadParameter("--column is of the prompts of --dataset: give --dataset too.")
    from konic.finetuning.errors import OutputError

    files = _files(_whole(model), dataset and _whole(dataset), "prompt" if column is None else column)
    present = [str(folder / name) for name in files if (folder / name).exists() or (folder / name).is_symlink()]
    if present:
        raise OutputError(f"{', '.join(present)}: it exists, and nothing is overwritten. Name another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}).") from None
    for name, what in zip(files, ("the rewards", "the job", "the same job in Python"), strict=True):
        write_line(f"{folder / name}: {what}", sys.stdout)
    job = shlex.quote(str(folder / "job.yaml"))
    write_line(f"Next: konic rewards {job}, then konic train {job}", sys.stdout)


def _files(model: str, dataset: str | None, column: str) -> dict[str, str]:
    """Return the texts of the files by their names."""
    names = {"job": "job.yaml", "yaml": "job.yaml", "script": "job.py", "rewards": "my_rewards"}
    if dataset is None:
        in_python, comment = "held_out=32", "prompts kept aside, to compare before and after; konic ships the prompts"
        in_yaml = f"  held_out: 32  # {comment}\n"
    else:
        in_python = f"name={dataset!r}, prompt_column={column!r}"
        in_yaml = f"  name: {_quoted(dataset)}\n  prompt_column: {_quoted(column)}\n"
    return {
        "my_rewards.py": _REWARDS.format(**names),
        "job.yaml": _YAML.format(**names, model=_quoted(model), dataset=in_yaml),
        "job.py": _SCRIPT.format(**names, model=model, dataset=in_python),
    }


def _whole(name: str) -> str:
    """Return a name; that of a file or folder here as its whole path, so that it is found from everywhere."""
    return str(Path(name).expanduser().absolute()) if Path(name).expanduser().exists() else name


def _quoted(text: str) -> str:
    """Return a text as YAML has it, in quotes: JSON is YAML."""
    return json.dumps(text)
