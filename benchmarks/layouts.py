"""What the products of a decode step take by each layout of the weights, and which plan is chosen.

python benchmarks/layouts.py writes benchmarks/results/layouts.json, under the name of the processor, and layouts.md

The products of all layers of SmolLM2-135M but its head, each by itself. They are measured twice: as at load, which
gives the chosen plan, and once more, which gives the times of the table.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "speed"))
import torch
from turns import THREADS

from bench import machine
from konic.finetuning.models import decode_probe
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.prepacked import DecodePlan
from konic.finetuning.system.processor import processor_name

RESULTS = Path(__file__).parent / "results" / "layouts.json"
ROWS, TOKENS = (1, 4, 8, 16, 32, 64), 48


def measure():
    torch.set_num_threads(THREADS)
    model = load_model("smollm2-135m", {}, torch.device("cpu")).model
    found = []
    for rows in ROWS:
        started = time.perf_counter()
        at_load = decode_probe._measure(decode_probe._sample(model), rows)
        probe_seconds = time.perf_counter() - started
        layers = [layer for _, _, layer in decode_probe.plain_layers(model)]
        whole = decode_probe._measure(layers, rows)
        usual = DecodePlan(decode_probe.usual_layout(rows, torch.float32))
        chosen, best = (decode_probe._fastest(timings, TOKENS, usual) for timings in (at_load, whole))
        row = {
            "rows": rows, "probe_seconds": probe_seconds, "chosen": vars(chosen), "best": vars(best),
            "seconds": {f"{plan.layout}, {plan.threads or THREADS}": timing for plan, timing in whole.items()},
        }  # fmt: skip
        if replace(chosen, threads=None) not in whole:
            raise RuntimeError(f"{chosen} was not measured")
        found.append(row)
        print(row, flush=True)
    return {"machine": machine(), "day": time.strftime("%Y-%m-%d"), "rows": found}


def lines_of(found):
    lines = [
        f"{found['machine']}, {found['day']}; `python benchmarks/layouts.py`. Milliseconds of the products of a decode "
        f"step of SmolLM2-135M in fp32, without the head, with {THREADS} threads; in brackets those of packing.",
        "",
        "| rows | plain | oneDNN | MKL | fastest, 1 thread | chosen for 48 tokens | seconds of the probe |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [_cell(row["seconds"].get(f"{layout}, {THREADS}")) for layout in ("plain", "onednn", "mkl")]
        fewer = next((timing for name, timing in row["seconds"].items() if name.endswith(", 1")), None)
        cells += [f"{1000 * fewer[1]:.1f}" if fewer else "", row["chosen"]["layout"], f"{row['probe_seconds']:.2f}"]
        lines.append(f"| {row['rows']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(timing):
    return f"{1000 * timing[1]:.1f} ({1000 * timing[0]:.0f})" if timing else ""


if __name__ == "__main__":
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[processor_name()] = measure()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text("\n".join("\n".join(lines_of(found)) for found in results.values()))
