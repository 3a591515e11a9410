import itertools
import math
import statistics

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from konic.finetuning.learning.advantages import token_rewards
from konic.finetuning.learning.losses import (
    POLICY_LOSSES,
    clipped_policy_loss,
    clipped_tokens,
    clipped_weight_loss,
    explained_variance,
    k1,
    k3,
    level_log_ratios,
    log_ratio,
    moves_outward,
    soft_gate_loss,
    unclipped_loss,
    value_loss,
)
from konic.finetuning.models.distributions import (
    entropies,
    entropy_and_kl_,
    exact_kl,
    log_softmax_,
    token_log_probs,
    total_variation,
)

CLIP = (0.2, 0.2)
TOLERANCE = 1e-9
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]
LOGITS = st.floats(-8, 8)


def tensor(values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def plain_log_softmax(logits, temperature=1.0):
    """In plain Python, from the definition."""
    scaled = [logit / temperature for logit in logits]
    top = max(scaled)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    return [x - log_sum for x in scaled]


def plain_kl(p_logits, q_logits):
    log_p, log_q = plain_log_softmax(p_logits), plain_log_softmax(q_logits)
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True) if p > -math.inf)


def plain_kl_gradient(p_logits, q_logits):
    """d KL(p, q) / d logit_i = p_i (log p_i - log q_i - KL)."""
    log_p, log_q = plain_log_softmax(p_logits), plain_log_softmax(q_logits)
    kl = plain_kl(p_logits, q_logits)
    return [math.exp(p) * (p - q - kl) for p, q in zip(log_p, log_q, strict=True)]


@st.composite
def two_distributions(draw):
    size = draw(st.integers(2, 6))
    logits = st.lists(LOGITS, min_size=size, max_size=size)
    return draw(logits), draw(logits)


# --- log-probs, entropy, KL ---


def test_token_log_probs_worked_by_hand():
    logits = tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    log_probs, log_softmax = token_log_probs(logits, torch.tensor([1, 0]), temperature=1.0)
    assert log_probs.tolist() == pytest.approx([math.log(0.75), math.log(0.8)], abs=TOLERANCE)
    assert log_softmax.exp().flatten().tolist() == pytest.approx([0.25, 0.75, 0.8, 0.2], abs=TOLERANCE)


@settings(deadline=None, max_examples=50)
@given(st.lists(LOGITS, min_size=2, max_size=6), st.floats(0.1, 5), st.integers(0, 100))
def test_token_log_probs_are_those_of_the_tempered_softmax(logits, temperature, pick):
    token = pick % len(logits)
    log_probs, log_softmax = token_log_probs(tensor([[logits]]), torch.tensor([[token]]), temperature)
    expected = plain_log_softmax(logits, temperature)
    assert log_probs.shape == (1, 1)
    assert log_probs.item() == pytest.approx(expected[token], abs=TOLERANCE)
    assert log_softmax[0, 0].tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_entropies_worked_by_hand():
    log_softmax = tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3] * 3]).log()
    assert entropies(log_softmax).tolist() == pytest.approx([1.5 * math.log(2), 0.0, math.log(3)], abs=TOLERANCE)


@settings(deadline=None, max_examples=50)
@given(st.lists(LOGITS, min_size=2, max_size=6))
def test_entropies_follow_the_definition(logits):
    log_p = plain_log_softmax(logits)
    got = entropies(tensor([logits]).log_softmax(-1)).item()
    assert got == pytest.approx(-math.fsum(math.exp(x) * x for x in log_p), abs=TOLERANCE)
    assert -TOLERANCE <= got <= math.log(len(logits)) + TOLERANCE


def test_exact_kl_worked_by_hand():
    got = exact_kl(tensor([[0.5, 0.5], [0.25, 0.75]]).log(), tensor([[0.25, 0.75], [0.25, 0.75]]).log())
    assert got.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0], abs=TOLERANCE)


