"""Tokens of one response -> its text as far as later tokens cannot change it, for those who read along."""

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.decoding import HALF_A_CHARACTER
from konic.finetuning.rollout.sampler import SpecialTokens, decode_response


class TextStream:
    """The text of a response while it is sampled. Its calls fit the hook `on_tokens` of the local sampler."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        special: SpecialTokens,
        generation: GenerationConfig,
        show: Callable[[str], None],
    ) -> None:
        self._tokenizer, self._special, self._generation, self._show = tokenizer, special, generation, show
        self._ids: list[int] = []
        self.text = ""
        """What has been shown so far."""

    def __call__(self, tokens: Mapping[int, int]) -> None:
        """Take the next token of a batch of one row; show the text if there is more of it."""
        self._ids.extend(tokens.values())
        text = decode_response(self._ids, self._tokenizer, self._special, self._generation)
        self.update(certain_part(text, self._generation.stop or ()))

    def update(self, text: str) -> None:
        """Show a text, unless it is what was last shown."""
        if text != self.text:
            self.text = text
            self._show(text)


def certain_part(text: str, stop: Sequence[str] = ()) -> str:
    """Return the text without an end that may turn into another character, or into a stop string, which is cut off."""
    text = text.rstrip(HALF_A_CHARACTER)
    starts = (size for string in stop for size in range(1, len(string)) if text.endswith(string[:size]))
    return text[: len(text) - max(starts, default=0)]
