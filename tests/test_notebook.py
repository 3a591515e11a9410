"""examples/quickstart.ipynb in a real kernel, and what differs there: `__main__` has no file, and Interrupt is Ctrl-C.

A tiny random model stands in for "smollm2-135m", and runs are short: `STAND_INS` are put into the cells.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"
STAND_INS = {
    '"smollm2-135m"': "{model!r}",
    "ITERATIONS, HELD_OUT = 10, 16": "ITERATIONS, HELD_OUT = 2, 2",
    "batch_size=16": "batch_size=4",
    "max_new_tokens=32": "max_new_tokens=4",
}
IN_WORKERS = """
isolated = agent.with_settings({"training_config": {"reward_workers": 1, "reward_timeout_seconds": 60}})
in_workers = KonicFinetuningEngine.from_agent(isolated, checkpoint_dir="runs/isolated").train(2)
print("same rewards in workers:", in_workers.get_reward_curve() == result.get_reward_curve())
"""
INTERRUPTED = """
import os, signal, threading

class Interrupt(BaseKonicFinetuningCallback):  # sends what Jupyter sends, to the kernel and its children
    def on_iteration_begin(self, iteration):
        if iteration == 3:
            threading.Timer(0.02, os.killpg, (os.getpgid(0), signal.SIGINT)).start()

callbacks = [KonicFinetuningCallback(), Interrupt()]
engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir="runs/interrupted", callback=callbacks)
stopped = engine.train(1000)
print("stopped:", stopped.stopped_because, stopped.total_iterations >= 2)
resumed = KonicFinetuningEngine.from_agent(agent, checkpoint_dir="runs/interrupted").train(
    stopped.total_iterations + 1, resume_from_checkpoint=True
)
print("continued:", resumed.total_iterations - stopped.total_iterations)
"""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook, folder, seconds=150):
    """The notebook after its cells ran, as `jupyter execute` runs them: in processes that are ended when time is up."""
    path = folder / "notebook.ipynb"
    nbformat.write(notebook, path)
    (folder / "jupyter").mkdir()
    own = {f"JUPYTER_{name}_DIR": str(folder / "jupyter" / name) for name in ("RUNTIME", "CONFIG", "DATA")}
    environment = os.environ | own | {"IPYTHONDIR": str(folder / "jupyter" / "ipython")}
    command = [sys.executable, "-c", "from nbclient.cli import main; main()", "--inplace", "--kernel_name=python3"]
    command += ["--startup_timeout=60", "--timeout=100", str(path)]
    with (folder / "log.txt").open("w") as log:  # a pipe would stay open as long as a kernel that is left behind
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, (folder / "log.txt").read_text()[-3000:]
    return nbformat.read(path, as_version=4)


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_the_notebook_is_stored_without_outputs_and_has_what_is_replaced():
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    text = "\n".join(cell.source for cell in cells)
    assert all(text.count(part) == 1 for part in STAND_INS)


@pytest.mark.skipif(os.name != "posix", reason="the kernel is interrupted by a signal")
def test_the_notebook_runs_in_a_kernel_also_with_workers_and_interrupted(model_folders, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        for part, stand_in in STAND_INS.items():
            cell.source = cell.source.replace(part, stand_in.format(model=model_folders["llama"]))
    own = len(code_cells(notebook))
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in (IN_WORKERS, INTERRUPTED)]
    cells = code_cells(execute(notebook, tmp_path))
    training = next(cell for cell in cells if "engine.train" in cell.source)
    assert "[Iter    2] Reward:" in printed(training)
    assert len(training.outputs) <= 7, [str(output)[:200] for output in training.outputs]
    text = "".join(map(printed, cells[:own]))
    assert "held-out reward:" in text and "\x1b" not in text
    assert (tmp_path / "cheerful-model" / "model.safetensors").is_file()
    assert "same rewards in workers: True" in printed(cells[own])
    assert "stopped: interrupted True" in printed(cells[own + 1])
    assert "continued: 1" in printed(cells[own + 1])
