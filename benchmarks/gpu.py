"""konic on one GPU: is it right there, and how fast is it next to its peers and to what the card can do?

python benchmarks/gpu.py [--trl116 PYTHON] [--trl026 PYTHON] [--rounds 3] [--only NAME ...] [--output FILE] [--small]

Takes some ten minutes with both peers and needs no network: the models have random weights. The checks come first, in
this process. Then every system is a process of its own (benchmarks/speed/) that does one step when it is its turn; the
first two steps of each are left out. A peer whose PYTHON is not given is left out too. Without a GPU, or with
`--small`, all sizes are small: that shows that the script works, and its times mean nothing.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from bench import Process, machine, save_model
from gpu_checks import TOKENS, checks, prompts


@dataclass(frozen=True)
class Size:
    """A Llama's, Qwen3's, GPT-2's or GPT-NeoX's numbers."""

    shape: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    head: int = 64


SIZES = {
    "135M": Size("llama", 49_152, 576, 30, 9, 3, 1536),  # SmolLM2-135M
    "gpt2": Size("gpt2", 50_257, 768, 12, 12, 12, 3072),  # GPT-2
    "pythia": Size("neox", 50_304, 768, 12, 12, 12, 3072),  # Pythia 160M
    "0.6B": Size("qwen3", 151_936, 1024, 28, 16, 8, 3072, 128),  # Qwen3 0.6B
    "1B": Size("llama", 128_256, 2048, 16, 32, 8, 8192),  # Llama 3.2 1B
}
SMALL = {
    "135M": Size("llama", 512, 64, 2, 4, 2, 128, 16),
    "gpt2": Size("gpt2", 512, 64, 2, 4, 4, 256, 16),
    "pythia": Size("neox", 512, 64, 2, 4, 4, 256, 16),
    "0.6B": Size("qwen3", 512, 64, 2, 4, 2, 128, 32),
    "1B": Size("llama", 512, 96, 2, 4, 2, 192, 24),
}


@dataclass(frozen=True)
class Work:
    """What ours and a peer do in turn: `rows` responses of `TOKENS` tokens, once or in an iteration."""

    name: str
    ours: str
    peer: str
    model: str
    rows: int
    dtype: str = "float32"


WORKS = (
    Work("sampling, 135M, batch 8", "sample", "generate", "135M", 8),
    Work("sampling, 135M, batch 64", "sample", "generate", "135M", 64),
    Work("sampling, 135M, batch 256", "sample", "generate", "135M", 256),
    Work("sampling, GPT-2, batch 64", "sample", "generate", "gpt2", 64),
    Work("sampling, Qwen3 0.6B bf16, batch 64", "sample", "generate", "0.6B", 64, "bfloat16"),
    Work("sampling, 1B bf16, batch 64", "sample", "generate", "1B", 64, "bfloat16"),
    Work("sampling, any model, batch 64", "sample-general", "generate", "135M", 64),
    Work("sampling, Pythia 160M, batch 64", "sample", "generate", "pythia", 64),
    Work("PPO iteration, 135M, batch 8", "ppo", "trl026", "135M", 8),
    Work("PPO iteration, 135M, batch 64", "ppo", "trl026", "135M", 64),
    Work("GRPO iteration, 135M, batch 8", "grpo", "trl116", "135M", 8),
    Work("GRPO iteration, 135M, batch 64", "grpo", "trl116", "135M", 64),
    Work("GRPO iteration, 135M, batch 256", "grpo", "trl116", "135M", 256),
    Work("GRPO iteration, 1B bf16, batch 64", "grpo", "trl116", "1B", 64, "bfloat16"),
)
PEERS = {"generate": "transformers generate", "trl026": "TRL 0.26.2 PPO", "trl116": "TRL 1.16 GRPO"}


def make_model(size, dtype, folder, device):
    """A random model in a dtype, and a tokenizer whose tokens are numbered words."""
    torch.manual_seed(0)
    common = {"vocab_size": size.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.05}
    with torch.device(device):
        if size.shape == "gpt2":
            config = GPT2Config(n_embd=size.hidden, n_layer=size.layers, n_head=size.heads, **common)
        elif size.shape == "neox":
            config = GPTNeoXConfig(
                hidden_size=size.hidden, intermediate_size=size.mlp, num_hidden_layers=size.layers,
                num_attention_heads=size.heads, **common,
            )  # fmt: skip
        else:
            config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[size.shape](
                hidden_size=size.hidden, intermediate_size=size.mlp, num_hidden_layers=size.layers, head_dim=size.head,
                num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=1024,
                tie_word_embeddings=True, pad_token_id=0, **common,
            )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    words = {"<end>": 0, **{f"w{number}": number for number in range(1, size.vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"eos_token": "<end>", "pad_token": "<end>", "clean_up_tokenization_spaces": False}
    return save_model(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options), folder)


def measure(work, folders, pythons, rounds, folder):
    """Seconds of ours and the peer, in turn, and their memory."""
    groups = 4 if work.ours == "grpo" else 1
    (prompts_file := folder / "prompts.txt").write_text("\n".join(prompts(work.rows // groups)))
    model = folders[work.model]
    ours = Process(
        sys.executable, "ours.py", [model, prompts_file, work.ours, TOKENS, folder, work.dtype], folder / "ours.log"
    )
    script, arguments = {
        "generate": ("generate.py", [TOKENS, work.dtype]),
        "trl026": ("trl_ppo.py", [4, TOKENS, folder / "peer"]),
        "trl116": ("trl_grpo.py", [1, TOKENS, folder / "peer", work.dtype]),
    }[work.peer]
    peer = Process(pythons[work.peer], script, [model, prompts_file, *arguments], folder / "peer.log")
    for process in (ours, peer, ours, peer):
        process.step()
    seconds = [(ours.step(), peer.step()) for _ in range(rounds)]
    return seconds, ours.end(), peer.end()


def row_of(work, seconds, ours, peer, on_gpu):
    mine, theirs = (statistics.median(side) for side in zip(*seconds, strict=True))
    ratios = sorted(b / a for a, b in seconds)
    memory = "gpu_mb" if on_gpu else "peak_mb"
    return (
        f"| {work.name} | {PEERS[work.peer]} | {mine:.3f} s | {theirs:.3f} s | **{statistics.median(ratios):.1f}×** "
        f"({ratios[0]:.1f}–{ratios[-1]:.1f}) | {work.rows * TOKENS / mine:,.0f} | {work.rows * TOKENS / theirs:,.0f} | "
        f"{ours[memory]:,.0f} MB | {peer[memory]:,.0f} MB |"
    )


def floor(device, on_gpu):
    """Bytes per second of a large copy, and multiply-adds per second of a large product, by dtype."""
    count = 2**28 if on_gpu else 2**22
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    rates = {"bandwidth": 8 * count / seconds_of(lambda: target.copy_(source), on_gpu)}
    for dtype, side in ((torch.float32, 4096), (torch.bfloat16, 8192)):
        side = side if on_gpu else 256
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds_of(lambda a=a, b=b: a @ b, on_gpu)
    return rates


def seconds_of(work, on_gpu):
    times = []
    for _ in range(8):
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def step_floor(work, size, rates):
    """Milliseconds of a decode step that only reads the weights once, or only multiplies by them."""
    attention = 2 * size.hidden * size.head * (size.heads + size.kv_heads)
    mlp = (2 if size.shape in ("gpt2", "neox") else 3) * size.hidden * size.mlp
    weights = size.layers * (attention + mlp) + size.vocabulary * size.hidden
    read = weights * (2 if work.dtype == "bfloat16" else 4) / rates["bandwidth"]
    return 1000 * max(read, 2 * weights * work.rows / rates[work.dtype])


class Report:
    """Prints lines and, so that nothing is lost, writes them to a file as they come."""

    def __init__(self, file):
        self.file, self.lines = file, []

    def say(self, *lines):
        self.lines += lines
        print(*lines, sep="\n", flush=True)
        if self.file:
            self.file.write_text("\n".join(self.lines) + "\n")


def report_checks(report, folder, work, device):
    """The names of the checks that fail."""
    report.say("", "| check | found | limit | |", "|---|---|---|---|")
    failed = []
    for check in checks(folder, work, device):
        verdict = "holds" if check.holds else "**FAILS**"
        report.say(f"| {check.name} | {check.found:.2g} | {check.limit:.2g} | {verdict} |")
        failed += [] if check.holds else [check.name]
    return failed


def report_speed(report, works, folders, pythons, rounds, root, sizes, device):
    """The names of the works that fail."""
    on_gpu = device.type == "cuda"
    rates, memory = floor(device, on_gpu), "GPU memory" if on_gpu else "memory"
    report.say(
        "",
        f"A large copy moves {rates['bandwidth'] / 1e12:.2f} TB/s (read and written); a large product makes "
        f"{rates['float32'] / 1e12:.1f} TFLOP/s in fp32 and {rates['bfloat16'] / 1e12:.0f} in bf16.",
        "",
        f"| {TOKENS} tokens a response | peer | konic | peer | faster | konic, tokens/s | peer, tokens/s "
        f"| konic, {memory} | peer, {memory} |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    steps, failed = [], []
    for number, work in enumerate(works):
        (folder := root / f"work-{number}").mkdir()
        try:
            seconds, ours, peer = measure(work, folders, pythons, rounds, folder)
        except SystemExit as failure:
            report.say(f"| {work.name} | {PEERS[work.peer]} | **failed** | | | | | | |")
            print(failure, file=sys.stderr)
            failed.append(work.name)
            continue
        report.say(row_of(work, seconds, ours, peer, on_gpu))
        if work.ours == "sample":
            step = 1000 * statistics.median(mine for mine, _ in seconds) / TOKENS
            steps.append(f"| {work.name} | {step:.2f} ms | {step_floor(work, sizes[work.model], rates):.2f} ms |")
    if steps:
        columns = "| | a step of konic, prompt included | the weights read once, or their products |"
        report.say("", columns, "|---|---|---|", *steps)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl116", help="a Python with TRL 1.16")
    parser.add_argument("--trl026", help="a Python with TRL 0.26.2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=["checks", *(work.name for work in WORKS)])
    parser.add_argument("--output", type=Path, help="also write what is printed to this file")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    is_small = options.small or not on_gpu
    sizes = SMALL if is_small else SIZES
    pythons = {"generate": sys.executable, "trl116": options.trl116, "trl026": options.trl026}
    works = [
        replace(work, rows=8) if is_small else work
        for work in WORKS
        if pythons[work.peer] and (options.only is None or work.name in options.only)
    ]
    report, failed = Report(options.output), []
    card = torch.cuda.get_device_name(device) if on_gpu else "no GPU"
    report.say(
        f"{card}; {machine()}; {time.strftime('%Y-%m-%d')}; `make gpu`{', at a small size' if is_small else ''}."
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        root = Path(name)
        needed = {"135M": "float32"} | {work.model: work.dtype for work in works}
        folders = {size: make_model(sizes[size], dtype, root / size, device) for size, dtype in needed.items()}
        if options.only is None or "checks" in options.only:
            failed = report_checks(report, folders["135M"], root / "runs", device)
        if works:
            failed += report_speed(report, works, folders, pythons, options.rounds, root, sizes, device)
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
