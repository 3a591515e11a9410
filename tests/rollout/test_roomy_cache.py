"""A cache with room holds what the cache of `transformers` holds, whatever is done to it."""

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, LlamaConfig

from konic.finetuning.rollout.roomy_cache import ROOM, RoomyLayer, roomy_cache

CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)


def both(steps):
    """The keys and values that each kind of cache gives after every step of a list of lengths or row selections."""
    given = []
    for cache in (DynamicCache(config=CONFIG), roomy_cache(CONFIG)):
        torch.manual_seed(0)
        num_rows, seen = 3, []
        for step in steps:
            if isinstance(step, int):
                for layer in range(2):
                    keys, values = torch.randn(num_rows, 2, step, 4), torch.randn(num_rows, 2, step, 5)
                    seen += [part.clone() for part in cache.update(keys, values, layer)]
            else:
                rows = torch.tensor(step)
                num_rows = len(rows)
                cache.batch_select_indices(rows) if len(set(step)) == len(step) else cache.reorder_cache(rows)
            seen.append(torch.tensor(cache.get_seq_length()))
        given.append(seen)
    return given


@pytest.mark.parametrize(
    "steps",
    [
        [7, *[1] * 5],
        [1, *[1] * (2 * ROOM)],
        [ROOM, ROOM + 1, 1, 1],
        [4, 1, [2, 0], 1, 1, [1], 1],
        [4, [0, 0, 1, 2, 2], 1, [4, 3, 2, 1, 0], 1, 1],
    ],
)
def test_it_gives_what_the_cache_of_transformers_gives(steps):
    theirs, ours = both(steps)
    assert all(torch.equal(left, right) for left, right in zip(theirs, ours, strict=True))


def test_what_was_given_is_not_written_over_by_what_comes_after_a_selection():
    cache = roomy_cache(CONFIG)
    kept, _ = cache.update(torch.ones(3, 2, 4, 4), torch.ones(3, 2, 4, 4), 0)
    cache.batch_select_indices(torch.tensor([1]))
    cache.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)
    assert torch.equal(kept, torch.ones(3, 2, 4, 4))


def test_a_new_token_is_written_into_place():
    cache = roomy_cache(CONFIG)
    first, _ = cache.update(torch.ones(3, 2, 4, 4), torch.ones(3, 2, 4, 4), 0)
    places = {first.data_ptr()}
    for _ in range(ROOM):
        keys, _ = cache.update(torch.ones(3, 2, 1, 4), torch.ones(3, 2, 1, 4), 0)
        places.add(keys.data_ptr())
    assert len(places) == 1
    keys, _ = cache.update(torch.ones(3, 2, 1, 4), torch.ones(3, 2, 1, 4), 0)
    assert keys.data_ptr() not in places and keys.shape[-2] == ROOM + 5


def test_layers_with_a_window_stay_as_they_are():
    kinds = [type(layer) for layer in roomy_cache(Gemma2Config(num_hidden_layers=2)).layers]
    assert kinds.count(RoomyLayer) == 1
    assert [type(layer) for layer in DynamicCache(config=Gemma2Config(num_hidden_layers=2)).layers] != kinds
