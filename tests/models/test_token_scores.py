import math
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions import Categorical, kl_divergence

from conftest import tiny_model
from konic.finetuning.models import token_scores as language_model
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.token_scores import divergences, score_tokens

NUM_ROWS, NUM_TOKENS, HIDDEN = 5, 9, 32
TEMPERATURE = 0.7
TASKS = {
    "log-probs": (False, False),
    "entropy": (True, False),
    "KL": (False, True),
    "entropy and KL": (True, True),
}
tasks = pytest.mark.parametrize("needs_entropy, has_reference", TASKS.values(), ids=TASKS)
chunked = pytest.mark.parametrize("tokens_at_once", [None, 1, 4], ids=["one chunk", "a chunk a token", "chunks of 4"])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def model_of(architecture="llama", *, learns=False, bias=False, softcap=None, scale=1.0, dtype=torch.float64):
    causal_lm = tiny_model(architecture, dtype).requires_grad_(False)
    if bias:
        torch.manual_seed(1)
        head = causal_lm.get_output_embeddings()
        causal_lm.set_output_embeddings(nn.Linear(HIDDEN, head.weight.shape[0], dtype=dtype))
        causal_lm.get_output_embeddings().bias.data.mul_(10.0)
    causal_lm.get_output_embeddings().requires_grad_(learns)
    model = LanguageModel(causal_lm)
    model.softcap, model.scale = softcap, scale
    return model


def logits_of(model, hidden):
    """All logits at once, with the weights of the head."""
    head = model.causal_lm.get_output_embeddings()
    logits = (hidden @ head.weight.T + (0.0 if head.bias is None else head.bias)) * model.scale
    return logits if model.softcap is None else model.softcap * torch.tanh(logits / model.softcap)


class Case:
    """Tokens to score, with holes in their mask, and a weight for every result of every token."""

    def __init__(self, model, needs_entropy=False, has_reference=False, temperature=TEMPERATURE):
        self.model, self.needs_entropy, self.temperature = model, needs_entropy, temperature
        shape = NUM_ROWS, NUM_TOKENS
        self.hidden = torch.randn(*shape, HIDDEN, generator=generator(1), dtype=torch.float64).requires_grad_()
        self.tokens = torch.randint(model.vocabulary_size, shape, generator=generator(2))
        self.mask = torch.rand(shape, generator=generator(3)) < 0.6
        self.ref_hidden = torch.randn(*shape, HIDDEN, generator=generator(4), dtype=torch.float64)
        weight = torch.randn(model.vocabulary_size, HIDDEN, generator=generator(5), dtype=torch.float64) * 0.3
        self.ref_logits = (lambda hidden: hidden @ weight.T) if has_reference else None
        self.weights = torch.randn(3, *shape, generator=generator(6), dtype=torch.float64)

    def scored(self):
        """Log-probs, entropy and KL as the library has them."""
        reference = None if self.ref_logits is None else (self.ref_logits, self.ref_hidden)
        arguments = self.model, self.hidden, self.tokens, self.mask, self.temperature
        scores = score_tokens(*arguments, needs_entropy=self.needs_entropy, reference=reference)
        return scores.log_probs, scores.entropy, scores.kl

    def written_out(self):
        """The same over all logits at once."""
        policy = Categorical(logits=logits_of(self.model, self.hidden) / self.temperature)
        results = [policy.log_prob(self.tokens), None, None]
        if self.needs_entropy:
            results[1] = policy.entropy()
        if self.ref_logits is not None:
            reference = Categorical(logits=self.ref_logits(self.ref_hidden) / self.temperature)
            results[2] = kl_divergence(policy, reference)
        return [None if result is None else torch.where(self.mask, result, 0.0) for result in results]

    def gradients(self, results, used=(0, 1, 2)):
        """Of a sum in which every token's result has a weight of its own, by the hidden states and the head."""
        loss = sum((self.weights[i] * results[i]).sum() for i in used if results[i] is not None)
        head = self.model.causal_lm.get_output_embeddings()
        return torch.autograd.grad(
            loss, [self.hidden, *(weight for weight in head.parameters() if weight.requires_grad)]
        )


