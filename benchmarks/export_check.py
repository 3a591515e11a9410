"""A run exported as GGUF, loaded by llama.cpp and compared with transformers: token ids and log-probs.

python benchmarks/export_check.py RUN PYTHON_WITH_XLLAMACPP RESULT.md
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

TEXTS = [
    "The film was", "  two  spaces, then\ttabs\n\nand lines", "naïve café 日本語 🙂 don't I'll 12345 3.14",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "def f(x):\n    return x**2\n",
    "\u00a0odd\u200bspaces\u3000",
    "a" * 40, "ÀÉÎ ß Ωμέγα кириллица עברית",
]  # fmt: skip
TOLERANCES = {"float32": 0.01, "float16": 0.03, "q8_0": 0.5}
"""Largest difference of a log-prob of the 50 likeliest tokens."""
THEIRS = """
import json, sys, urllib.request
import xllamacpp as x
file, texts = sys.argv[1], json.load(sys.stdin)
params = x.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = file, 512, 1, 1, False
params.port, params.flash_attn_type = 0, x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(params)
def ask(path, **asked):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(asked).encode(), headers)
    return json.load(urllib.request.urlopen(request))
found = []
for text in texts:
    ids = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
    reply = ask("/v1/completions", prompt=ids, max_tokens=1, logprobs=50, temperature=1.0)
    content = (reply["choices"][0].get("logprobs") or {}).get("content") or [{}]  # none after half a character
    found.append([ids, {str(one["id"]): one["logprob"] for one in content[0].get("top_logprobs", [])}])
print("FOUND" + json.dumps([x.__version__, found]))
"""


def main(run, python, result):
    """Export the run in each dtype, ask llama.cpp, compare, and write the table."""
    import torch

    from konic.export.gguf_file import write_gguf
    from konic.export.saved import SavedModel
    from konic.finetuning.system.processor import processor_name

    model, tokenizer = SavedModel.find(Path(run), None).load()
    rows, failed = [], []
    for dtype, tolerance in TOLERANCES.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.gguf")
            write_gguf(model, tokenizer, file, "check", dtype)
            done = subprocess.run(
                [python, "-c", THEIRS, str(file)], input=json.dumps(TEXTS), capture_output=True, text=True, check=False
            )
            if "FOUND" not in done.stdout:
                sys.exit(done.stderr[-3000:])
            version, found = json.loads(done.stdout.rpartition("FOUND")[2])
            size = file.stat().st_size / 1e6
        same, worst = 0, 0.0
        for text, (ids, theirs) in zip(TEXTS, found, strict=True):
            same += ids == tokenizer(text).input_ids
            with torch.no_grad():
                ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            worst = max([worst, *(abs(ours[int(number)].item() - value) for number, value in theirs.items())])
        print(dtype, same, worst, flush=True)
        rows.append(f"| {dtype} | {size:.0f} MB | {same} of {len(TEXTS)} | {worst:.4f} | {tolerance} |")
        failed += [dtype] if same < len(TEXTS) or worst > tolerance else []
    lines = [
        "# Exported GGUF files, opened by llama.cpp", "",
        f"`make export-check` on {os.cpu_count()} cores of {processor_name()} with {platform.python_implementation()} "
        f"{platform.python_version()}, torch {torch.__version__}, xllamacpp {version}: a run of "
        f"{model.config.model_type} ({sum(p.numel() for p in model.parameters()) / 1e6:.0f}M weights).", "",
        f"{len(TEXTS)} texts with spaces, unicode and special tokens. The difference is that of the log-probs of "
        "llama.cpp's 50 likeliest next tokens from those of transformers in float32.", "",
        "| dtype | file | same token ids | largest difference | allowed |", "|---|---|---|---|---|", *rows,
    ]  # fmt: skip
    Path(result).write_text("\n".join(lines) + "\n")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