@settings(deadline=None, max_examples=100)
@given(two_distributions())
def test_exact_kl_follows_the_definition_and_is_never_negative(logits):
    got = exact_kl(*(tensor([row]).log_softmax(-1) for row in logits)).item()
    assert got >= 0
    assert got == pytest.approx(plain_kl(*logits), abs=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_entropy_and_kl_in_place_are_the_plain_ones(dtype, temperature):
    logits, ref_logits = random(6, 40, seed=1, scale=4.0).to(dtype), random(6, 40, seed=2, scale=4.0).to(dtype)
    logits[0, 3] = ref_logits[0, 3] = ref_logits[1, 5] = -math.inf
    ref_logits[2] = logits[2]
    plain = [(given / temperature).log_softmax(dim=-1) for given in (logits, ref_logits)]
    expected = entropies(plain[0]), exact_kl(*plain)
    kept = logits.data_ptr()
    over = log_softmax_(logits, temperature)
    torch.testing.assert_close(over, plain[0], rtol=0, atol=0)
    assert over.data_ptr() == kept
    entropy, kl = entropy_and_kl_(over, log_softmax_(ref_logits, temperature))
    torch.testing.assert_close(entropy, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl, expected[1], rtol=1e-6, atol=1e-7)
    assert kl[1] > 1e3
    assert kl[2] == 0.0


def test_exact_kl_of_nearly_equal_distributions_is_not_negative_in_single_precision():
    logits = random(200, 50, seed=3).float()
    kl = exact_kl(logits.log_softmax(-1), (logits + 1e-6 * random(200, 50, seed=4).float()).log_softmax(-1))
    assert (kl >= 0).all()
    assert kl.max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vocabulary_masked_out_with_minus_infinity_makes_no_nan(dtype):
    logits = torch.tensor([[1.0, -math.inf, 0.5, -math.inf]], dtype=dtype, requires_grad=True)
    reference = torch.tensor([[0.2, 3.0, 0.1, -math.inf]], dtype=dtype)
    log_probs, log_softmax = token_log_probs(logits, torch.tensor([2]), 0.7)
    kept, ref_kept = [1.0 / 0.7, 0.5 / 0.7], plain_log_softmax([0.2, 3.0, 0.1])
    log_p = plain_log_softmax(kept)
    expected_kl = sum(math.exp(p) * (p - q) for p, q in zip(log_p, (ref_kept[0], ref_kept[2]), strict=True))
    entropy, kl = entropies(log_softmax), exact_kl(log_softmax, reference.log_softmax(-1))
    assert log_probs.item() == pytest.approx(log_p[1], abs=1e-6)
    assert entropy.item() == pytest.approx(-sum(math.exp(p) * p for p in log_p), abs=1e-6)
    assert kl.item() == pytest.approx(expected_kl, abs=1e-6)
    torch.autograd.backward((log_probs + entropy + kl).sum())
    assert logits.grad.isfinite().all()
    assert logits.grad[0, [1, 3]].tolist() == [0, 0]


def test_total_variation_worked_by_hand():
    p = tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0], [0.0, 0.3, 0.7]]).log()
    q = tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0], [0.0, 0.4, 0.6], [0.0, 0.3, 0.7]]).log()
    assert total_variation(p, q).tolist() == pytest.approx([0.25, 0.5, 1.0, 0.0], abs=TOLERANCE)
    assert total_variation(p, p).tolist() == [0.0] * 4


@settings(deadline=None, max_examples=100)
@given(two_distributions(), st.lists(st.booleans(), min_size=6, max_size=6))
def test_total_variation_is_the_largest_difference_of_the_probability_of_an_event(logits, excluded):
    """Also with tokens that one distribution excludes, or both."""
    p_logits, q_logits = ([-math.inf if gone else x for x, gone in zip(row, excluded, strict=False)] for row in logits)
    p_logits[-1], q_logits[0], q_logits[-1] = logits[0][-1], logits[1][0], logits[1][-1]
    p, q = ([math.exp(x) for x in plain_log_softmax(row)] for row in (p_logits, q_logits))
    changes = [b - a for a, b in zip(p, q, strict=True)]
    largest = max(
        sum(change for change, inside in zip(changes, event, strict=True) if inside)
        for event in itertools.product([False, True], repeat=len(p))
    )
    log_p, log_q = (tensor([row]).log_softmax(-1) for row in (p_logits, q_logits))
    found = total_variation(log_p, log_q).item()
    assert found == pytest.approx(largest, abs=TOLERANCE)
    assert found == pytest.approx(0.5 * math.fsum(map(abs, changes)), abs=TOLERANCE)
    assert 0 <= found <= 1 + TOLERANCE
    assert total_variation(log_q, log_p).item() == found


