import random
from itertools import combinations, pairwise

import pytest
import torch

from konic.finetuning.models import length_groups as grouping
from konic.finetuning.models.length_groups import group_by_length


def masks(prompt_lengths, response_lengths):
    """Prompts padded on the left, responses on the right, both wider than they need be."""
    prompt = torch.zeros(len(prompt_lengths), max(prompt_lengths) + 2, dtype=torch.bool)
    response = torch.zeros(len(response_lengths), max(response_lengths) + 3, dtype=torch.bool)
    for row, (p, r) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        prompt[row, prompt.shape[1] - p :], response[row, :r] = True, True
    return prompt, response


def groups_of(prompt_lengths, response_lengths, at_most=None):
    groups = group_by_length(*masks(prompt_lengths, response_lengths), at_most)
    return [group.tolist() for group in groups]


def cost(groups, prompt_lengths, response_lengths):
    return sum(
        len(rows) * (max(prompt_lengths[row] for row in rows) + max(response_lengths[row] for row in rows))
        + grouping.cost_of_a_pass(torch.device("cpu"))
        for rows in groups
    )


def every_cut(order, at_most):
    for count in range(len(order)):
        for cuts in combinations(range(1, len(order)), count):
            bounds = [0, *cuts, len(order)]
            groups = [order[start:end] for start, end in pairwise(bounds)]
            if all(len(rows) <= at_most for rows in groups):
                yield groups


@pytest.mark.parametrize("cost_of_a_pass", [0, 5, 64])
@pytest.mark.parametrize("num_rows", range(1, 8))
def test_no_other_cut_of_the_sorted_rows_costs_less(num_rows, cost_of_a_pass, monkeypatch):
    monkeypatch.setattr(grouping, "cost_of_a_pass", lambda device: cost_of_a_pass)
    generator = random.Random(num_rows)
    for _ in range(6):
        prompts, responses = ([generator.randint(1, 40) for _ in range(num_rows)] for _ in range(2))
        order = sorted(range(num_rows), key=lambda row: prompts[row] + responses[row])
        for at_most in (None, 1, 2, 3):
            groups = groups_of(prompts, responses, at_most)
            least = min(cost(cut, prompts, responses) for cut in every_cut(order, at_most or num_rows))
            assert [row for rows in groups for row in rows] == order
            assert cost(groups, prompts, responses) == least


@pytest.mark.parametrize("at_most", [None, 1, 4, 7, 100])
def test_every_row_is_in_one_group_of_at_most_so_many(at_most):
    generator = random.Random(2)
    prompts, responses = ([generator.randint(1, 90) for _ in range(50)] for _ in range(2))
    groups = groups_of(prompts, responses, at_most)
    assert sorted(row for rows in groups for row in rows) == list(range(50))
    assert max(len(rows) for rows in groups) <= (at_most or 50)
    assert all(groups)


def test_rows_of_one_length_are_one_group():
    assert groups_of([5] * 30, [9] * 30) == [list(range(30))]


def test_rows_of_one_length_make_as_few_groups_as_fit():
    assert sorted(len(rows) for rows in groups_of([5] * 10, [9] * 10, at_most=4)) in ([2, 4, 4], [3, 3, 4])


def test_rows_of_very_different_lengths_are_split():
    assert groups_of([10] * 6, [300, 2, 300, 2, 2, 300]) == [[1, 3, 4], [0, 2, 5]]
    assert groups_of([300, 2, 300, 2, 2, 300], [10] * 6) == [[1, 3, 4], [0, 2, 5]]


def test_rows_of_little_difference_stay_together():
    assert groups_of([10] * 4, [7, 9, 8, 6]) == [[3, 0, 2, 1]]


def test_a_long_prompt_does_not_join_a_long_response_of_the_same_sum():
    assert groups_of([200, 10, 10], [10, 200, 195]) == [[2], [0], [1]]


def test_the_same_masks_make_the_same_groups():
    generator = random.Random(5)
    prompts, responses = ([generator.randint(1, 20) for _ in range(40)] for _ in range(2))
    assert len({str(groups_of(prompts, responses, 6)) for _ in range(3)}) == 1


def test_groups_index_the_tensors_they_were_made_from():
    prompt, response = masks([3, 1, 2], [1, 100, 2])
    groups = group_by_length(prompt, response, None)
    assert all(group.dtype == torch.int64 and group.device == prompt.device for group in groups)
    assert sum(response[group].sum() for group in groups) == response.sum()
