"""Tiny random models for the comparison with peers: a policy, its reference, a value model and a reward model.

python benchmarks/parity/make_models.py OUTPUT

Leaves OUTPUT/{gpt2,llama}/{policy,reference,value,reward} and OUTPUT/tokenizer.json, a tokenizer of eight letters and a
space. The vocabulary is that small so that random responses end by themselves now and then. Policy and reference
differ, so that no KL is 0; the weights are spread widely, so that log-probs vary.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

CLASSES = {
    "gpt2": (GPT2LMHeadModel, GPT2ForSequenceClassification),
    "llama": (LlamaForCausalLM, LlamaForSequenceClassification),
}
EOS, PAD = 0, 1
ENDS = {"gpt2": 2.6, "llama": 2.1}
"""So that some responses end by themselves and some are cut off."""
VOCABULARY = {token: index for index, token in enumerate(["<eos>", "<pad>", *"abcdefgh", "Ġ"])}
"""Ġ is how byte-level tokenizers write a space."""


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    return tokenizer


def make_config(architecture):
    """Two layers of 32; GPT-2 has its dropout, for the trainers to switch off."""
    shared = {
        "vocab_size": len(VOCABULARY), "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD,
        "initializer_range": 0.2, "num_labels": 1,
    }  # fmt: skip
    if architecture == "gpt2":
        return GPT2Config(
            **shared, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1
        )
    return LlamaConfig(
        **shared, max_position_embeddings=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip


def unable_to_pad(model, end):
    """The model with logits that never let it sample padding, as a trained one would not.

    The first hidden dimension holds a constant that no layer writes to; the padding token's logit falls with it.
    `end` in the place of 2 makes responses end more often.
    """
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[:, 0] = 2.0
            weight[PAD, 0] = -10.0
            weight[EOS, 0] = end
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0.0
            elif name.endswith("c_proj.weight"):
                weight[:, 0] = 0.0
    return model


def moved(model, scale):
    """The model with noise on every weight."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * scale)
    return model


def make_models(folder):
    for architecture, (causal, scalar) in CLASSES.items():
        torch.manual_seed(0)
        config = make_config(architecture)
        model = unable_to_pad(causal(config), ENDS[architecture])
        model.save_pretrained(folder / architecture / "reference")
        moved(model, 0.03).save_pretrained(folder / architecture / "policy")
        for name in ("value", "reward"):
            scalar(config).save_pretrained(folder / architecture / name)
    make_tokenizer().save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    make_models(parser.parse_args().output)