def limit_chunks(monkeypatch, model, tokens_at_once):
    if tokens_at_once is not None:
        monkeypatch.setattr(language_model, "MAX_LOGITS", {"cpu": tokens_at_once * model.vocabulary_size})


def assert_as_written_out(case):
    results, expected = case.scored(), case.written_out()
    for ours, theirs in zip(results, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).abs().max() < 1e-10
            assert ours[~case.mask].eq(0).all()
            assert theirs[case.mask].abs().min() > 0
    for ours, theirs in zip(case.gradients(results), case.gradients(expected), strict=True):
        assert theirs.abs().max() > 1e-3
        assert (ours - theirs).abs().max() < 1e-10


def elements_kept(function):
    """Elements of all tensors that are still kept for the backward pass after a function has returned."""
    kept = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # with its history it would hold itself
            kept.add(self)

    with saved_tensors_hooks(Kept, lambda box: box.tensor):
        results = function()
    count = sum(box.tensor.numel() for box in kept)
    assert any(result is not None and result.requires_grad for result in results)
    return count


@chunked
@tasks
def test_a_plain_frozen_head(architecture, needs_entropy, has_reference, tokens_at_once, monkeypatch):
    model = model_of(architecture)
    assert model.is_plain
    assert not model.head_learns
    limit_chunks(monkeypatch, model, tokens_at_once)
    assert_as_written_out(Case(model, needs_entropy, has_reference))


@tasks
def test_a_frozen_head_with_a_bias(needs_entropy, has_reference, monkeypatch):
    model = model_of(bias=True)
    limit_chunks(monkeypatch, model, 4)
    assert_as_written_out(Case(model, needs_entropy, has_reference))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("logits", [{"softcap": 5.0}, {"scale": 0.5}, {"softcap": 5.0, "scale": 0.5}])
@tasks
def test_logits_that_are_scaled_or_capped(logits, learns, needs_entropy, has_reference, monkeypatch):
    model = model_of(learns=learns, **logits)
    assert not model.is_plain
    limit_chunks(monkeypatch, model, 4)
    assert_as_written_out(Case(model, needs_entropy, has_reference))


@chunked
@pytest.mark.parametrize("max_kept", [0, None], ids=["computed twice", "kept"])
@pytest.mark.parametrize("bias", [False, True])
@tasks
def test_a_head_that_learns(needs_entropy, has_reference, bias, max_kept, tokens_at_once, monkeypatch):
    model = model_of(learns=True, bias=bias)
    limit_chunks(monkeypatch, model, tokens_at_once)
    if max_kept is not None:
        monkeypatch.setattr(language_model, "MAX_KEPT_LOGITS", max_kept)
    case = Case(model, needs_entropy, has_reference)
    assert len(case.gradients(case.scored())) == 2 + bias
    assert_as_written_out(case)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@tasks
def test_every_temperature(temperature, needs_entropy, has_reference):
    assert_as_written_out(Case(model_of(), needs_entropy, has_reference, temperature))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_what_a_loss_leaves_out_adds_nothing_to_its_gradient(used, learns):
    case = Case(model_of(learns=learns), True, True)
    ours, theirs = case.gradients(case.scored(), used), case.gradients(case.written_out(), used)
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(ours, theirs, strict=True))


@tasks
def test_the_gradient_reaches_what_made_the_hidden_states(needs_entropy, has_reference):
    case = Case(model_of(), needs_entropy, has_reference)
    matrix = torch.randn(HIDDEN, HIDDEN, generator=generator(8), dtype=torch.float64).requires_grad_()
    found, leaf = [], case.hidden
    for results in (case.scored, case.written_out):
        case.hidden = leaf @ matrix
        scores = results()
        loss = sum((w * r).square().sum() for w, r in zip(case.weights, scores, strict=True) if r is not None)
        found.append(torch.autograd.grad(loss, matrix)[0])
    assert (found[0] - found[1]).abs().max() < 1e-9 * found[1].abs().max()