@settings(deadline=None, max_examples=100)
@given(two_distributions())
def test_total_variation_keeps_to_pinskers_bound(logits):
    found = total_variation(*(tensor([row]).log_softmax(-1) for row in logits)).item()
    assert found**2 <= min(plain_kl(*logits), plain_kl(*logits[::-1])) / 2 + TOLERANCE


def test_log_probs_are_of_the_last_dimension_whatever_is_before_it():
    logits, tokens = random(3, 4, 5), torch.arange(12).view(3, 4) % 5
    log_probs, log_softmax = token_log_probs(logits, tokens, 0.7)
    assert (log_probs.shape, log_softmax.shape) == ((3, 4), (3, 4, 5))
    assert log_probs[2, 1].item() == pytest.approx(plain_log_softmax(logits[2, 1].tolist(), 0.7)[tokens[2, 1]])


def test_entropy_kl_and_total_variation_are_of_the_last_dimension_whatever_is_before_it():
    p, q = (values.log_softmax(-1) for values in (random(3, 4, 5), random(3, 4, 5, seed=1)))
    for function, inputs in ((entropies, (p,)), (exact_kl, (p, q)), (total_variation, (p, q))):
        whole = function(*inputs)
        assert whole.shape == (3, 4)
        for row in range(3):
            for column in range(4):
                one = function(*(distribution[row, column] for distribution in inputs))
                assert one.shape == ()
                assert whole[row, column].item() == pytest.approx(one.item(), rel=1e-12)


def test_what_writes_over_its_input_is_of_the_last_dimension_too():
    logits = random(3, 4, 5), random(3, 4, 5, seed=1)
    p, q = plain = [values.log_softmax(-1) for values in logits]
    over = [log_softmax_(values.clone(), 1.0) for values in logits]
    torch.testing.assert_close(over, plain)
    entropy, kl = entropy_and_kl_(*over)
    torch.testing.assert_close(entropy, entropies(p))
    torch.testing.assert_close(kl, exact_kl(p, q))


def test_exact_kl_from_a_reference_that_excludes_a_likely_token_is_huge_and_not_nan():
    kl = exact_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log())
    assert kl.item() > 1e30


def test_gradients_of_log_probs_entropy_and_kl_are_those_of_finite_differences():
    logits, reference = random(3, 5, seed=1).requires_grad_(), random(3, 5, seed=2).log_softmax(-1)
    tokens = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, tokens, 0.7)[0], logits)
    assert torch.autograd.gradcheck(lambda x: entropies(x.log_softmax(-1)), logits)
    assert torch.autograd.gradcheck(lambda x: exact_kl(x.log_softmax(-1), reference), logits)


# --- KL from the sampled token ---


@settings(deadline=None, max_examples=50)
@given(two_distributions())
def test_k1_and_k3_of_the_sampled_token_expect_the_exact_kl(logits):
    log_p, log_q = (plain_log_softmax(row) for row in logits)
    log_ratios = tensor([p - q for p, q in zip(log_p, log_q, strict=True)])
    for estimate in (k1, k3):
        values = estimate(log_ratios).tolist()
        expected = math.fsum(math.exp(p) * value for p, value in zip(log_p, values, strict=True))
        assert expected == pytest.approx(plain_kl(*logits), abs=TOLERANCE)


def test_k1_and_k3_worked_by_hand():
    log_ratios = tensor([0.0, math.log(2), -math.log(2)])
    assert k1(log_ratios).tolist() == log_ratios.tolist()
    expected = [0.0, 0.5 - 1 + math.log(2), 2 - 1 - math.log(2)]
    assert k3(log_ratios).tolist() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative_however_small_the_ratio(dtype):
    sizes = torch.logspace(-12, 1.3, 2000, dtype=dtype)
    assert (k3(torch.cat([sizes, -sizes])) >= 0).all()


