"""One setting on the demo's task: held-out reward before and after, and the KL paid for it.

python benchmarks/demo_task.py [--full] [--minutes 3] [name=value ...]    values of TrainingConfig, as JSON

Prints one line; its figures stand in docs/defaults.md with the machine they were measured on.
"""

import argparse
import json
import tempfile

from curves import agent_of
from konic.finetuning import KonicFinetuningCallback, KonicFinetuningEngine
from konic.finetuning.results.intervals import distinct_n, mean

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--full", action="store_true", help="train every weight instead of an adapter")
parser.add_argument("--minutes", type=float, default=3.0, help="of training, the first evaluation counted in")
parser.add_argument("settings", nargs="*", help="name=value")
options = parser.parse_args()
settings = {name: json.loads(value) for name, value in (setting.split("=", 1) for setting in options.settings)}

agent = agent_of({"max_minutes": options.minutes} | settings, full=options.full)
with tempfile.TemporaryDirectory() as folder:
    quiet = KonicFinetuningCallback(verbose=False)
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=f"{folder}/run", callback=quiet)
    result = engine.train(1000)
gain, after = result.held_out_gain, result.after
print(
    f"{'full' if options.full else 'LoRA'} {settings}: {result.total_iterations} iterations, "
    f"{result.before.reward_mean:.3f} -> {after.reward_mean:.3f}, "
    f"gain {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f}), "
    f"{mean(after.kl_per_response):.2f} nats per response, {mean(after.response_lengths):.1f} tokens, "
    f"distinct-2 {distinct_n(after.responses):.3f}"
)