@pytest.mark.parametrize("learns", [False, True])
@tasks
def test_without_gradient_the_values_are_the_same(needs_entropy, has_reference, learns):
    case = Case(model_of(learns=learns), needs_entropy, has_reference)
    with torch.no_grad():
        results = case.scored()
    for ours, theirs in zip(results, case.written_out(), strict=True):
        assert ours is None or ((ours - theirs).abs().max() < 1e-10 and not ours.requires_grad)


def test_scoring_leaves_its_inputs_and_the_head_as_they_were():
    case = Case(model_of(bias=True))
    head = case.model.causal_lm.get_output_embeddings()
    before = [tensor.detach().clone() for tensor in (case.hidden, case.tokens, head.weight, head.bias)]
    case.gradients(case.scored())
    after = case.hidden, case.tokens, head.weight, head.bias
    assert all(now.equal(then) for now, then in zip(after, before, strict=True))


@chunked
@pytest.mark.parametrize("logits", [{}, {"softcap": 5.0}])
@tasks
def test_a_frozen_head_keeps_nothing_as_large_as_its_logits(
    needs_entropy, has_reference, logits, tokens_at_once, monkeypatch
):
    model = model_of(**logits)
    limit_chunks(monkeypatch, model, tokens_at_once)
    case = Case(model, needs_entropy, has_reference)
    results = 1 + needs_entropy + has_reference
    assert elements_kept(case.scored) < case.hidden.numel() * results + 10 * case.mask.numel()
    assert elements_kept(case.written_out) > int(case.mask.sum()) * model.vocabulary_size


def test_a_head_that_learns_keeps_its_logits_up_to_a_limit(monkeypatch):
    case = Case(model_of(learns=True), True, True)
    logits = int(case.mask.sum()) * case.model.vocabulary_size
    assert elements_kept(case.scored) >= logits
    monkeypatch.setattr(language_model, "MAX_KEPT_LOGITS", 3 * logits)
    assert elements_kept(case.scored) >= logits
    monkeypatch.setattr(language_model, "MAX_KEPT_LOGITS", 3 * logits - 1)
    assert elements_kept(case.scored) < logits


