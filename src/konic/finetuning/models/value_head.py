"""Hidden states -> values: everything specific to the value head of PPO, except GAE and the value loss.

The head reads the last hidden state of the policy, so values need no second model. All parameters start at 0. At the
first batch with a score, the bias is set so that the mean value of the batch is the batch's mean score. From 0, the
clipped value loss would take several iterations to reach that level. Until then, advantages would separate late tokens
from early ones, not good responses from bad ones. (N normalises rewards to mean 0 before training, for the same
reason.)

Shapes: B sequences, R response tokens, H hidden size. A mask is True where a token counts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_FILE = "value_head.safetensors"


class ValueHead(nn.Linear):
    """Hidden state [..., H] -> expected sum of future rewards, in units of reward."""

    def __init__(self, output_embedding: Tensor, device: torch.device) -> None:
        """Create a head of zeros for a model with this output embedding [V, H], in float64 if that is, else in fp32."""
        dtype = torch.float64 if output_embedding.dtype == torch.float64 else torch.float32
        super().__init__(output_embedding.shape[1], 1, device="meta", dtype=dtype)
        self.to_empty(device=device)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the value [...] of each hidden state [..., H]."""
        return super().forward(hidden.to(self.weight.dtype)).squeeze(-1)

    def starting_shift(self, scores: Sequence[float]) -> float:
        """Return the mean of the first scores minus the value that an untrained head gives; 0 without scores."""
        return fmean(scores) - self.bias.item() if scores else 0.0

    @contextmanager
    def shifted(self, shift: float) -> Iterator[None]:
        """Add a constant to every value, in the context and afterwards. An error in the context undoes the change."""
        before = self.bias.detach().clone()
        with torch.no_grad():
            self.bias.add_(shift)
        try:
            yield
        except BaseException:
            self.bias.data = before
            raise

    def save(self, folder: Path) -> None:
        """Write the head to a folder."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Load the weights that :meth:`save` wrote."""
        self.load_state_dict(load_file(folder / _FILE))


def shift_values(values: Tensor, mask: Tensor, shift: float) -> Tensor:
    """Return the values [B, R] that the head gives after :meth:`ValueHead.shifted`; 0 outside the mask."""
    return torch.where(mask, values + shift, 0.0)
