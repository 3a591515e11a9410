"""The model of scaling, by cases worked by hand."""

import json
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from scale_formulas import (
    BYTES_OF_A_RESPONSE,
    BYTES_OF_A_SCORE,
    BYTES_OF_A_STEP,
    BYTES_OF_A_TOKEN,
    Cluster,
    Line,
    Link,
    Network,
    Worker,
    drawn_lengths,
    iteration,
    lengths_of_run,
    message_seconds,
    most_uneven,
    read_lengths,
    ring_seconds,
    sampling_seconds,
    shares,
    stops_scaling,
    sum_seconds,
    total_seconds,
)
from scale_model import ADAPTER_BYTES, LENGTHS, LIMIT, check, cpu_worker, gpu_worker, measured_network, span

NO_LINK = Link(0.0, 1.0)
NOTHING = Line(((0, 0.0),))
STEP = Line(((0, 1.0), (1, 3.0)))  # 1 s, and 2 s for each response
PROMPTS = Line(((0, 0.0), (1, 10.0)))


@pytest.mark.parametrize(("amount", "seconds"), [(2, 10), (3, 11), (4, 12), (8, 24), (16, 48), (0, 8), (-9, 0)])
def test_a_line_is_straight_between_its_points_and_beyond_them(amount, seconds):
    assert Line(((2, 10.0), (4, 12.0), (8, 24.0)))(amount) == pytest.approx(seconds)


def test_a_line_of_one_point_is_constant():
    assert Line(((5, 2.0),))(100) == 2.0


def test_shares_are_those_of_the_processes():
    assert [*map(list, shares([1, 2, 3, 4, 5], 2))] == [[1, 2], [3, 4, 5]]


def test_the_most_uneven_block_is_that_whose_halves_differ_most():
    assert most_uneven([9, 9, 1, 5, 1, 2, 7], 2) == [1, 5]
    assert most_uneven([1, 9, 9, 1, 5, 5, 1, 1], 4) == [5, 5, 1, 1]


def test_a_step_of_sampling_costs_by_the_responses_that_still_grow():
    assert sampling_seconds([3, 1], NOTHING, STEP) == (1 + 2 * 2) + 2 * (1 + 2)
    assert sampling_seconds([3, 1], PROMPTS, STEP) == 2 * 10 + 11
    assert sampling_seconds([], PROMPTS, STEP) == 0


def test_a_sum_over_a_ring():
    assert ring_seconds(400, 4, Link(0.5, 100)) == 2 * 3 * (0.5 + 1)
    assert ring_seconds(400, 1, Link(0.5, 100)) == 0
    cluster = Cluster(nodes=2, per_node=4, inside=Link(0.5, 100), between=Link(1, 10), talk=NO_LINK)
    assert sum_seconds(400, cluster) == 9 + 2 * 1 * (1 + 20)


def test_a_message_is_heard_by_all_others():
    cluster = Cluster(1, 3, NO_LINK, NO_LINK, talk=Link(0.25, 100))
    assert message_seconds(300, cluster) == 2 * (0.25 + 3)


def test_an_iteration_waits_for_the_process_with_the_longest_responses():
    worker = Worker(NOTHING, STEP, Line(((0, 0.0), (1, 1.0))), Line(((0, 0.5),)), steps=2, gradient_bytes=0)
    times = iteration([3, 1], worker, Cluster(1, 2, NO_LINK, NO_LINK, Link(0.0, 1e30)))
    assert (times.sampling, times.update) == ((9 + 3) / 2, 2 * (3 + 1) / 2)
    assert times.waiting == (9 - 6) + 2 * (3 - 2)
    assert times.total == 9 + 2 * 3 + 0.5
    alone = iteration([3, 1], worker, Cluster(1, 1, NO_LINK, NO_LINK, NO_LINK))
    assert (alone.waiting, alone.gradients, alone.messages) == (0, 0, 0)
    assert alone.total == 11 + 2 * 4 + 0.5


def test_an_iteration_exchanges_gradients_at_each_step_and_messages_of_the_longest_share():
    worker = Worker(NOTHING, NOTHING, NOTHING, NOTHING, steps=3, gradient_bytes=200)
    times = iteration([3, 1, 2], worker, Cluster(1, 2, Link(0.5, 100), NO_LINK, Link(0.0, 1.0)))
    assert times.gradients == 3 * 2 * (0.5 + 1)
    rewards = BYTES_OF_A_RESPONSE * 2 + BYTES_OF_A_SCORE * 3
    assert times.messages == BYTES_OF_A_TOKEN * 2 * 3 + rewards + 3 * BYTES_OF_A_STEP


def test_work_on_all_responses_is_by_their_tokens_however_many_processes_there_are():
    worker = Worker(NOTHING, NOTHING, NOTHING, Line(((0, 1.0), (4, 3.0))), steps=1, gradient_bytes=0)
    network = Network(NO_LINK, NO_LINK, Link(0.0, 1e30))
    assert [iteration([3, 1, 2], worker, network.cluster(1, size)).rest for size in (1, 2, 3)] == [4, 4, 4]
    assert total_seconds([3, 1, 2], worker, network, 16) == 4