PENALTIES = {  # what is differentiated, expected over y ~ pi; and whether that is the gradient of KL(pi, pi_ref)
    "k1 in the reward": (lambda pi, new, y_kl, kl: (pi * y_kl.detach() * new).sum(), True),
    "exact KL in the reward": (lambda pi, new, y_kl, kl: (pi * kl.detach() * new).sum(), False),
    "k1 in the loss": (lambda pi, new, y_kl, kl: (pi * y_kl).sum(), False),
    "exact KL in the loss": (lambda pi, new, y_kl, kl: kl.sum(), True),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_expected_gradient_of_each_kl_penalty_on_one_token(penalty):
    theta, reference = [0.3, -1.2, 0.8, 0.1], [-0.5, 0.4, 0.9, -1.0]
    logits, tokens = tensor(theta, requires_grad=True), torch.arange(4)
    log_probs, log_softmax = token_log_probs(logits.expand(4, 4), tokens, 1.0)
    ref_log_probs, ref_log_softmax = token_log_probs(tensor(reference).expand(4, 4), tokens, 1.0)
    kl = exact_kl(log_softmax[:1], ref_log_softmax[:1])
    expected_penalty, is_right = PENALTIES[penalty]
    surrogate = expected_penalty(log_probs.exp().detach(), log_probs, k1(log_probs - ref_log_probs), kl)
    (gradient,) = torch.autograd.grad(surrogate, logits)
    truth = plain_kl_gradient(theta, reference)
    assert max(map(abs, truth)) > 0.1
    assert gradient.tolist() == pytest.approx(truth if is_right else [0.0] * 4, abs=TOLERANCE)


def test_the_first_policy_step_descends_beta_times_the_kl():
    """With no score, the policy loss of the token rewards has the gradient of beta KL(pi, pi_ref)."""
    theta, reference, beta = [0.3, -1.2, 0.8], [-0.5, 0.4, 0.9], 0.05
    logits, tokens = tensor(theta, requires_grad=True), torch.arange(3)
    new, _ = token_log_probs(logits.expand(3, 3), tokens, 1.0)
    ref, _ = token_log_probs(tensor(reference).expand(3, 3), tokens, 1.0)
    mask = torch.ones(3, 1, dtype=torch.bool)
    rewards = token_rewards(torch.zeros(3, dtype=torch.float64), (new - ref).detach()[:, None], mask, beta)
    losses = clipped_policy_loss(log_ratio(new[:, None], new.detach()[:, None], mask), rewards, mask, CLIP)
    (gradient,) = torch.autograd.grad((new.exp().detach() * losses[:, 0]).sum(), logits)
    truth = [beta * g for g in plain_kl_gradient(theta, reference)]
    assert gradient.tolist() == pytest.approx(truth, abs=TOLERANCE)


# --- the ratio and the policy loss ---


def test_log_ratio_is_the_difference_clamped_and_zero_outside_the_mask():
    new, old = tensor([[-1.0, -50.0, -1.0, math.nan, -2.0]]), tensor([[-1.5, -1.0, -90.0, 0.0, -math.inf]])
    mask = torch.tensor([[True, True, True, False, False]])
    assert log_ratio(new, old, mask).tolist() == [[0.5, -20.0, 20.0, 0.0, 0.0]]


@given(st.lists(st.tuples(st.floats(-60, 0), st.floats(-60, 0), st.booleans()), min_size=1, max_size=6))
def test_log_ratio_follows_the_definition(pairs):
    new, old = (tensor([pair[side] for pair in pairs]) for side in (0, 1))
    found = log_ratio(new, old, torch.tensor([counts for *_, counts in pairs])).tolist()
    expected = [max(-20.0, min(20.0, a - b)) if counts else 0.0 for a, b, counts in pairs]
    assert found == pytest.approx(expected, abs=1e-12)


@given(st.floats(-3, 3), st.floats(0.05, 0.5), st.booleans())
def test_clipped_tokens_follow_the_definition(log_rho, clip, counts):
    found = clipped_tokens(tensor([[log_rho]]), torch.tensor([[counts]]), (clip, clip)).item()
    assert found == (counts and not 1 - clip <= math.exp(log_rho) <= 1 + clip)


def test_log_ratio_of_equal_log_probs_is_exactly_zero():
    log_probs = random(4, 6, seed=9).float()
    assert not log_ratio(log_probs, log_probs.clone(), torch.ones(4, 6, dtype=torch.bool)).any()


def plain_policy_loss(ratio, advantage, clip):
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    return -min(ratio * advantage, clipped * advantage)


POLICY_CASES = [  # ratio, advantage, loss at clip 0.2, gradient with respect to log ratio
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),
    (0.5, 2.0, -1.0, -1.0),
    (1.5, -2.0, 3.0, 3.0),
    (0.5, -2.0, 1.6, 0.0),
    (0.9, -2.0, 1.8, 1.8),
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), POLICY_CASES)
def test_policy_loss_and_its_gradient_worked_by_hand(ratio, advantage, loss, gradient):
    log_ratios = tensor([[math.log(ratio)]], requires_grad=True)
    got = clipped_policy_loss(log_ratios, tensor([[advantage]]), torch.tensor([[True]]), CLIP)
    assert got.item() == pytest.approx(loss, abs=TOLERANCE)
    torch.autograd.backward(got.sum())
    assert log_ratios.grad.item() == pytest.approx(gradient, abs=TOLERANCE)


