"""Result + settings -> the model card of a saved model."""

import json
import math
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from konic.finetuning.algorithms import ALGORITHMS
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.results.trained import trained_line
from konic.finetuning.run.environment import version_of
from konic.text import escape_markdown, printable


def model_card(
    result: FinetuningResult,
    settings: dict[str, Any],
    base_location: str | None,
    is_adapter: bool,
    loading: list[str] | None = None,
) -> str:
    """The README.md of a saved model: its base, its training, its rewards before and after, how to load it.

    Args:
        result: Of the run up to these weights.
        settings: Of the run.
        base_location: Where the base model is loaded from; None where that says nothing to others.
        is_adapter: True for an adapter, False for a full model.
        loading: Lines that say how to load the model; None shows how PEFT or `transformers` does.
    """
    algorithm = str(settings["algorithm"])
    first, last = (result.history[0], result.history[-1]) if result.history else (None, None)
    header = ModelCardData(
        base_model=None if base_location is None else printable(base_location),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["konic", "reinforcement-learning", *({algorithm} & ALGORITHMS.keys())],
    )
    lines = [f"# {escape_markdown(result.model_name)}, finetuned by reinforcement learning", ""]
    lines += [trained_line(version_of("konic"), escape_markdown(algorithm), result.total_iterations), ""]
    if first and last:
        lines += ["| | first iteration | last iteration |", "|---|---|---|"]
        lines += [f"| reward | {first.reward_mean:.4f} | {last.reward_mean:.4f} |"]
        for name, mean in last.reward_breakdown.items():
            lines.append(f"| {escape_markdown(name)} | {first.reward_breakdown.get(name, math.nan):.4f} | {mean:.4f} |")
        lines += [f"| KL per response (nats) | {first.kl_per_response:.3f} | {last.kl_per_response:.3f} |"]
        lines += [f"| response tokens | {first.response_length_mean:.1f} | {last.response_length_mean:.1f} |", ""]
    gain = result.held_out_gain
    if gain is not None and result.before is not None and result.after is not None:
        lines += [
            f"On held-out prompts ({len(result.before.prompts)}), with the same random numbers before and after, the "
            f"mean reward went from {result.before.reward_mean:.4f} to {result.after.reward_mean:.4f}: a gain of "
            f"{gain.mean:+.4f} ({gain.words(4)}, paired bootstrap).",
            "",
        ]
    lines += loading or _loading(is_adapter)
    shown = {name: value for name, value in settings.items() if name != "iterations_done"}  # when it was last resumed
    lines += ["", "Settings:", "", "```json", json.dumps(shown, indent=1, default=str), "```"]
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def _loading(is_adapter: bool) -> list[str]:
    library, name = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    return ["```python", f"from {library} import {name}", "", f"model = {name}.from_pretrained(FOLDER)", "```"]
