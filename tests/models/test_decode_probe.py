import json
import os

import pytest
import torch

from conftest import tiny_model
from konic.finetuning import ConfigError
from konic.finetuning.models import decode_probe
from konic.finetuning.models.decode_probe import choose_plan, plan_from, plan_timings
from konic.finetuning.models.prepacked import DecodePlan, layouts

DEFAULT, PLAIN, MKL = DecodePlan(), DecodePlan("plain"), DecodePlan("mkl")


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A model that is measured although it is tiny; what is measured goes to tmp_path / "cache"."""
    monkeypatch.setattr(decode_probe, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(decode_probe, "is_intel", lambda: False)
    monkeypatch.setenv("KONIC_CACHE", str(tmp_path / "cache"))
    return tiny_model("llama", torch.float32)


@pytest.fixture
def measured(monkeypatch):
    """The numbers of rows that were measured; the measurement says that the plain layout is fastest."""
    counts = []

    def measure(layers, num_rows):
        counts.append(num_rows)
        return {DEFAULT: (0.2, 2.0), PLAIN: (0.1, 1.0)}

    monkeypatch.setattr(decode_probe, "_measure", measure)
    return counts


def cached(tmp_path):
    (file,) = (tmp_path / "cache").iterdir()
    return file


def test_every_layout_is_measured_for_real_and_fewer_threads_with_the_fastest(model, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    timings = plan_timings(model, 4)
    assert {plan.layout for plan in timings if plan.threads is None} == set(layouts())
    assert [plan.threads for plan in timings if plan.threads is not None] == [1]
    assert all(0 < seconds < 1 for timing in timings.values() for seconds in timing)
    assert choose_plan(model, 4, 48, "auto") in timings


def test_the_first_layers_are_measured_up_to_a_size(monkeypatch):
    model, measured = tiny_model("llama", torch.float32), []
    monkeypatch.setattr(decode_probe, "_measure", lambda layers, num_rows: measured.append(layers) or {})
    assert plan_timings(model, 4) == {}
    monkeypatch.setattr(decode_probe, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(decode_probe, "SAMPLE_BYTES", 1)
    plan_timings(model, 4)
    assert measured == [[model.model.layers[0].self_attn.q_proj]]


def test_a_choice_is_remembered_for_these_rows_and_this_machine(model, measured, monkeypatch):
    assert [choose_plan(model, rows, 48, "auto") for rows in (4, 4, 5)] == [PLAIN] * 3
    assert measured == [4, 5]
    for place, name, value in (
        (decode_probe, "processor_name", lambda: "another"),
        (torch, "__version__", "2.0"),
        (torch, "get_num_threads", lambda: 77),
    ):
        monkeypatch.setattr(place, name, value)
        choose_plan(model, 4, 48, "auto")
    choose_plan(tiny_model("gpt2", torch.float32), 4, 48, "auto")
    assert measured == [4, 5, 4, 4, 4, 4]


def damaged(record, place, value):
    record["plans"][0][place] = value
    return json.dumps(record)


BROKEN = {
    "nothing": lambda record: "",
    "no JSON": lambda record: "{",
    "a list": lambda record: "[]",
    "of another machine": lambda record: json.dumps(record | {"of": record["of"] | {"rows": 9}}),
    "no plans": lambda record: json.dumps(record | {"plans": []}),
    "plans of another kind": lambda record: json.dumps(record | {"plans": 3}),
    "an unknown layout": lambda record: damaged(record, "plan", {"layout": "none", "threads": None}),
    "too many threads": lambda record: damaged(record, "plan", {"layout": "plain", "threads": 10**6}),
    "no plan": lambda record: damaged(record, "plan", ["plain"]),
    "a time that is none": lambda record: damaged(record, "seconds", [1.0, float("nan")]),
    "negative times": lambda record: damaged(record, "seconds", [1.0, -1.0]),
    "one time": lambda record: damaged(record, "seconds", [1.0]),
    "a time beyond all floats": lambda record: damaged(record, "seconds", [1.0, 10**400]),
    "a deep one": lambda record: "[" * 10**5,
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_measured_again(model, measured, tmp_path, damage):
    choose_plan(model, 4, 48, "auto")
    whole = cached(tmp_path).read_text()
    cached(tmp_path).write_text(damage(json.loads(whole)))
    assert choose_plan(model, 4, 48, "auto") == PLAIN
    assert measured == [4, 4]
    assert cached(tmp_path).read_text() == whole


def test_what_others_can_write_is_measured_again(model, measured, tmp_path):
    choose_plan(model, 4, 48, "auto")
    cached(tmp_path).chmod(0o666)
    assert choose_plan(model, 4, 48, "auto") == PLAIN
    assert measured == [4, 4]
    assert cached(tmp_path).stat().st_mode & 0o022 == 0


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner here")
def test_what_another_user_wrote_is_not_read(model, measured, monkeypatch):
    choose_plan(model, 4, 48, "auto")
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    other = os.stat(__file__).st_uid
    assert choose_plan(model, 4, 48, "auto") == (PLAIN if other == 0 else DEFAULT)


def test_without_a_place_to_remember_it_the_default_is_taken(model, measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KONIC_CACHE", str(tmp_path / "file"))
    assert choose_plan(model, 4, 48, "auto") == DEFAULT


def test_a_named_layout_is_taken_without_measuring(model, measured, monkeypatch):
    assert choose_plan(model, 4, 48, "plain") == PLAIN
    monkeypatch.setattr(decode_probe, "layouts", lambda dtype: ("plain", "onednn"))
    with pytest.raises(
        ConfigError, match=r"decode_layout='mkl' is not part .* for float32, which has plain, onednn\. Leave it out, or"
    ):
        choose_plan(model, 4, 48, "mkl")
    assert measured == []


@pytest.mark.parametrize(
    ("is_intel", "num_rows", "dtype", "expected"),
    [
        (False, 1, torch.float32, DEFAULT),
        (False, 8, torch.float32, DEFAULT),
        (True, 1, torch.float32, PLAIN),
        (True, 2, torch.float32, MKL),
        (True, 8, torch.bfloat16, DEFAULT),
    ],
)
def test_without_a_word_the_maker_of_the_processor_decides(
    model, measured, monkeypatch, is_intel, num_rows, dtype, expected
):
    monkeypatch.setattr(decode_probe, "is_intel", lambda: is_intel)
    monkeypatch.setattr(decode_probe, "layouts", lambda dtype: ("plain", "onednn", *["mkl"][: dtype.itemsize // 4]))
    assert choose_plan(model.to(dtype), num_rows, 48, None) == expected
    assert measured == []
    monkeypatch.setattr(decode_probe, "layouts", lambda dtype: ("plain", "onednn"))  # a torch without MKL
    assert choose_plan(model, num_rows, 48, None) == DEFAULT


def test_another_plan_than_the_usual_one_is_taken_only_where_it_is_clearly_faster():
    timings = {DEFAULT: (0.1, 1.0), MKL: (0.1, 0.95), PLAIN: (0.1, 1.0)}
    for usual in timings:
        assert decode_probe._fastest(timings, 48, usual) == usual
    assert decode_probe._fastest(timings | {MKL: (0.1, 0.8)}, 48, DEFAULT) == MKL
    assert decode_probe._fastest({}, 48, MKL) == MKL


def test_the_layouts_of_bfloat16_are_its_own(model):
    model = model.bfloat16()
    with pytest.raises(ConfigError, match=r"'mkl' is not part of this build of torch for bfloat16, which has plain"):
        choose_plan(model, 4, 48, "mkl")
    assert {plan.layout for plan in plan_timings(model, 4)} == set(layouts(torch.bfloat16))
    in_bfloat16 = plan_timings(model, 4)
    assert plan_timings(model.float(), 4) != in_bfloat16, "each dtype is measured"


@pytest.mark.parametrize("dtype, num_tokens", [(torch.float64, 48), (torch.float16, 48), (torch.float32, 8)])
def test_where_nothing_is_packed_nothing_is_measured(model, measured, dtype, num_tokens):
    assert choose_plan(model.to(dtype), 4, num_tokens, "auto") == DEFAULT
    assert measured == []


@pytest.mark.parametrize(
    "timings, num_tokens, plan",
    [
        ({DEFAULT: (1.0, 1.0), PLAIN: (1.0, 0.91)}, 100, DEFAULT),  # noise
        ({DEFAULT: (1.0, 1.0), PLAIN: (1.0, 0.89)}, 100, PLAIN),
        ({DEFAULT: (10.0, 1.0), PLAIN: (1.0, 1.3)}, 16, PLAIN),  # packing takes longer than it saves
        ({DEFAULT: (10.0, 1.0), PLAIN: (1.0, 1.3)}, 48, DEFAULT),
        ({DEFAULT: (2.0, 2.0), PLAIN: (1.0, 3.0), MKL: (2.0, 1.0), DecodePlan("mkl", 2): (2.0, 0.5)}, 48,
         DecodePlan("mkl", 2)),
        ({}, 48, DEFAULT),
    ],
)  # fmt: skip
def test_the_plan_with_the_least_time_wins_if_the_default_is_clearly_slower(
    monkeypatch, model, timings, num_tokens, plan
):
    monkeypatch.setattr(decode_probe, "_measure", lambda layers, num_rows: timings)
    assert choose_plan(model, 4, num_tokens, "auto") == plan


def test_threads_are_halved_as_long_as_that_is_faster(monkeypatch):
    seconds = {None: 8.0, 8: 4.0, 4: 2.0, 2: 3.0, 1: 1.0}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(decode_probe, "layouts", lambda dtype: ("plain", "onednn"))
    slower = {"plain": 0.0, "onednn": 1.0}
    monkeypatch.setattr(decode_probe, "_pack", lambda layers, num_rows, layout: (1.0, []))
    times = lambda products, plan: seconds[plan.threads] + slower[plan.layout]  # noqa: E731
    monkeypatch.setattr(decode_probe, "_multiply", times)
    timings = decode_probe._measure([torch.nn.Linear(1, 1)], 4)
    assert {plan: step for plan, (_, step) in timings.items()} == {
        PLAIN: 8.0, DEFAULT: 9.0, DecodePlan("plain", 8): 4.0, DecodePlan("plain", 4): 2.0, DecodePlan("plain", 2): 3.0,
    }  # fmt: skip


@pytest.mark.parametrize("record", [
    None, "plain", {}, {"layout": "plain"}, {"layout": ["plain"], "threads": None}, {"layout": "plain", "threads": 0},
    {"layout": "plain", "threads": True}, {"layout": "plain", "threads": 1.0}, {"layout": "x", "threads": None},
    {"layout": "plain", "threads": None, "more": 1},
])  # fmt: skip
def test_a_record_that_is_no_plan_is_none(record):
    assert plan_from(record, torch.float32) is None
    assert plan_from({"layout": "plain", "threads": 1}, torch.float32) == DecodePlan("plain", 1)
    assert plan_from({"layout": "mkl", "threads": 1}, torch.bfloat16) is None
