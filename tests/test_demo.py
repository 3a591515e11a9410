"""The demo on a tiny model: what it prints at the end."""

from unittest import mock

import konic.demo
from command import konic_here
from konic.finetuning import DatasetConfig, GenerationConfig


def test_the_quick_demo_shows_every_step_and_what_it_is_too_short_to_show(model_folders, tmp_path):
    build = konic.demo.build_agent

    def tiny(minutes, held_out):
        changes = {
            "base_model": model_folders["llama"],
            "generation_config": GenerationConfig(max_new_tokens=2, max_prompt_length=16),
            "dataset_config": DatasetConfig(held_out=held_out),
        }
        return konic.demo.KonicFinetuningAgent(
            reward_composer=build().get_reward_composer(), lora_config=build().get_lora_config(), **changes
        )

    with mock.patch("konic.demo.build_agent", tiny):
        done = konic_here("demo", "--quick", "--max-iterations", 2, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "Before and after on 16 held-out prompts" in done.stdout
    assert f"The page of this run: {tmp_path / 'run' / 'report.html'}" in done.stdout
    assert "but 2 iterations instead of 22. It is too short to show\n" in done.stdout
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
