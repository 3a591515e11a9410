"""Tokens -> hidden states: the fused decoder, with each decode step as one CUDA graph.

`make gpu` compares the CUDA graph with other decoders on a GPU (docs/gpu.md). The tests run the same step on a CPU,
without a graph.

Shapes: B rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from konic.finetuning.rollout.fused_decoder import FusedDecoder


class Replayed:
    """A step that computes on tensors that never move: run once, and from then on replayed as one CUDA graph.

    Without a GPU, or where the step cannot be recorded, it is run each time. The result is overwritten by the next one.
    """

    def __init__(self, run: Callable[[], Tensor], device: torch.device) -> None:
        self._run, self._on_gpu = run, device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self.cannot_record = False
        """True if something in the step makes the host wait for the GPU."""

    def __call__(self) -> Tensor:
        """Compute the next step."""
        if self._graph is not None:
            self._graph.replay()
            return self._output
        if not self._on_gpu or self.cannot_record:
            return self._run()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first = self._run()  # what kernels prepare at their first launch must not be recorded
            try:
                self._record()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self.cannot_record = True
        torch.cuda.current_stream().wait_stream(stream)
        return first

    def _record(self) -> None:
        # not `torch.cuda.graph`, which also collects Python's garbage: 0.2 s with a large library in memory
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")  # threads of rewards may use the GPU meanwhile
        try:
            self._output = self._run()
        finally:
            graph.capture_end()
        self._graph = graph


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
        return self._next()

    def select(self, rows: Tensor) -> None:
        """See :class:`Decoder`."""
        super().select(rows)
        self._cache[..., self._length :, :] = 0.0
        self._is_set_up = False

    def _set_up(self, tokens: Tensor) -> None:
        """Create the tensors of a step, set to the next token."""
        total, last = self._cache.shape[-2], self._length - 1
        self._tokens, self._position = tokens[:, None].clone(), self._positions[:, last : last + 1].clone()
        self._slot = torch.tensor([last], device=tokens.device)
        self._shown = self._cache.new_zeros(len(tokens), 1, 1, total)
        if self._bias is not None:
            self._shown.copy_(self._bias)
        self._shown[..., self._length :] = -torch.inf
        self._is_set_up = True
        self._next = Replayed(self._run, tokens.device)

    def _run(self) -> Tensor:
        total = self._cache.shape[-2]
        return self._transformer(self._tokens, self._position, self._cache, total, self._shown, self._slot)[:, -1]
