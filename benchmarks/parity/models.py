"""Log-probs of recorded tokens: ours, in a padded batch, and the truth, each sequence alone through plain transformers.

Shapes: B sequences, P prompt tokens, R response tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.token_scores import score_tokens


@dataclass(frozen=True)
class Batch:
    """Recorded prompts and responses. A mask is True where a token counts."""

    prompt_ids: Tensor
    """[B, P] padded on the left."""
    prompt_mask: Tensor
    """[B, P]."""
    response_ids: Tensor
    """[B, R] padded on the right."""
    response_mask: Tensor
    """[B, R]."""


def load_model(folder, weights=None, **config):
    """A causal language model in float64, with recorded weights in place of its own if any."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **config)
    if weights is not None:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        assert not missing or model.config.tie_word_embeddings
    return model.eval()


def our_scores(causal_lm, batch, temperature, reference=None):
    """Konic's log-probs, entropies and exact KL [B, R] of the responses, 0 outside their mask.

    Args:
        causal_lm: The policy.
        batch: The sequences.
        temperature: Divides the logits.
        reference: Another model to measure the KL from, or None.
    """
    model, num_tokens = LanguageModel(causal_lm), batch.response_ids.shape[1]
    ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.response_mask], dim=1)
    hidden, of_reference = model.response_hidden(ids, mask, num_tokens), None
    if reference is not None:
        ref_model = LanguageModel(reference)
        of_reference = (ref_model.logits, ref_model.response_hidden(ids, mask, num_tokens))
    return score_tokens(
        model, hidden, batch.response_ids, batch.response_mask, temperature, needs_entropy=True, reference=of_reference
    )


def true_distributions(causal_lm, batch, temperature):
    """The logits [B, R, V] over temperature that the model gives each sequence alone, without padding; 0 elsewhere."""
    rows = []
    for row in range(len(batch.prompt_ids)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        response = batch.response_ids[row][batch.response_mask[row]]
        logits = causal_lm(input_ids=torch.cat([prompt, response])[None]).logits[0] / temperature
        rows.append(logits[len(prompt) - 1 : -1])
    width = batch.response_ids.shape[1]
    return torch.stack([torch.nn.functional.pad(logits, (0, 0, 0, width - len(logits))) for logits in rows])


def true_log_probs(causal_lm, batch, temperature):
    """[B, R] from :func:`true_distributions`, 0 outside the mask."""
    logits = true_distributions(causal_lm, batch, temperature)
    log_probs = torch.distributions.Categorical(logits=logits).log_prob(batch.response_ids)
    return torch.where(batch.response_mask, log_probs, 0.0)


def gradients_of(causal_lm, loss):
    """The gradient of a loss by each weight's name; the graph stays for another loss."""
    weights = dict(causal_lm.named_parameters())
    return dict(zip(weights, torch.autograd.grad(loss, weights.values(), retain_graph=True), strict=True))
