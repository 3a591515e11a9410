"""The classic example of the field: GPT-2 learns to continue reviews positively, scored by a sentiment classifier.

Figures to compare with are in TRL's notebook `gpt2-sentiment`, which uses the same model, classifier and data. They are
the last that TRL published before it dropped PPO. The classifier's positive logit went from a mean of −0.513 to 1.677,
and from a median of −0.464 to 2.680. This script has not been run at that size: it needs the weights from the Hub and,
to finish in minutes, a GPU. A test runs the script on tiny models.

    python examples/gpt2_imdb_classifier.py
"""

import argparse
import random
import statistics

import torch
from datasets import load_dataset
from transformers import AutoTokenizer

from konic.finetuning import *


def review_openings(dataset: str, tokenizer, count: int) -> list[str]:
    """Return the first two to eight tokens of `count` reviews, taken from reviews of more than 200 characters."""
    draw = random.Random(0)  # noqa: S311
    reviews = load_dataset(dataset, split="train").shuffle(seed=0)
    texts = [row["text"] for row in reviews if len(row["text"]) > 200][:count]
    return [tokenizer.decode(tokenizer(text).input_ids[: draw.randint(2, 8)]) for text in texts]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="lvwerra/gpt2-imdb")
parser.add_argument("--classifier", default="lvwerra/distilbert-imdb")
parser.add_argument("--dataset", default="stanfordnlp/imdb")
parser.add_argument("--algorithm", default="ppo", help="or rloo, grpo, dr_grpo, reinforce++")
parser.add_argument("--iterations", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--prompts", type=int, default=13_056)
parser.add_argument("--held-out", type=int, default=256)


def main():
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    openings = review_openings(options.dataset, AutoTokenizer.from_pretrained(options.model), options.prompts)
    # "joined" because the classifier judges prompt and response together as one review; label 1 is "positive"
    classifier = HuggingFaceRewardModel(options.classifier, device=device, label_index=1, text_format="joined")
    agent = KonicFinetuningAgent(
        base_model=options.model,
        reward_composer=KonicLLMRewardComposer(reward_models=[classifier]),
        lora_config=LoraConfig(r=16, lora_alpha=32, target_modules=["c_attn"]),
        dataset_config=DatasetConfig(prompts=openings, held_out=options.held_out),
        training_config=TrainingConfig(
            algorithm=options.algorithm, batch_size=options.batch_size, kl_target=6.0, kl_penalty_weight=0.2
        ),
        generation_config=GenerationConfig(max_new_tokens=16, max_prompt_length=8),
    )
    engine = KonicFinetuningEngine.from_agent(agent, device=device)
    result = engine.train(max_iterations=options.iterations)
    for label, evaluation in (("before", result.before), ("after", result.after)):
        logits = evaluation.rewards
        print(f"positive logit {label}: mean {statistics.mean(logits):.3f}, median {statistics.median(logits):.3f}")


if __name__ == "__main__":
    main()
