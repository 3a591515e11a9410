"""The value head: where it starts, how it is raised, and that an error leaves no trace."""

import pytest
import torch

from konic.finetuning.models.value_head import ValueHead, shift_values


def head(dtype=torch.float32):
    return ValueHead(torch.zeros(11, 4, dtype=dtype), torch.device("cpu"))


@pytest.mark.parametrize(
    ("dtype", "own"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_it_starts_at_zero_in_single_precision_or_better(dtype, own):
    values = head(dtype)(torch.randn(2, 3, 4, dtype=dtype))
    assert (values.shape, values.dtype) == ((2, 3), own)
    assert (values == 0).all()


def test_its_shift_leads_to_the_mean_of_the_first_scores():
    fresh = head()
    assert fresh.starting_shift([1.0, 2.0, 6.0]) == 3.0
    assert fresh.starting_shift([]) == 0.0
    with fresh.shifted(3.0):
        pass
    assert fresh.bias.item() == 3.0
    assert fresh.starting_shift([1.0]) == -2.0


def test_an_error_undoes_a_shift():
    fresh = head()
    with fresh.shifted(1.0):
        pass
    with pytest.raises(ZeroDivisionError), fresh.shifted(3.0):
        assert 1 / (fresh.bias.item() - 4.0)
    assert fresh.bias.item() == 1.0


def test_shifted_values_are_those_of_a_shifted_head():
    fresh = head(torch.float64)
    torch.nn.init.constant_(fresh.weight, 0.5)
    hidden, mask = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[True, True, False], [True, False, False]])
    shifted = shift_values(torch.where(mask, fresh(hidden), 0.0), mask, 2.5)
    with fresh.shifted(2.5):
        expected = fresh(hidden)
    assert torch.allclose(shifted[mask], expected[mask], atol=1e-15)
    assert (shifted[~mask] == 0).all()


def test_it_comes_back_from_its_file(tmp_path):
    fresh, other = head(), head()
    torch.nn.init.constant_(fresh.weight, 0.25)
    with fresh.shifted(2.0):
        fresh.save(tmp_path)
    other.load(tmp_path)
    assert torch.equal(other.weight, fresh.weight)
    assert torch.equal(other.bias, fresh.bias)


def test_making_one_draws_no_random_number():
    """Or everything drawn after it would depend on whether there is a value head."""
    before = torch.random.get_rng_state()
    head()
    assert torch.equal(torch.random.get_rng_state(), before)
