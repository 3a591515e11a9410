"""Sampling with weights of 8 bits: how much faster the products of a decode step are, and how far the policy then is.

python benchmarks/int8.py    writes benchmarks/results/int8.md

The layers of SmolLM2-135M, but not its head, whose products decide each token. int8: weights by PyTorch's dynamic
quantisation, one scale per output channel, and the inputs of a product in 8 bits with one scale for all rows; the
input channels of the largest values can be kept apart, in float32. The distance is that of 32 responses sampled in
float32, read a token at a time in batches of 8, as a sampler does. konic has no such sampler: the table says why.
"""

import statistics
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from bench import PROMPTS, machine
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.prepacked import Prepacking, Product

RESULTS = Path(__file__).parent / "results" / "int8.md"
ROWS, TOKENS, RESPONSES, ROUNDS = 8, 48, 32, 20
APART = (0, 4, 16, 64)


class Int8(nn.Module):
    """A layer whose products are in 8 bits, but for the input channels kept `apart`."""

    def __init__(self, linear, apart):
        super().__init__()
        weight = linear.weight.detach().clone()
        self.apart, self.kept = apart, weight[:, apart].clone()
        weight[:, apart] = 0
        scales = (weight.abs().amax(1).clamp(min=1e-8) / 127).double()
        packed = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(packed, None)

    def forward(self, x):
        if not len(self.apart):
            return torch.ops.quantized.linear_dynamic(x, self.packed, False)
        apart = x[..., self.apart]
        rest = x.index_fill(-1, self.apart, 0)
        return torch.ops.quantized.linear_dynamic(rest, self.packed, False) + apart @ self.kept.T


class Int8Weight(nn.Module):
    """A layer whose weight is rounded to 8 bits; its products are those of float32."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        self.weight = (linear.weight.detach() / scale).round() * scale

    def forward(self, x):
        return x @ self.weight.T


class BFloat16(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight.detach().bfloat16()

    def forward(self, x):
        return (x.bfloat16() @ self.weight.T).float()


def linears(model):
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


def put(model, modules):
    for name, module in modules.items():
        parent, child = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def seconds(model):
    """Of all products of a decode step: kind -> the median of turns."""
    layers = linears(model).values()
    none = torch.tensor([], dtype=torch.long)
    half = [layer.weight.detach().bfloat16() for layer in layers]
    half = [torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) for weight in half]
    kinds = {
        "float32, PyTorch's layout": list(layers),
        "float32, packed by oneDNN": [Product([layer.weight], None, Prepacking(ROWS)) for layer in layers],
        "bfloat16, packed by oneDNN": [
            lambda x, weight=weight: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), weight, None, "none", [], "")
            for weight in half
        ],
        "int8": [Int8(layer, none) for layer in layers],
    }  # fmt: skip
    inputs = [torch.randn(ROWS, layer.in_features) for layer in layers]
    taken = {kind: [] for kind in kinds}
    for _ in range(ROUNDS + 2):
        for kind, products in kinds.items():
            start = time.perf_counter()
            for product, x in zip(products, inputs, strict=True):
                product(x)
            taken[kind].append(time.perf_counter() - start)
    return {kind: statistics.median(values[2:]) for kind, values in taken.items()}


class Responses:
    """Responses of a model with left padding, and the log-probs of other weights for them."""

    def __init__(self, model, tokenizer):
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        prompts = tokenizer([*PROMPTS * RESPONSES][:RESPONSES], return_tensors="pt", padding=True)
        self.model, self.prompt_length = model, prompts.input_ids.shape[1]
        torch.manual_seed(0)
        self.ids = model.generate(
            **prompts, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=True, top_k=0, top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        self.mask = torch.cat([prompts.attention_mask, torch.ones(RESPONSES, TOKENS, dtype=torch.long)], dim=1)

    @torch.no_grad()
    def log_probs(self):
        """[response, token, vocabulary], a token at a time."""
        return torch.cat([self._decode(rows) for rows in torch.arange(RESPONSES).split(ROWS)])

    def _decode(self, rows):
        ids, mask = self.ids[rows], self.mask[rows]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, seen, found = None, 0, []
        for end in range(self.prompt_length, self.prompt_length + TOKENS):
            new = slice(seen, end)
            output = self.model(
                input_ids=ids[:, new], attention_mask=mask[:, :end], position_ids=positions[:, new],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            found.append(output.logits[:, -1].log_softmax(-1))
            cache, seen = output.past_key_values, end
        return torch.stack(found, dim=1)


def largest_inputs(model, ids):
    """Layer -> the largest value of each input channel."""
    peaks, hooks = {}, []
    for name, layer in linears(model).items():

        def watch(_, inputs, name=name):
            peaks[name] = inputs[0].abs().flatten(0, -2).amax(0)

        hooks.append(layer.register_forward_pre_hook(watch))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return peaks


def distances(model, tokenizer):
    """A row of the table for each way to round."""
    plain = linears(model)
    responses = Responses(model, tokenizer)
    peaks = largest_inputs(model, responses.ids)
    truth = responses.log_probs()
    tokens = responses.ids[:, responses.prompt_length :, None]
    ways = {
        "bfloat16": lambda name, layer: BFloat16(layer),
        "int8 weights alone": lambda name, layer: Int8Weight(layer),
    }
    for count in APART:
        label = f"int8, {count} channels of a layer apart" if count else "int8"
        ways[label] = lambda name, layer, count=count: Int8(layer, peaks[name].topk(count).indices)
    for label, way in ways.items():
        put(model, {name: way(name, layer) for name, layer in plain.items()})
        found = responses.log_probs()
        put(model, plain)
        kl = (truth.exp() * (truth - found)).sum(-1)
        gap = (found - truth).gather(-1, tokens)[..., 0]
        shares = [(weights.mean() ** 2 / (weights**2).mean()).item() for weights in (gap.exp(), gap.sum(1).exp())]
        yield (
            f"| {label} | {gap.abs().mean():.3f} | {kl.mean():.5f} | {kl.sum(1).mean():.3f} | {shares[0]:.3f} "
            f"| {shares[1]:.3f} |"
        )


def main():
    warnings.filterwarnings("ignore", category=UserWarning)
    loaded = load_model("smollm2-135m", {}, torch.device("cpu"))
    taken = seconds(loaded.model)
    packed = taken["float32, packed by oneDNN"]
    lines = [f"| {kind} | {1e3 * value:.1f} ms | {value / packed:.2f} |" for kind, value in taken.items()]
    print(*lines, sep="\n", flush=True)
    rows = []
    for row in distances(loaded.model, loaded.tokenizer):
        print(row, flush=True)
        rows.append(row)
    text = [
        "# Sampling with weights of 8 bits", "",
        f"{machine()}, {time.strftime('%Y-%m-%d')}; `python benchmarks/int8.py`, {torch.get_num_threads()} threads. "
        f"SmolLM2-135M, all layers but the head.", "",
        f"Products of a decode step with {ROWS} rows; medians of {ROUNDS} turns.", "",
        "| weights | products of a step | of packed float32 |", "|---|---|---|", *lines, "",
        f"Distance from float32, of {RESPONSES} responses of {TOKENS} tokens. The gap is the mean difference of the "
        "log-probs of the sampled tokens.", "",
        "| weights | gap per token | KL per token | KL per response | effective sample size, tokens | of responses |",
        "|---|---|---|---|---|---|",
        *rows,
    ]  # fmt: skip
    RESULTS.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