@settings(deadline=None, max_examples=100)
@given(st.floats(-3, 3), st.floats(-5, 5), st.floats(0.01, 0.9))
def test_policy_loss_follows_the_papers_formula(log_rho, advantage, clip):
    got = clipped_policy_loss(tensor([[log_rho]]), tensor([[advantage]]), torch.tensor([[True]]), (clip, clip)).item()
    assert got == pytest.approx(plain_policy_loss(math.exp(log_rho), advantage, clip), abs=TOLERANCE)
    assert got >= -math.exp(log_rho) * advantage - TOLERANCE  # a pessimistic bound on the unclipped objective


def test_policy_gradient_is_that_of_finite_differences_away_from_the_corners():
    new = random(3, 4, seed=5, scale=0.5).requires_grad_()
    old, advantages = random(3, 4, seed=6, scale=0.5), random(3, 4, seed=7)
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    corners = ((new.detach() - old).exp() - 1).abs() - 0.2
    assert corners.abs().min() > 1e-3
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(log_ratio(x, old, mask), advantages, mask, CLIP), new)


def test_a_log_ratio_beyond_the_clamp_neither_overflows_nor_gets_gradient():
    new = tensor([[500.0, -500.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    losses = clipped_policy_loss(log_ratio(new, tensor([[0.0, 0.0]]), mask), tensor([[-1.0, 1.0]]), mask, CLIP)
    assert losses.tolist()[0] == pytest.approx([math.exp(20), -math.exp(-20)], rel=1e-12)
    torch.autograd.backward(losses.sum())
    assert new.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_the_padding_changes_neither_policy_loss_nor_gradient(garbage):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    results = []
    for fill in (0.0, garbage):
        new, old, advantages = (torch.where(mask, random(2, 3, seed=s, scale=0.3), fill) for s in (1, 2, 3))
        new.requires_grad_()
        losses = clipped_policy_loss(log_ratio(new, old, mask), advantages, mask, CLIP)
        torch.autograd.backward(losses.sum())
        results.append((losses, new.grad))
    (clean_losses, clean_gradient), (losses, gradient) = results
    assert clean_gradient[mask].all()
    assert torch.equal(losses, clean_losses)
    assert torch.equal(gradient, clean_gradient)
    assert not losses[~mask].any() and not gradient[~mask].any()


ASYMMETRIC = [  # ratio, advantage, loss at ε 0.2 below and 0.5 above, gradient of the loss in the log-ratio
    (1.3, 1.0, -1.3, -1.3),  # within the wider bound above
    (1.6, 1.0, -1.5, 0.0),
    (1.6, -1.0, 1.6, 1.6),
    (0.9, -1.0, 0.9, 0.9),
    (0.7, -1.0, 0.8, 0.0),
    (0.7, 1.0, -0.7, -0.7),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), ASYMMETRIC)
def test_policy_loss_with_two_bounds_worked_by_hand(ratio, advantage, loss, gradient):
    log_ratios = tensor([[math.log(ratio)]], requires_grad=True)
    got = clipped_policy_loss(log_ratios, tensor([[advantage]]), torch.tensor([[True]]), (0.2, 0.5))
    assert got.item() == pytest.approx(loss, abs=TOLERANCE)
    torch.autograd.backward(got.sum())
    assert log_ratios.grad.item() == pytest.approx(gradient, abs=TOLERANCE)
    bound = clipped_tokens(log_ratios, torch.tensor([[True]]), (0.2, 0.5)).item()
    assert bound == (ratio > 1.5 or ratio < 0.8)


def test_a_ratio_of_the_whole_response_is_the_geometric_mean_of_its_tokens():
    log_ratios = tensor([[0.3, -0.1, 0.4, 9.0], [-0.5, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]], requires_grad=True)
    mask = torch.arange(4) < torch.tensor([[3], [1], [0]])
    levelled = level_log_ratios(log_ratios, mask, "sequence")
    for row, count in enumerate((3, 1, 0)):
        ratios = [math.exp(value) for value in log_ratios[row, :count].tolist()]
        mean = math.prod(ratios) ** (1 / count) if count else 1.0
        assert levelled[row, :count].exp().tolist() == pytest.approx([mean] * count, abs=TOLERANCE)
        assert (levelled[row, count:] == 0).all()
    torch.autograd.backward(levelled[:, 0].sum())
    assert log_ratios.grad[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0], abs=TOLERANCE)
    assert log_ratios.grad[1].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert level_log_ratios(log_ratios, mask, "token") is log_ratios


def test_clipped_tokens_are_those_past_the_range_on_either_side():
    log_ratios = tensor([[0.0, math.log(1.19), math.log(1.21), math.log(0.81), math.log(0.79), 3.0]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    assert clipped_tokens(log_ratios, mask, CLIP).tolist() == [[False, False, True, False, True, False]]
    edge = torch.zeros(1, 2)
    assert not clipped_tokens(edge, edge == 0, (0.0, 0.0)).any(), "on the edge is within"


# --- the value loss ---


VALUE_CASES = [  # V, old V, return, loss at clip 0.2, gradient
    (0.1, 0.0, 1.0, 0.405, -0.9),  # within the range
    (0.5, 0.0, 1.0, 0.32, 0.0),  # ran ahead towards the return: the clipped error is larger, and constant
    (0.5, 0.0, -1.0, 1.125, 1.5),  # ran away from it: the unclipped error is larger
    (-0.5, 0.0, -1.0, 0.32, 0.0),
    (0.3, 0.3, 0.3, 0.0, 0.0),
]


@pytest.mark.parametrize(("value", "old", "target", "loss", "gradient"), VALUE_CASES)
def test_value_loss_and_its_gradient_worked_by_hand(value, old, target, loss, gradient):
    values = tensor([[value]], requires_grad=True)
    got = value_loss(values, tensor([[old]]), tensor([[target]]), torch.tensor([[True]]), 0.2)
    assert got.item() == pytest.approx(loss, abs=TOLERANCE)
    torch.autograd.backward(got.sum())
    assert values.grad.item() == pytest.approx(gradient, abs=TOLERANCE)


@settings(deadline=None, max_examples=100)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(0.01, 2))
def test_value_loss_follows_its_formula(value, old, target, clip):
    got = value_loss(tensor([[value]]), tensor([[old]]), tensor([[target]]), torch.tensor([[True]]), clip).item()
    kept_near = min(max(value, old - clip), old + clip)
    assert got == pytest.approx(0.5 * max((value - target) ** 2, (kept_near - target) ** 2), abs=TOLERANCE)


def test_value_gradient_is_that_of_finite_differences_away_from_the_corners():
    values = random(3, 4, seed=11).requires_grad_()
    old, returns = random(3, 4, seed=12), random(3, 4, seed=13)
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, mask, 0.2), values)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_the_padding_changes_neither_value_loss_nor_gradient(garbage):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    results = []
    for fill in (0.0, garbage):
        head, old, returns = (torch.where(mask, random(2, 3, seed=s), fill) for s in (1, 2, 3))
        head.requires_grad_()
        losses = value_loss(torch.where(mask, head, 0.0), old, returns, mask, 0.2)
        torch.autograd.backward(losses.sum())
        results.append((losses, head.grad))
    (clean_losses, clean_gradient), (losses, gradient) = results
    assert clean_gradient[mask].any()
    assert torch.equal(losses, clean_losses)
    assert torch.equal(gradient, clean_gradient)


