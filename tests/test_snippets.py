"""Every Python and console snippet of the documents is executed, or says above its fence why not.

The snippets of a page run in order, in one namespace and one folder. What stands in for what a reader has:

- a tiny random model for "smollm2-135m" and "gpt2", responses of at most 4 tokens, and at most 2 iterations;
- the files, names and model folders of `make_folder` and `make_names`, which pages speak of without making them.
"""

import functools
import re
import shlex
from pathlib import Path

import pytest

import konic.finetuning
from command import konic_here
from conftest import PROMPTS
from konic.cli.scripts import load_agent
from konic.finetuning import DatasetConfig, GenerationConfig, KonicFinetuningAgent, KonicFinetuningEngine, LoraConfig
from test_examples import tiny_reward_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>[^>]+?) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
RUN = ("python", "console")
NOT_RUN = 24
"""How many snippets say why they are not run: change it with the documents."""


def snippets(page):
    return [found.groupdict() for found in FENCE.finditer(page.read_text())]


def test_every_snippet_is_run_or_says_why_not(capsys):
    found = [(page.name, snippet) for page in PAGES for snippet in snippets(page)]
    skipped = [(name, snippet["why"]) for name, snippet in found if snippet["why"]]
    executed = [name for name, snippet in found if snippet["kind"] in RUN and not snippet["why"]]
    with capsys.disabled():
        print(f"\nsnippets: {len(executed)} executed, {len(skipped)} not run {skipped}")
    assert len(skipped) == NOT_RUN
    assert len(executed) > 20
    for name, snippet in found:
        assert snippet["kind"] in (*RUN, "") or snippet["why"], f"{name}: {snippet['text']}"
        is_command = re.match(r"(\$ |konic |make |pip |python )", snippet["text"])
        assert snippet["kind"] or not is_command, f"{name}: commands stand in a console fence: {snippet['text']}"


def make_folder(folder, model):
    """The files that pages name."""
    (folder / "prompts.csv").write_text("text\n" + "\n".join([*PROMPTS, *"abcdefgh"]) + "\n")
    (folder / "my_script.py").write_text((ROOT / "examples/first_reward.py").read_text())
    tiny_reward_model(folder / "reward-model")
    agent = load_agent(folder / "my_script.py").with_settings({"dataset_config": {"held_out": 2}})
    KonicFinetuningEngine.from_agent(agent, checkpoint_dir=folder / "runs" / "kind").train(1)


def make_names(folder, model):
    """The names that pages use without defining them."""
    exec("from konic.finetuning import *", names := {"__name__": "__main__"})

    async def ask_a_judge(prompt, response):
        return 0.0

    def trl_reward(prompts, completions):
        return [0.0 for _ in completions]

    def plain_reward(prompt, response):
        return 0.0

    class Rewards(names["KonicLLMRewardComposer"]):
        @konic.finetuning.llm_reward
        def positivity(self, prompt: str, response: str) -> float:
            return float(len(response))

    names["Rewards"] = Rewards
    agent = KonicFinetuningAgent(
        model, Rewards(), lora_config=LoraConfig(r=2), dataset_config=DatasetConfig(prompts=list(PROMPTS), held_out=2)
    )
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=folder / "given")
    return names | {
        "agent": agent, "engine": engine, "ask_a_judge": ask_a_judge, "trl_reward": trl_reward,
        "plain_reward": plain_reward,
    }  # fmt: skip


@pytest.fixture
def _tiny(model_folders, monkeypatch):
    make, train = KonicFinetuningAgent.__init__, KonicFinetuningEngine.train

    @functools.wraps(make)
    def make_tiny(self, base_model, *parts, **named):
        if base_model in ("smollm2-135m", "gpt2"):
            base_model = model_folders["gpt2" if base_model == "gpt2" else "llama"]
            named["model_kwargs"] = None
        given = named.get("generation_config")
        named["generation_config"] = GenerationConfig.from_value(given).with_fields(
            {"max_new_tokens": 4, "max_prompt_length": 64}
        )
        make(self, base_model, *parts, **named)

    @functools.wraps(train)
    def train_briefly(self, max_iterations=100, *others, **named):
        return train(self, 2 if named.get("resume_from_checkpoint") else min(max_iterations, 1), *others, **named)

    monkeypatch.setattr(KonicFinetuningAgent, "__init__", make_tiny)
    monkeypatch.setattr(KonicFinetuningEngine, "train", train_briefly)


def run_commands(text):
    for line in text.splitlines():
        if line.startswith("$ "):
            program, *arguments = shlex.split(line[2:], comments=True)
            assert program == "konic", line
            done = konic_here(*arguments)
            assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("page", [page for page in PAGES if any(s["kind"] in RUN for s in snippets(page))], ids=str)
def test_the_snippets_of_a_page_run_in_order(page, model_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    make_folder(tmp_path, model_folders["llama"])
    names = make_names(tmp_path, model_folders["llama"])
    for snippet in snippets(page):
        if snippet["kind"] == "console" and not snippet["why"]:
            run_commands(snippet["text"])
        elif snippet["kind"] == "python" and not snippet["why"]:
            exec(compile(snippet["text"], str(page), "exec"), names)