def test_sixteen_bits_are_scored_in_fp32_and_give_a_gradient_in_their_own_type():
    case = Case(model_of(dtype=torch.bfloat16))
    case.hidden = case.hidden.detach().bfloat16().requires_grad_()
    log_probs, _, _ = case.scored()
    (gradient,) = case.gradients([log_probs, None, None])
    assert (log_probs.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    exact = Case(model_of())
    exact.model.causal_lm.load_state_dict(case.model.causal_lm.state_dict())
    exact.hidden = case.hidden.detach().double().requires_grad_()
    expected = exact.written_out()
    (expected_gradient,) = exact.gradients(expected)
    assert (log_probs - expected[0]).abs().max() < 0.2
    assert (gradient - expected_gradient).abs().max() < 0.03 * expected_gradient.abs().max()


measures = pytest.mark.parametrize("measure", ["total_variation", "kl"])


def diverged(case, measure):
    return divergences(case.model, case.ref_hidden, case.hidden, case.mask, case.temperature, measure)


def diverged_written_out(case, measure):
    """From the whole softmax of both, from the old distribution to the new one."""
    old, new = (
        (logits_of(case.model, hidden.detach()) / case.temperature).softmax(dim=-1)
        for hidden in (case.ref_hidden, case.hidden)
    )
    terms = (old - new).abs() / 2 if measure == "total_variation" else old * (old / new).log()
    return torch.where(case.mask, terms.sum(dim=-1), 0.0)


@chunked
@pytest.mark.parametrize("head", [{}, {"bias": True}, {"softcap": 5.0, "scale": 0.5}, {"learns": True}], ids=str)
@measures
def test_divergences_are_those_of_the_whole_softmax(measure, head, tokens_at_once, monkeypatch):
    case = Case(model_of(**head))
    limit_chunks(monkeypatch, case.model, tokens_at_once)
    found, expected = diverged(case, measure), diverged_written_out(case, measure)
    assert (found - expected).abs().max() < 1e-10
    assert found[~case.mask].eq(0).all()
    assert found[case.mask].min() > 0.01
    case.hidden, case.ref_hidden = case.ref_hidden, case.hidden
    is_symmetric = (diverged(case, measure) - expected).abs().max() < 1e-10
    assert is_symmetric == (measure == "total_variation")


@measures
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_divergences_are_at_the_temperature_of_sampling(temperature, measure):
    case = Case(model_of(), temperature=temperature)
    assert (diverged(case, measure) - diverged_written_out(case, measure)).abs().max() < 1e-10


KL_BY_HAND = [0.5 * math.log(4 / 3), 0.0, 0.8 * math.log(8 / 3) + 0.2 * math.log(2 / 7)]


@pytest.mark.parametrize(("measure", "expected"), [("total_variation", [0.25, 0.0, 0.5]), ("kl", KL_BY_HAND)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_worked_by_hand(measure, expected, temperature):
    """A head for which only two tokens exist, with the first two hidden states as their logits."""
    model = model_of(bias=True)
    head = model.causal_lm.get_output_embeddings()
    head.weight.data.zero_()[[0, 1], [0, 1]] = 1.0
    head.bias.data.fill_(-math.inf)[:2] = 0.0
    probabilities = [
        [[0.5, 0.5], [0.1, 0.9], [0.8, 0.2], [0.9, 0.1]],
        [[0.25, 0.75], [0.1, 0.9], [0.3, 0.7], [0.1, 0.9]],
    ]
    old, new = hidden = torch.zeros(2, 1, 4, HIDDEN, dtype=torch.float64)
    hidden[:, 0, :, :2] = temperature * torch.tensor(probabilities, dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True, False]])
    found = divergences(model, old, new, mask, temperature, measure)
    assert found[0].tolist() == pytest.approx([*expected, 0.0], abs=1e-12)


@measures
def test_equal_hidden_states_have_not_diverged(measure):
    case = Case(model_of(bias=True))
    case.ref_hidden = case.hidden.detach().clone()
    assert not diverged(case, measure).any()


@pytest.mark.parametrize("learns", [False, True])
@measures
def test_no_gradient_flows_through_divergences_and_their_inputs_stay_as_they_were(measure, learns):
    case = Case(model_of(learns=learns, bias=True))
    case.ref_hidden.requires_grad_()
    head = case.model.causal_lm.get_output_embeddings()
    inputs = case.hidden, case.ref_hidden, head.weight, head.bias
    before = [tensor.detach().clone() for tensor in inputs]
    assert not diverged(case, measure).requires_grad
    assert all(now.equal(then) for now, then in zip(inputs, before, strict=True))


@chunked
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
@measures
def test_garbage_outside_the_mask_changes_no_divergence(measure, garbage, tokens_at_once, monkeypatch):
    case = Case(model_of())
    limit_chunks(monkeypatch, case.model, tokens_at_once)
    clean = diverged(case, measure)
    case.hidden, case.ref_hidden = (
        torch.where(case.mask[..., None], hidden.detach(), garbage) for hidden in (case.hidden, case.ref_hidden)
    )
    assert torch.equal(diverged(case, measure), clean)


@chunked
@measures
def test_divergences_of_a_full_mask(measure, tokens_at_once, monkeypatch):
    case = Case(model_of())
    limit_chunks(monkeypatch, case.model, tokens_at_once)
    case.mask = torch.ones_like(case.mask)
    assert (diverged(case, measure) - diverged_written_out(case, measure)).abs().max() < 1e-10
