"""What `make mutation` found -> a page: mutants killed per module, and every survivor with its change.

python benchmarks/mutation.py OUTPUT.md, after `mutmut run` in the repository's root
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

KILLED = 1  # pytest's exit code when a test failed
REQUIRED = {
    "learning/advantages": 0.95,
    "learning/gradients": 0.85,
    "learning/kl_controller": 0.95,
    "learning/losses": 0.95,
    "learning/update": 0.85,
    "models/distributions": 0.95,
    "models/value_head": 0.85,
    "rollout/rollout": 0.85,
}
SAME = "changes no result: "
AS_MANY = SAME + "as many names as sums"
EQUIVALENT = {
    # the line that the mutant has instead: why no test can tell
    "last = torch.where(response_mask, positions, -2).amax(dim=1)": SAME + "no position is −1 or −2",
    "centred = scores - total / mask.sum(dim=1, keepdim=True).clamp(min=2)": SAME + "a single score becomes 0 anyway",
    "buffer = max(round(share * max_length, 10), 1.0)  # 0.28 · 50 is a little more than 14 in floats": SAME
    + "one digit more of a rounding error",
    "mean = torch.where(mask, scores, 0.0).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=2)": SAME
    + "a single score becomes 0 anyway",
    "temperatures = torch.full_like(advantages, otherwise).masked_fill(advantages >= 0, if_positive)": SAME
    + "an advantage of 0 has no loss",
    "values, old_values, returns = (torch.where(mask, tensor, 1.0) for tensor in (values, old_values, returns))": SAME
    + "the error of three equal values is 0",
    "return torch.finfo(log_softmax.dtype).min / 5": SAME + "e to any such number is 0",
    'entropy = -torch.einsum("...V,...V->...", probabilities, log_softmax)': SAME + "the name of an index",
    "totals = {name: totals.get(name, 0.0) + value for name, value in zip(sums, group_sums, strict=None)}": AS_MANY,
    "totals = {name: totals.get(name, 0.0) + value for name, value in zip(sums, group_sums, strict=False)}": AS_MANY,
    "totals = {name: totals.get(name, 0.0) + value for name, value in zip(sums, group_sums, )}": AS_MANY,
    "sums: dict[str, float] = None": SAME + "used only where the step is not taken",
    "largest, problem = 1.0, None": SAME + "used only where the step is not taken",
    "optimizer.zero_grad(set_to_none=None)": SAME + "gradients are dropped when the update ends",
    "optimizer.zero_grad(set_to_none=False)": SAME + "gradients are dropped when the update ends",
}


def change(name):
    """The lines that a mutant takes away and puts in their place."""
    shown = subprocess.run([sys.executable, "-m", "mutmut", "show", name], capture_output=True, text=True, check=True)
    lines = [line for line in shown.stdout.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return [line[1:].strip() for line in lines if line[0] == "-"], [
        line[1:].strip() for line in lines if line[0] == "+"
    ]


def main():
    table, survivors, is_ok = [], [], True
    for module, required in REQUIRED.items():
        meta = json.loads(Path(f"mutants/src/konic/finetuning/{module}.py.meta").read_text())
        codes = meta["exit_code_by_key"]
        alive = [name for name, code in codes.items() if code != KILLED]
        kinds = Counter()
        for name in alive:
            before, after = change(name)
            reason = EQUIVALENT.get(" ".join(after))
            kinds["equivalent" if reason else "survived"] += 1
            state = "" if codes[name] == 0 else f" (exit code {codes[name]})"
            survivors.append(
                f"| {module} | `{' '.join(before)}` | `{' '.join(after)}` | {reason or 'survived'}{state} |"
            )
        share = (len(codes) - len(alive)) / (len(codes) - kinds["equivalent"])
        is_ok &= share >= required
        counts = f"{len(codes)} | {len(codes) - len(alive)} | {kinds['equivalent']} | {kinds['survived']}"
        table.append(f"| {module} | {counts} | {share:.1%} | {required:.0%} |")
    page = [
        "# Mutation test",
        "",
        "Made by `make mutation` (mutmut 3.8.1): each mutant changes one place of the code, and is killed where a",
        "test fails. Killed are counted over those that are not equivalent. Nothing is excluded from mutation; mutmut",
        "itself leaves decorated functions (properties among them) and constants of a module as they are.",
        "",
        "| module | mutants | killed | equivalent | survived | killed share | wanted |",
        "|---|---|---|---|---|---|---|",
        *table,
        "",
        "Every mutant that is alive:",
        "",
        "| module | line | mutant | why |",
        "|---|---|---|---|",
        *survivors,
    ]
    print("\n".join(page[:12]))
    Path(sys.argv[1]).write_text("\n".join(page) + "\n", encoding="utf-8")
    sys.exit(not is_ok)


if __name__ == "__main__":
    main()
