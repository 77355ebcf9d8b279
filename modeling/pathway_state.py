"""Recurrent state of a mixture of pathways.

Shapes: batch; width, of all recurrent states of a layer, packed one after another: the router's, then the experts'.
"""

import torch


class MopState:
    r"""
    What the routers and experts of a [`MopModel`] remember: one tensor `(batch, width)` per layer.

    Its verbs are those of transformers' caches, but each returns a new state and leaves this one alone, so that a
    state may be part of a graph of truncated backpropagation. `state["router_0"]` and `state["expert_0_1"]` are views
    of one router's and one expert's part, `(batch, size)`; skip experts have none.

    Args:
        blocks (`tuple[torch.Tensor]`): The packed states.
        names (`list[dict[str, tuple[int, int]]]`): For each layer, where in its packed state each part lies.
    """

    def __init__(self, blocks, names: list[dict[str, tuple[int, int]]]):
        self.blocks = tuple(blocks)
        self.names = names

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.blocks[0].shape[0]

    def keys(self) -> list[str]:
        """Names of all parts."""
        return [name for layer in self.names for name in layer]

    def __getitem__(self, name: str) -> torch.Tensor:
        for block, layer in zip(self.blocks, self.names, strict=True):
            if name in layer:
                start, stop = layer[name]
                return block[:, start:stop]
        raise KeyError(f"The state has no part {name!r}; its parts are {', '.join(self.keys())}.")

    def to_dict(self) -> dict[str, torch.Tensor]:
        """All parts by name, each a tensor of its own, as safetensors stores them."""
        return {name: self[name].contiguous() for name in self.keys()}

    def load_dict(self, parts: dict[str, torch.Tensor]) -> "MopState":
        """The state whose parts are `parts`, as [`~MopState.to_dict`] gave them."""
        if sorted(parts) != sorted(self.keys()):
            raise ValueError(f"The state has the parts {', '.join(self.keys())}, not {', '.join(parts)}.")
        return MopState((torch.cat([parts[name] for name in layer], dim=1) for layer in self.names), self.names)

    def _map(self, function) -> "MopState":
        return MopState((function(block) for block in self.blocks), self.names)

    def reset(self, mask: torch.Tensor | None = None) -> "MopState":
        """Fresh where `mask` of shape `(batch,)` is true, or everywhere; no gradient flows into what was reset."""
        if mask is None:
            return self._map(torch.zeros_like)
        return self._map(lambda block: block.masked_fill(mask.to(block.device, torch.bool).unsqueeze(1), 0.0))

    def batch_select_indices(self, indices: torch.Tensor) -> "MopState":
        """The sequences at `indices`, in that order."""
        return self._map(lambda block: block[indices.to(block.device)])

    def reorder_cache(self, beam_idx: torch.Tensor) -> "MopState":
        """As [`~MopState.batch_select_indices`], by the name that beam search uses."""
        return self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> "MopState":
        """Each sequence `repeats` times."""
        return self._map(lambda block: block.repeat_interleave(repeats, dim=0))

    def detach(self) -> "MopState":
        """The same numbers, cut from their graph."""
        return self._map(torch.Tensor.detach)

    def to(self, *args, **kwargs) -> "MopState":
        """On another device or in another precision, with the arguments of `torch.Tensor.to`."""
        return self._map(lambda block: block.to(*args, **kwargs))


__all__ = ["MopState"]
