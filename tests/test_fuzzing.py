"""A short run of `make fuzz`: the same few damaged inputs every time, and all that once failed."""

import pytest

from fuzzing import CORPUS, TARGETS, Inputs, corpus, fuzz, try_example

NUM_EXAMPLES = {"data": 60, "settings": 60, "template": 40, "run": 20, "document": 40, "process": 40}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KONIC_CACHE", "")  # so that it is put back
        yield Inputs(tmp_path_factory.mktemp("fuzzing"))


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_input_is_one_error_in_bounds(inputs, target):
    fuzz(inputs, target, 1, NUM_EXAMPLES.get(target, 8))


@pytest.mark.parametrize("target", [path.name for path in sorted(CORPUS.iterdir())])
def test_what_once_failed_is_one_error_now(inputs, target):
    for name, content in corpus(target):
        try_example(inputs, target, name, content)