def test_scaling_stops_where_twice_as_many_processes_gain_little():
    times = {1: 16.0, 2: 8.0, 4: 5.0, 8: 4.5, 16: 1.0}
    assert stops_scaling(times.__getitem__, 16) == 4
    assert stops_scaling(times.__getitem__, 2) == 2


def test_lengths_are_drawn_by_seed_from_those_known():
    lengths = drawn_lengths([1, 1, 1, 5], 20_000)
    assert lengths == drawn_lengths([1, 1, 1, 5], 20_000)
    assert set(lengths) == {1, 5}
    assert lengths.count(5) / len(lengths) == pytest.approx(0.25, abs=0.02)


def test_lengths_of_a_file_are_cut_at_the_limit(tmp_path):
    (tmp_path / "lengths.json").write_text('{"lengths": [7, 3, 9]}')
    assert read_lengths(tmp_path / "lengths.json", 8) == [7, 3, 8]


def test_lengths_of_a_run_are_those_of_its_responses_in_order(tmp_path):
    (tmp_path / "completions").mkdir()
    for name, ids in (("000002", [[5]]), ("000001", [[1, 2, 3], [4, 4]])):
        pyarrow.parquet.write_table(pyarrow.table({"token_ids": ids}), tmp_path / "completions" / f"{name}.parquet")
    assert lengths_of_run(tmp_path) == [3, 2, 1]
    with pytest.raises(SystemExit, match="has no completions/"):
        lengths_of_run(tmp_path / "completions")


def found():
    """Measurements of a core that needs 1 s for prompts and 0.5 s for every step, by the token or not at all."""

    def case(processes, batch, lengths, **measured):
        processor = {"prompts": 1.0, "sampling": 25.0, "update": batch * 48 / processes}
        seconds = {"waiting": 2.0, "gradients": 0.5, "messages": 0.25}
        of_case = {
            "processes": processes,
            "threads": 1,
            "batch": batch,
            "lengths": lengths,
            "total": 1000.0,
            "rest": 0.5,
        }
        return of_case | {"processor": processor, "seconds": seconds} | measured

    exchanges = {"small message": 0.5, "large message": 1.5, "small sum": 0.5, "large sum": 2.5}
    return {
        "machine": "2 cores of a test", "steps": 2, "message bytes": {"small": 0, "large": 2_000},
        "whole": [{"tokens": 0, "seconds": 0.25}, {"tokens": 1_000, "seconds": 0.25}],
        "exchanges": [{"processes": 2} | exchanges, {"processes": 8} | exchanges],
        "cases": [case(1, 4, [48] * 4), case(1, 16, [48] * 16), case(2, 8, [48] * 4 + [24] * 4)],
    }  # fmt: skip


def test_a_core_is_modelled_from_one_process():
    worker = cpu_worker(found())
    assert (worker.prompts(8), worker.decode_step(8), worker.optimizer_step(480)) == (1, 0.5, 240)
    assert worker.rest(5_000) == 0.25


def test_the_work_on_all_responses_is_taken_from_the_update_of_a_gpu():
    worker = gpu_worker(found() | {"whole": [{"tokens": 0, "seconds": 0.1}]})
    assert worker.optimizer_step(8 * 48) == pytest.approx(0.314 - 0.194 - 0.1)
    assert iteration([48] * 8, worker, Network(NO_LINK, NO_LINK, NO_LINK).cluster(1, 1)).total == pytest.approx(0.314)


def test_a_network_gives_back_the_exchanges_that_it_was_measured_by():
    cluster = measured_network(found(), 8).cluster(1, 8)
    assert (message_seconds(0, cluster), message_seconds(2_000, cluster)) == pytest.approx((0.5, 1.5))
    assert (sum_seconds(0, cluster), sum_seconds(ADAPTER_BYTES, cluster)) == pytest.approx((0.5, 2.5))


def test_the_check_compares_waiting_and_the_iteration_of_ragged_responses():
    lines = check(found())
    assert "| 2 | 8 | 24 to 48 | sampling | 19 s | 25 s | -24% |" in lines  # 1 + 24 and 1 + 12, on average
    # 12 s at the end of sampling, and at the end of each step half of 4 * 24 s
    assert "| 2 | 8 | 24 to 48 | waiting | 54 s | 2 s | +2600% |" in lines
    assert lines[-1].startswith("| 2 | 8 | 24 to 48 | iteration |")
    assert len(lines) == 2 + 7


def test_a_range_is_one_number_where_both_ends_are_the_same():
    assert span(1234.5, 1234.9, " s") == "1,230 s"
    assert span(0.001, 2.0) == "0.001 to 2"


def test_the_committed_lengths_are_those_of_a_real_model():
    made = json.loads(LENGTHS.read_text())
    assert len(made["lengths"]) == 128
    assert 1 <= min(made["lengths"]) < max(made["lengths"]) == made["limit"] == LIMIT
