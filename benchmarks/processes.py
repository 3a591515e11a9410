"""Several processes against one: the largest difference of any weight, metric, reward or response, for every algorithm.

python benchmarks/processes.py OUTPUT
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from bench import machine
from konic.finetuning.algorithms import ALGORITHMS
from test_processes import MORE_SHARDED, OF_LLAMA, SHARDED, VARIANTS, difference, run, save_models, told

CASES = [*ALGORITHMS, *VARIANTS, *SHARDED, *MORE_SHARDED, *OF_LLAMA]
SIZES = (2, 4)

with tempfile.TemporaryDirectory() as temp:
    folder = Path(temp)
    save_models(folder / "model")
    for size in (1, *SIZES):
        codes, errors = run(folder / "model", folder / str(size), size, *CASES, seconds=3000)
        assert codes == [0] * size, errors
    rows = []
    for case in CASES:
        one = told(folder / "1", case)
        found = [max(difference(one, told(folder / str(size), case, rank)) for rank in range(size)) for size in SIZES]
        rows.append(f"| {case} | " + " | ".join(f"{most:.1e}" for most, _ in found) + " |")
        print(rows[-1], flush=True)

Path(sys.argv[1]).write_text(
    "\n".join([
        "# Several processes against one", "",
        f"Made by `make processes` on {machine()}; gloo.", "",
        "Three iterations of 12 responses (5 in `uneven`) on a tiny GPT-2 in float64. Each number is the largest "
        "difference of", "any trained weight, metric, response or evaluated reward between one process and any of "
        "several. `sharded` divides", "the weights among several, and not in one. The norms of Llama compute in fp32. "
        "In `half`, the second half of a batch", "has no score, so that half of the processes have no token to learn "
        "from.", "",
        "| case | " + " | ".join(f"{size} processes" for size in SIZES) + " |", "|---" * (1 + len(SIZES)) + "|", *rows,
    ]) + "\n"
)  # fmt: skip
