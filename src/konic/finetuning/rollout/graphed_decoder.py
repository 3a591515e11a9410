"""Tokens -> hidden states: the fused decoder, with each decode step as one CUDA graph.

`make gpu` compares the CUDA graph with other decoders on a GPU (docs/gpu.md). The tests run the same step on a CPU,
without a graph.

Shapes: B rows.
"""

import torch
from torch import Tensor

from konic.finetuning.rollout.fused_decoder import FusedDecoder


class GraphedDecoder(FusedDecoder):
    """Runs the fused step on tensors that never move, so that a GPU replays one graph instead of launching each kernel.

    Attention reads the whole cache; the bias hides the positions that are not written yet. On other devices the same
    step runs without a graph.
    """

    multiple = 16
    """A mask of another length would be copied in every layer, to align it."""

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        hidden = super().prefill(ids, mask)
        self._cache[..., self._length :, :] = 0.0  # hidden positions must hold finite numbers too
        self._is_set_up = False
        return hidden

    def step(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        self._length += 1
        if not self._is_set_up:
            self._set_up(tokens)
        else:
            self._tokens.copy_(tokens[:, None])
            self._position.add_(1)
            self._slot.add_(1)
            self._shown.index_fill_(-1, self._slot, 0.0)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._output

    def select(self, rows: Tensor) -> None:
        """See :class:`Decoder`."""
        super().select(rows)
        self._cache[..., self._length :, :] = 0.0
        self._is_set_up = False

    def _set_up(self, tokens: Tensor) -> None:
        """Create the tensors of a step, set to the next token, and record the graph of the step."""
        total, last = self._cache.shape[-2], self._length - 1
        self._tokens, self._position = tokens[:, None].clone(), self._positions[:, last : last + 1].clone()
        self._slot = torch.tensor([last], device=tokens.device)
        self._shown = self._cache.new_zeros(len(tokens), 1, 1, total)
        if self._bias is not None:
            self._shown.copy_(self._bias)
        self._shown[..., self._length :] = -torch.inf
        self._is_set_up = True
        self._graph: torch.cuda.CUDAGraph | None = None
        if tokens.device.type == "cuda":
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run()  # what kernels prepare at their first launch must not be recorded
                # not `torch.cuda.graph`, which also collects Python's garbage: 0.2 s with a large library in memory
                graph.capture_begin()
                self._output = self._run()
                graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = graph

    def _run(self) -> Tensor:
        total = self._cache.shape[-2]
        return self._transformer(self._tokens, self._position, self._cache, total, self._shown, self._slot)[:, -1]
