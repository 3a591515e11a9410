import os
import sys
import textwrap

import pytest

import warm
from konic.finetuning.errors import OutputError
from konic.finetuning.system.files import as_path


@pytest.mark.parametrize("value", ["a\udce9", "a\udce9/x", "~/a\ud800"])
def test_a_path_that_is_not_text_is_refused(value):
    with pytest.raises(OutputError, match=r"^checkpoint_dir='.*a\\ud.* is not valid UTF-8, .* Rename it") as error:
        as_path(value, "checkpoint_dir", OutputError)
    assert str(error.value).encode()


def test_a_folder_that_is_not_text_is_refused_for_what_is_in_it(tmp_path, monkeypatch):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    with pytest.raises(OutputError, match=r"checkpoint_dir='run'.* is not valid UTF-8"):
        as_path("run", "checkpoint_dir", OutputError)


IN_A_FOLDER_THAT_IS_GONE = """
    import logging, os, sys
    from konic.finetuning import *
    from konic.finetuning.system.files import as_path

    class Rewards(KonicLLMRewardComposer):
        @llm_reward
        def deletes(self, prompt, response):
            if os.path.isdir(FOLDER):
                os.rmdir(FOLDER)
            return 1.0

    def engine(checkpoint_dir):
        agent = KonicFinetuningAgent(
            MODEL, Rewards(), dataset_config=DatasetConfig(prompts=["ab"]),
            training_config=TrainingConfig(batch_size=2, ppo_epochs=1),
            generation_config=GenerationConfig(max_prompt_length=8, max_new_tokens=2),
        )
        return KonicFinetuningEngine.from_agent(agent, checkpoint_dir=checkpoint_dir, device="cpu", callback=[])

    MODEL, OTHER = sys.argv[1:]
    FOLDER = os.getcwd()
    logging.basicConfig(stream=sys.stdout, format="LOG %(message)s")
    print(engine(OTHER).train(1).total_iterations)
    calls = (
        lambda: engine("x"), lambda: engine(None).train(1), lambda: DatasetConfig(name="a.csv"),
        lambda: as_path("x", "output", OutputError),
    )
    for call in calls:
        try:
            call()
        except KonicError as error:
            print(type(error).__name__, error)
"""


def test_a_current_folder_that_is_gone_is_said_and_a_run_elsewhere_goes_on(model_folders, tmp_path):
    (tmp_path / "gone").mkdir()
    code = textwrap.dedent(IN_A_FOLDER_THAT_IS_GONE)
    child = warm.run(
        [sys.executable, "-c", code, model_folders["llama"], str(tmp_path / "run")],
        cwd=tmp_path / "gone", capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    gone = [f"LOG The current folder, {tmp_path / 'gone'}, no longer exists: change to one that does."]
    assert [line for line in lines if "LOG The current" in line] == gone
    assert not [line for line in lines if "working directory" in line]
    assert "1" in lines
    ends = "the current folder no longer exists: change to one that does."
    assert [line.split()[0] for line in lines if line.endswith(ends) and "LOG" not in line] == [
        "OutputError", "OutputError", "ConfigError", "OutputError",
    ]  # fmt: skip
