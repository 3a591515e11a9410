"""Peak memory and seconds of a piece of work, and made-up responses to do it on."""

import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from turns import peak_mb

from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.tokenization import PromptBatch
from konic.finetuning.rollout.sampler import Samples
from konic.finetuning.system.memory import return_freed_memory


@contextmanager
def measured():
    """Yields what has `seconds` and `added_mb`, over what was resident before, when the block is done."""
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from now on
    found, before, start = SimpleNamespace(), peak_mb(), time.perf_counter()
    yield found
    found.seconds, found.added_mb = time.perf_counter() - start, peak_mb() - before


def made_up_batch(num_rows, num_tokens, seed=0):
    """Prompts of random tokens, all of one length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 40_000, (num_rows, num_tokens), generator=generator)
    prompts = make_prompts([f"prompt {row}" for row in range(num_rows)], DatasetConfig(), "benchmark")
    texts = [prompt.content for prompt in prompts]
    mask = torch.ones_like(ids, dtype=torch.bool)
    return PromptBatch(prompts=prompts, texts=texts, ids=ids, mask=mask, sample_indices=[0] * num_rows)


def made_up_samples(num_rows, num_tokens, hidden_size, seed=1):
    """Responses of random tokens, all of one length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 40_000, (num_rows, num_tokens), generator=generator)
    hidden = torch.randn(num_rows, num_tokens, hidden_size, generator=generator)
    ended = torch.zeros(num_rows, dtype=torch.bool)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Samples(response_ids=ids, response_mask=mask, log_probs=torch.zeros(ids.shape), ended=ended, hidden=hidden)
