"""The MLflow tracker, against a stand-in that refuses what MLflow 3.17 refuses."""

import json
import os
import posixpath
import re
import sys
import types

import pytest

from konic.finetuning import (
    ConfigError,
    KonicFinetuningAgent,
    KonicLLMRewardComposer,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    llm_reward,
)
from konic.finetuning.callbacks.mlflow import MLflowCallback


class Brief(KonicLLMRewardComposer):
    @llm_reward
    def brief(self, prompt, response):
        return -len(response)


class Refused(Exception):
    pass


class StandIn(types.ModuleType):
    """Refuses a whole batch for one bad name, as MLflow does; `is_gone` fails every call."""

    def __init__(self):
        super().__init__("mlflow")
        self.is_gone, self.calls, self.metrics, self.params, self.run = False, 0, {}, {}, None

    def _request(self):
        self.calls += 1
        if self.is_gone:
            raise Refused("connection refused")

    def active_run(self):
        return self.run

    def start_run(self, run_id="r"):
        self._request()
        if run_id != "r":
            raise Refused("it is in the deleted state.")
        self.run = types.SimpleNamespace(
            info=types.SimpleNamespace(run_id="r"), data=types.SimpleNamespace(params=self.params)
        )

    def get_run(self, run_id):
        self._request()
        return self.run

    def log_params(self, params):
        self._request()
        self.params |= {name: str(value) for name, value in params.items()}

    def log_metrics(self, metrics, step, run_id):
        self._request()
        assert run_id == "r"
        for name in metrics:
            norm = posixpath.normpath(name)
            if len(name) > 250 or norm != name or norm == "." or norm[0] in "/" or norm.startswith(".."):
                raise Refused(name)
            if not re.fullmatch(r"[/\w.\- :]+", name):
                raise Refused(name)
        self.metrics[step] = metrics

    def end_run(self, status):
        self.run = None
        self._request()


@pytest.fixture
def mlflow(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def result(iteration, **breakdown):
    return types.SimpleNamespace(iteration=iteration, reward_breakdown=breakdown, to_dict=lambda: {"loss": 1.0})


def test_no_reward_name_costs_an_iteration_its_metrics(mlflow, caplog):
    names = ["acc@1", "acc#1", "a b", "é", "x" * 300, "x" * 301, "../up", "a//b", "/", ""]
    tracker = MLflowCallback()
    tracker.on_train_begin({"lr": 0.1})
    tracker.on_iteration_end(result(1, **{name: float(place) for place, name in enumerate(names)}))
    assert sorted(mlflow.metrics[1].values()) == sorted([1.0, *map(float, range(len(names)))])
    assert {"reward/acc_1": 0.0, "reward/acc_1_2": 1.0}.items() <= mlflow.metrics[1].items()
    assert not caplog.records


def test_a_tracker_gets_no_secret(mlflow, caplog):
    agent = KonicFinetuningAgent(
        base_model="any",
        reward_composer=Brief(),
        dataset_config={"name": "a/b", "token": "plain7Token", "chat_template_kwargs": {"api_key": "plain8Key"}},
        model_kwargs={"token": "plain7Token", "revision": "https://me:plain9@host?sig=plain9"},
    )
    tracker = MLflowCallback()
    tracker.on_train_begin(agent.settings(uses_lora=True))
    assert mlflow.params and not re.search("plain[789]", str(mlflow.params))
    mlflow.log_metrics = lambda *_, **__: exec("raise ConnectionError('https://me:plain9@host?sig=plain9\\x1b[2J')")
    tracker.on_iteration_end(result(1))
    assert "MLflow: ConnectionError: https://***@host?***." in caplog.text


def test_a_server_that_dies_costs_four_calls_and_two_lines_and_no_run_stays_open(mlflow, caplog):
    tracker = MLflowCallback()
    tracker.on_train_begin({"lr": 0.1})
    tracker.on_iteration_end(result(1))
    mlflow.is_gone, before = True, mlflow.calls
    for iteration in range(2, 50):
        tracker.on_iteration_end(result(iteration))
    tracker.on_train_end(None)
    assert mlflow.calls - before == 4
    assert mlflow.run is None
    assert [record.message.split(":")[0] for record in caplog.records] == ["MLflow"] * 2


def test_a_run_that_cannot_be_continued_is_reported_and_a_new_one_is_started(mlflow, caplog, tmp_path):
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "runs.json").write_text('{"mlflow": "deleted"}')
    tracker = MLflowCallback()
    tracker.on_train_begin({"run_folder": str(tmp_path), "iterations_done": 2})
    tracker.on_iteration_end(result(3))
    tracker.on_train_end(None)
    assert caplog.messages == [
        "MLflow: the run so far cannot be continued: Refused: it is in the deleted state. A new one is started."
    ]
    assert list(mlflow.metrics) == [3]
    assert mlflow.run is None
    assert json.loads((tmp_path / "trackers" / "runs.json").read_text()) == {"mlflow": "r"}


def test_settings_that_mlflow_does_not_change_are_named(mlflow, caplog):
    tracker = MLflowCallback()
    for settings in ({"lr": 0.1, "max_iterations": 1}, {"lr": 0.1, "max_iterations": 2}, {"lr": 0.2}):
        assert not caplog.messages
        tracker.on_train_begin(settings)
    assert caplog.messages == ["MLflow keeps the first values of a run for lr: see this run's run.json."]
    assert mlflow.params["lr"] == "0.1"


def test_without_a_run_nothing_is_logged(mlflow):
    mlflow.is_gone, tracker = True, MLflowCallback()
    tracker.on_train_begin({"lr": 0.1})
    mlflow.is_gone = False
    tracker.on_iteration_end(result(1))
    assert not mlflow.metrics


def test_a_server_that_comes_back_gets_the_next_iterations(mlflow):
    tracker = MLflowCallback()
    tracker.on_train_begin({"lr": 0.1})
    for iteration in range(1, 9):
        mlflow.is_gone = iteration in (2, 3, 5, 6)
        tracker.on_iteration_end(result(iteration))
    assert list(mlflow.metrics) == [1, 4, 7, 8]


def test_mlflow_is_told_to_be_brief_unless_the_user_said_otherwise(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", StandIn())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "99")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "")  # so that it is put back
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    MLflowCallback()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "99"


@pytest.mark.parametrize("module", ["mlflow", "tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_an_error_that_names_the_extra(module, monkeypatch):
    kinds = {"mlflow": MLflowCallback, "tensorboard": TensorBoardCallback, "trackio": TrackioCallback}
    kind = kinds.get(module, WandbCallback)
    monkeypatch.setitem(sys.modules, kind.module, None)
    with pytest.raises(ConfigError, match=rf"{kind.__name__} needs .*konic\[{module}\]"):
        kind()