# --- explained variance ---


def test_explained_variance_is_one_for_the_truth_zero_for_a_constant_and_negative_for_worse():
    targets, mask = tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    assert explained_variance(targets, targets, mask).item() == 1
    assert explained_variance(torch.full_like(targets, 7.0), targets, mask).item() == pytest.approx(0, abs=TOLERANCE)
    assert explained_variance(-targets, targets, mask).item() == pytest.approx(-3, abs=TOLERANCE)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.booleans()), min_size=2, max_size=8))
def test_explained_variance_follows_the_definition_over_the_mask(triples):
    counted = [(p, t) for p, t, counts in triples if counts]
    assume(len(counted) >= 2 and statistics.pstdev(t for _, t in counted) >= 1e-2)
    predictions = tensor([[p if counts else math.nan for p, _, counts in triples]])
    targets = tensor([[t if counts else math.inf for _, t, counts in triples]])
    got = explained_variance(predictions, targets, torch.tensor([[counts for *_, counts in triples]])).item()
    variance = statistics.pvariance([t for _, t in counted])
    expected = 1 - statistics.pvariance([t - p for p, t in counted]) / variance
    assert got == pytest.approx(expected, rel=TOLERANCE, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 7, 100])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1000.1])
def test_explained_variance_of_targets_that_do_not_vary_is_nan(value, count, dtype):
    targets = torch.full((1, count), value, dtype=dtype)
    got = explained_variance(torch.arange(count, dtype=dtype)[None], targets, torch.ones(1, count, dtype=torch.bool))
    assert got.isnan()


