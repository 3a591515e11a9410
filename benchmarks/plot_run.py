"""A picture of a run: reward with its parts, and KL, over iterations.

python benchmarks/plot_run.py RUN_FOLDER PICTURE.png
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

run, picture = Path(sys.argv[1]), Path(sys.argv[2])
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
settings = json.loads((run / "run.json").read_text(encoding="utf-8"))["settings"]
iterations = [row["iteration"] for row in rows]

figure, (reward, kl) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
mean = [row["reward_mean"] for row in rows]
spread = [row["reward_std"] for row in rows]
low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
reward.fill_between(iterations, low, high, alpha=0.15, linewidth=0)
reward.plot(iterations, mean, linewidth=2, label="reward")
for name in rows[0]["reward_breakdown"]:
    reward.plot(
        iterations, [row["reward_breakdown"].get(name) for row in rows], linewidth=1, linestyle="--", label=name
    )
reward.set(xlabel="iteration", title="Mean reward (band: standard deviation)")
reward.legend(frameon=False, fontsize=8)
kl.plot(iterations, [row["kl_per_response"] for row in rows], linewidth=2, color="tab:red")
kl.set(xlabel="iteration", title="Exact KL from the reference (nats per response)", ylim=(0, None))
for axis in (reward, kl):
    axis.spines[["top", "right"]].set_visible(False)
figure.suptitle(f"{settings['model_name']}, {settings['batch_size']} responses per iteration", fontsize=10)
figure.savefig(picture, dpi=130)
