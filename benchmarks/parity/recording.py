"""What the recorders share: prompts, a tokenizer, and how a trainer's own tensors are read and saved.

Nothing here computes anything that is compared, and nothing imports konic.
"""

import json
import sys
from importlib.metadata import version

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

PROMPTS = {
    "unequal": ("a bad cafe", "hag", "fed a cab", "b"),
    "equal": ("a bad", "a hag", "a cab", "faded"),
}
SEED = 5
TEMPERATURE = 0.7
CLIP_RATIO = 0.2
KL_WEIGHT = 0.05
MAX_NEW_TOKENS = 10


def load_tokenizer(models_folder, *, pad_token):
    return PreTrainedTokenizerFast(
        tokenizer_file=str(models_folder / "tokenizer.json"),
        eos_token="<eos>",
        pad_token=pad_token,
        padding_side="left",
    )


def compute_norms_in_float64():
    """Both sides do: Llama's norms round to float32 whatever the weights are, and show in which order rows are summed.

    The gradients of a prompt that is read once for several rows would be 1e-7 off those of rows apart.
    """

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    LlamaRMSNorm.forward = forward


def call_and_look(owner, name, call):
    """Make a call; return its result and the local variables that its owner's method `name` had as it returned."""
    found = {}

    def look(frame, event, _):
        if event == "return" and frame.f_code.co_name == name and frame.f_locals.get("self") is owner:
            found.update(frame.f_locals)

    sys.setprofile(look)
    try:
        return call(), found
    finally:
        sys.setprofile(None)


class Recording:
    """Tensors by name, copied as they are given, and the file they go to."""

    def __init__(self):
        self.tensors = {}

    def add(self, prefix, tensors):
        for name, tensor in tensors.items():
            if tensor is not None:
                self.tensors[f"{prefix}/{name}"] = torch.as_tensor(tensor).detach().clone().contiguous()

    def add_weights(self, prefix, model):
        self.add(prefix, dict(model.named_parameters()))

    def add_gradients(self, prefix, model):
        self.add(prefix, {name: weight.grad for name, weight in model.named_parameters()})

    def save(self, path, options):
        metadata = {"options": options, "versions": {name: version(name) for name in ("trl", "transformers", "torch")}}
        save_file(self.tensors, path, {name: json.dumps(value, default=str) for name, value in metadata.items()})