# --- the losses of other algorithms ---

ONE = torch.tensor([[True]])


@pytest.mark.parametrize(
    ("log_rho", "advantage", "weight"),
    [(0.0, 2.0, 1.0), (math.log(3.0), 2.0, 3.0), (math.log(7.0), 2.0, 5.0), (math.log(7.0), -2.0, 5.0),
     (-3.0, 2.0, math.exp(-3.0)), (-3.0, -2.0, math.exp(-3.0))],
)  # fmt: skip
def test_cispos_token_weighs_its_ratio_up_to_the_clip_and_keeps_its_gradient(log_rho, advantage, weight):
    new = tensor([[log_rho]], requires_grad=True)
    loss = clipped_weight_loss(new, tensor([[advantage]]), ONE, (1.0, 4.0))
    loss.sum().backward()
    assert loss.item() == pytest.approx(-weight * advantage * log_rho, abs=TOLERANCE)
    assert new.grad.item() == pytest.approx(-weight * advantage, abs=TOLERANCE)


@pytest.mark.parametrize(("low", "high", "weight"), [(0.3, 4.0, 0.7), (0.9, 4.0, math.exp(-1.0))])
def test_cispos_weight_may_have_a_lower_end(low, high, weight):
    new = tensor([[-1.0]], requires_grad=True)
    clipped_weight_loss(new, tensor([[1.0]]), ONE, (low, high)).sum().backward()
    assert new.grad.item() == pytest.approx(-weight, abs=TOLERANCE)


@given(log_rho=st.floats(-3, 3), advantage=st.floats(-4, 4))
def test_sapos_gate_is_its_sigmoid_with_another_temperature_for_each_sign(log_rho, advantage):
    rho, tau = math.exp(log_rho), 1.0 if advantage > 0 else 1.05
    gate = 4 / tau / (1 + math.exp(-tau * (rho - 1)))
    new = tensor([[log_rho]], requires_grad=True)
    loss = soft_gate_loss(new, tensor([[advantage]]), ONE, CLIP)
    loss.sum().backward()
    assert loss.item() == pytest.approx(-gate * advantage, abs=TOLERANCE)
    # d gate / d log ρ = 4 σ (1 − σ) ρ: 1 at ρ = 1, and fading on both sides
    sigma = gate * tau / 4
    assert new.grad.item() == pytest.approx(-4 * sigma * (1 - sigma) * rho * advantage, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.0, 2.0, -2.0), (1.5, 2.0, -3.0), (10.0, 1.0, -10.0), (0.5, -2.0, 1.0), (10.0, -1.0, 10.0), (0.1, 3.0, -0.3)],
)
def test_unclipped_loss_and_its_gradient_worked_by_hand(ratio, advantage, loss):
    new = tensor([[math.log(ratio)]], requires_grad=True)
    got = unclipped_loss(new, tensor([[advantage]]), ONE, CLIP)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, abs=TOLERANCE)
    assert new.grad.item() == pytest.approx(loss, abs=TOLERANCE)


