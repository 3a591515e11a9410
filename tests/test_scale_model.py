"""The model of scaling, by cases worked by hand."""

import sys
from pathlib import Path

import pyarrow.parquet
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from scale_model import (
    BYTES_OF_A_RESPONSE,
    BYTES_OF_A_STEP,
    BYTES_OF_A_TOKEN,
    Cluster,
    Line,
    Link,
    Worker,
    drawn_lengths,
    iteration,
    lengths_of_run,
    message_seconds,
    ring_seconds,
    sampling_seconds,
    shares,
    stops_scaling,
    sum_seconds,
)

NO_LINK = Link(0.0, 1.0)
STEP = Line(((0, 1.0), (1, 3.0)))  # 1 s, and 2 s for each response


@pytest.mark.parametrize(("amount", "seconds"), [(2, 10), (3, 11), (4, 12), (8, 24), (16, 48), (0, 8), (-9, 0)])
def test_a_line_is_straight_between_its_points_and_beyond_them(amount, seconds):
    assert Line(((2, 10.0), (4, 12.0), (8, 24.0)))(amount) == pytest.approx(seconds)


def test_a_line_of_one_point_is_constant():
    assert Line(((5, 2.0),))(100) == 2.0


def test_shares_are_those_of_the_processes():
    assert [*map(list, shares([1, 2, 3, 4, 5], 2))] == [[1, 2], [3, 4, 5]]


def test_a_step_of_sampling_costs_by_the_responses_that_still_grow():
    assert sampling_seconds([3, 1], STEP) == (1 + 2 * 2) + 2 * (1 + 2)
    assert sampling_seconds([], STEP) == 0


def test_a_sum_over_a_ring():
    assert ring_seconds(400, 4, Link(0.5, 100)) == 2 * 3 * (0.5 + 1)
    assert ring_seconds(400, 1, Link(0.5, 100)) == 0
    cluster = Cluster(nodes=2, per_node=4, inside=Link(0.5, 100), between=Link(1, 10), talk=NO_LINK)
    assert sum_seconds(400, cluster) == 9 + 2 * 1 * (1 + 20)


def test_a_message_is_heard_by_all_others():
    cluster = Cluster(1, 3, NO_LINK, NO_LINK, talk=Link(0.25, 100), read_seconds=2)
    assert message_seconds(300, cluster) == 2 * (4 * 0.25 + 3 + 2)


def test_an_iteration_waits_for_the_process_with_the_longest_responses():
    worker = Worker(STEP, Line(((0, 0.0), (1, 1.0))), Line(((0, 0.5),)), steps=2, gradient_bytes=0)
    times = iteration([3, 1], worker, Cluster(1, 2, NO_LINK, NO_LINK, Link(0.0, 1e30)))
    assert (times.sampling, times.update) == ((9 + 3) / 2, 2 * (3 + 1) / 2)
    assert times.waiting == (9 - 6) + 2 * (3 - 2)
    assert times.total == 9 + 2 * 3 + 0.5
    alone = iteration([3, 1], worker, Cluster(1, 1, NO_LINK, NO_LINK, NO_LINK))
    assert (alone.waiting, alone.gradients, alone.messages) == (0, 0, 0)
    assert alone.total == 11 + 2 * 4 + 0.5


def test_an_iteration_exchanges_gradients_at_each_step_and_messages_of_the_longest_share():
    worker = Worker(Line(((0, 0.0),)), Line(((0, 0.0),)), Line(((0, 0.0),)), steps=3, gradient_bytes=200)
    times = iteration([3, 1, 2], worker, Cluster(1, 2, Link(0.5, 100), NO_LINK, Link(0.0, 1.0)))
    assert times.gradients == 3 * 2 * (0.5 + 1)
    assert times.messages == BYTES_OF_A_TOKEN * 2 * 3 + BYTES_OF_A_RESPONSE * 2 + 3 * BYTES_OF_A_STEP


def test_scaling_stops_where_twice_as_many_processes_gain_little():
    times = {1: 16.0, 2: 8.0, 4: 5.0, 8: 4.5, 16: 1.0}
    assert stops_scaling(times.__getitem__, 16) == 4
    assert stops_scaling(times.__getitem__, 2) == 2


def test_lengths_are_drawn_by_seed_up_to_the_limit():
    lengths = drawn_lengths(20_000, mean=8, limit=1000)
    assert lengths == drawn_lengths(20_000, mean=8, limit=1000)
    assert sum(lengths) / len(lengths) == pytest.approx(8, rel=0.03)
    assert set(drawn_lengths(100, mean=1000, limit=3)) <= {1, 2, 3}


def test_lengths_of_a_run_are_those_of_its_responses_in_order(tmp_path):
    (tmp_path / "completions").mkdir()
    for name, ids in (("000002", [[5]]), ("000001", [[1, 2, 3], [4, 4]])):
        pyarrow.parquet.write_table(pyarrow.table({"token_ids": ids}), tmp_path / "completions" / f"{name}.parquet")
    assert lengths_of_run(tmp_path) == [3, 2, 1]
    with pytest.raises(SystemExit, match="has no completions/"):
        lengths_of_run(tmp_path / "completions")
