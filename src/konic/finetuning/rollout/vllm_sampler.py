"""PromptBatch -> Samples: responses that a vLLM server samples, with token ids in and out.

Values, the exact KL and the reference's log-probs come from a pass of the trainer over these tokens, and so does the
denominator of the ratio; the server's own log-probs say how far the two engines differ.

Shapes: B sequences, P prompt tokens, R response tokens. A mask is True where a token counts.
"""

import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.decoding import read_response
from konic.finetuning.data.tokenization import PromptBatch
from konic.finetuning.errors import SamplerError
from konic.finetuning.models.policy import Policy
from konic.finetuning.rollout.sampler import RandomKey, Samples, SpecialTokens
from konic.finetuning.rollout.vllm_client import VllmClient
from konic.finetuning.rollout.vllm_weights import ServedWeights


def request_seed(rng_key: RandomKey, row: int, sample: int) -> int:
    """Return the seed of one response, below 2^63: it depends only on (seed, iteration, row, sample)."""
    numbers = np.random.Philox(key=[rng_key.seed, rng_key.iteration], counter=[0, 0, sample, row]).random_raw(1)
    return int(numbers[0] >> np.uint64(1))


class VllmSampler:
    """A :class:`Sampler` that lets a server load the policy's current weights and sample from them.

    Args:
        policy: The policy that is trained.
        special: The tokens that end a response, and the one that fills padding.
        client: Talks to the server.
        weights: The policy's weights on that server.
    """

    def __init__(self, policy: Policy, special: SpecialTokens, client: VllmClient, weights: ServedWeights) -> None:
        self._policy, self._special, self._client, self._weights = policy, special, client, weights
        self.server = client.name
        """How a message names the server."""
        self._iteration: int | None = None
        self.served_name = ""
        """The name under which the server has the weights that it samples from."""

    def __call__(self, batch: PromptBatch, generation: GenerationConfig, rng_key: RandomKey) -> Samples:
        """Return a response to every prompt; see :class:`Sampler`."""
        if rng_key.iteration != self._iteration:  # further rounds of an iteration have the same weights
            self._iteration = None  # until the server has them
            self.served_name = self._weights.load(rng_key.iteration)
            self._iteration = rng_key.iteration
        prompts = [ids[counts].tolist() for ids, counts in zip(batch.ids, batch.mask, strict=True)]
        seeds = [
            request_seed(rng_key, prompt.row, index)
            for prompt, index in zip(batch.prompts, batch.sample_indices, strict=True)
        ]
        common = self._request(generation)
        bodies = [common | {"prompt": ids, "seed": seed} for ids, seed in zip(prompts, seeds, strict=True)]
        answers = self._client.post_all("/v1/completions", bodies)
        responses = []
        for prompt, ids, answer in zip(batch.prompts, prompts, answers, strict=True):
            try:
                responses.append(self._response(answer, ids, generation))
            except ValueError as error:
                raise SamplerError(f"{self._client.name}: the response to dataset row {prompt.row} {error}") from None
        return self._samples(responses, batch.ids.device)

    def _request(self, generation: GenerationConfig) -> dict[str, Any]:
        """Return what all requests have in common. Whatever the server has defaults for is named."""
        return {
            "model": self.served_name, "max_tokens": generation.max_new_tokens, "temperature": generation.temperature,
            "stop_token_ids": list(self._special.eos), "ignore_eos": True, "stop": list(generation.stop or ()),
            "skip_special_tokens": generation.skip_special_tokens, "spaces_between_special_tokens": False,
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "n": 1, "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip

    def _response(
        self, answer: Any, prompt: Sequence[int], generation: GenerationConfig
    ) -> tuple[list[int], list[float], bool]:
        """Return the tokens of an answer, their log-probs, and whether the response ended by itself.

        Raises:
            ValueError: What is wrong with the answer.
        """
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
            raise ValueError("is not what vLLM answers: it holds not one choice.")
        if answer.get("model") != self.served_name:
            raise ValueError(f"was sampled by {answer.get('model')!r}, and {self.served_name!r} was asked for.")
        choice = choices[0]
        ids, vocabulary = choice.get("token_ids"), self._policy.language_model.vocabulary_size
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ValueError("comes without token_ids. Use vLLM 0.10.2 or newer.")
        if choice.get("prompt_token_ids") != list(prompt):
            raise ValueError("answers another prompt than the one sent, or does not say which one it answers.")
        if not 1 <= len(ids) <= generation.max_new_tokens:
            raise ValueError(f"has {len(ids)} tokens; max_new_tokens={generation.max_new_tokens}.")
        beyond = [token for token in ids if not 0 <= token < vocabulary]
        if beyond:
            raise ValueError(f"holds the token {beyond[0]}; the model has {vocabulary}. It serves another model.")
        given = choice.get("logprobs")
        log_probs = given.get("token_logprobs") if isinstance(given, Mapping) else None
        if not isinstance(log_probs, list) or len(log_probs) != len(ids) or not all(map(_is_log_prob, log_probs)):
            raise ValueError("comes without a log-prob for each of its tokens.")
        return self._ended(ids, log_probs, choice, generation)

    def _ended(
        self, ids: list[int], log_probs: list[float], choice: Mapping[str, Any], generation: GenerationConfig
    ) -> tuple[list[int], list[float], bool]:
        """Return the response up to where it ends by konic's own rules, and whether it does."""
        eos, reason, stopped_at = self._special.eos, choice.get("finish_reason"), choice.get("stop_reason")
        early = next((place for place, token in enumerate(ids[:-1], 1) if token in eos), None)
        if early is not None:
            raise ValueError(f"goes on after token {early} of {len(ids)}, which ends a response.")
        stop = generation.stop or ()

        def stops(length: int) -> bool:
            text = read_response(ids[:length], self._policy.tokenizer, generation.skip_special_tokens)
            return any(string in text for string in stop)

        if stop and stops(len(ids)):
            length = 1 + bisect_left(range(1, len(ids) + 1), True, key=stops)
            return ids[:length], log_probs[:length], True
        if ids[-1] in eos or (reason == "stop" and stopped_at in stop):
            return ids, log_probs, True
        if reason == "length" and len(ids) == generation.max_new_tokens:
            return ids, log_probs, False
        raise ValueError(
            f"ended after {len(ids)} of {generation.max_new_tokens} tokens, for the reason {reason!r}. Is its "
            "--max-model-len too small, or does it end responses by rules of its own?"
        )

    def _samples(self, responses: Sequence[tuple[list[int], list[float], bool]], device: torch.device) -> Samples:
        shape = len(responses), max(len(ids) for ids, _, _ in responses)
        response_ids, log_probs = torch.full(shape, self._special.pad), torch.zeros(shape)
        mask = torch.zeros(shape, dtype=torch.bool)
        for row, (ids, numbers, _) in enumerate(responses):
            response_ids[row, : len(ids)], log_probs[row, : len(ids)] = torch.tensor(ids), torch.tensor(numbers)
            mask[row, : len(ids)] = True
        ended = torch.tensor([ended for _, _, ended in responses])
        return Samples(
            response_ids=response_ids.to(device),
            response_mask=mask.to(device),
            log_probs=log_probs.to(device),
            ended=ended.to(device),
        )


def _is_log_prob(value: Any) -> bool:
    return isinstance(value, int | float) and -sys.float_info.max <= value <= 1e-3