@settings(deadline=None, max_examples=100)
@given(st.lists(LOGITS, min_size=2, max_size=6), st.integers(0, 100), st.floats(-6, 0), st.floats(-4, 4), st.booleans())
def test_unclipped_loss_has_the_policy_gradient_times_the_ratio(logits, pick, old, advantage, counts):
    token, theta, mask = pick % len(logits), tensor([[logits]], requires_grad=True), torch.tensor([[counts]])
    new, _ = token_log_probs(theta, torch.tensor([[token]]), 1.0)
    loss = unclipped_loss(new - old, tensor([[advantage]]), mask, CLIP)
    loss.sum().backward()
    log_p = plain_log_softmax(logits)
    scale = -math.exp(log_p[token] - old) * advantage if counts else 0.0
    assert loss.item() == pytest.approx(scale, rel=TOLERANCE, abs=TOLERANCE)
    expected = [scale * ((index == token) - math.exp(x)) for index, x in enumerate(log_p)]
    assert theta.grad[0, 0].tolist() == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_unclipped_loss_knows_no_clip():
    log_ratios, advantages, mask = random(3, 5, seed=1), random(3, 5, seed=2), random(3, 5, seed=3) > -0.5
    found = [unclipped_loss(log_ratios, advantages, mask, clip) for clip in ((0.2, 0.2), (0.0, 0.0), (0.9, 9.0))]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


OUTWARD = [  # ratio, advantage, divergence, beyond a limit of 0.25 and going on
    (1.5, 2.0, 0.3, True),
    (1.5, -2.0, 0.3, False),
    (0.5, 2.0, 0.3, False),
    (0.5, -2.0, 0.3, True),
    (1.5, 2.0, 0.25, False),  # on the limit is within
    (0.5, -2.0, 0.25, False),
    (1.0, 2.0, 0.3, False),  # its own probability has not moved
    (1.0, -2.0, 0.3, False),
    (1.5, 0.0, 0.3, False),  # and goes nowhere
    (0.5, 0.0, 0.3, False),
    (1.001, 0.001, 0.3, True),
    (0.999, -0.001, 0.3, True),
    (9.0, 9.0, 0.0, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "divergence", "outward"), OUTWARD)
def test_moves_outward_worked_by_hand(ratio, advantage, divergence, outward):
    new = tensor([[math.log(ratio)]], requires_grad=True)
    found = moves_outward(new, tensor([[advantage]]), tensor([[divergence]]), 0.25)
    assert found.dtype == torch.bool
    assert found.tolist() == [[outward]]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(*[st.integers(-16, 16).map(lambda n: n / 8)] * 2, st.integers(0, 8)), min_size=1, max_size=9),
    st.integers(1, 8),
)
def test_moves_outward_follows_the_papers_mask(tokens, limit):
    log_ratios, advantages, moved = (tensor([row]) for row in zip(*tokens, strict=True))
    expected = []
    for log_rho, advantage, divergence in tokens:
        rho = math.exp(log_rho)
        expected.append(divergence > limit and ((advantage > 0 and rho > 1) or (advantage < 0 and rho < 1)))
    assert moves_outward(log_ratios, advantages, moved, limit).tolist() == [expected]
    assert moves_outward(-log_ratios, -advantages, moved, limit).tolist() == [expected]
    assert not (moves_outward(-log_ratios, advantages, moved, limit) & torch.tensor([expected])).any()


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 2.0])
def test_at_ratio_one_every_loss_has_the_policy_gradient(name, advantage):
    new = tensor([[0.0]], requires_grad=True)
    POLICY_LOSSES[name](new, tensor([[advantage]]), ONE, (0.2, 0.2)).sum().backward()
    assert new.grad.item() == pytest.approx(-advantage, abs=TOLERANCE)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_loss_is_zero_and_without_gradient_outside_the_mask(name):
    new = tensor([[0.3, -0.2, 0.1]], requires_grad=True)
    advantages = tensor([[1.0, math.nan, math.inf]])
    mask = torch.tensor([[True, False, False]])
    losses = POLICY_LOSSES[name](log_ratio(new, torch.zeros_like(new), mask), advantages, mask, CLIP)
    assert losses[0, 1:].tolist() == [0.0, 0.0]
    losses[mask].sum().backward()
    assert new.grad[0, 1:].tolist() == [0.0, 0.0]
    assert new.grad[0, 0].isfinite()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_loss_has_the_gradient_of_its_differences(name):
    if name == "clipped_weight":
        pytest.skip("its weight is a constant for the gradient, by definition")
    new, mask = random(3, 5, seed=4, scale=0.4).requires_grad_(), random(3, 5, seed=6) > -0.8
    advantages, old = random(3, 5, seed=5), torch.zeros(3, 5, dtype=torch.float64)
    loss = POLICY_LOSSES[name]
    assert torch.autograd.gradcheck(lambda x: loss(log_ratio(x, old, mask), advantages, mask, CLIP), new)
