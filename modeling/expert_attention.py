"""Causal attention inside an expert: among the tokens of one sequence that were routed to the same expert.

A token sees the earlier tokens of its own sequence that its expert also received, at the same step of the recurrence,
and nothing else: no later token, no other row of the batch, no other packed document, no padding.

Shapes: rows = token-expert pairs sorted by expert and sequence, slots = experts per token, total = cached and new.
"""

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def apply_rotation(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `states` of shape `(rows, heads, head_dim)` by `cos` and `sin` of shape `(rows, head_dim)` (RoPE)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


class SegmentedAttention:
    """Attention within runs of rows, padded only up to the next power of two of each run's length.

    Args:
        segments (`torch.Tensor` of shape `(rows,)`):
            Ascending number of the run, one for each pair of expert and sequence; rows of a run are in order of time.
    """

    def __init__(self, segments: torch.Tensor):
        _, self.segments, self.sizes = segments.unique_consecutive(return_inverse=True, return_counts=True)
        self.starts = self.sizes.cumsum(0) - self.sizes
        # A run of 5 to 8 rows lands in bucket 3: at most half of the padded rows are waste.
        self.buckets = torch.ceil(torch.log2(self.sizes.float())).long()
        self.plan = self._plan(None)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, active: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attends from `query` `(active rows, heads, head_dim)` to `key`, `value` `(rows, kv heads, head_dim)`."""
        outputs = []
        plan, order = self.plan if active is None else self._plan(active)
        for query_index, key_index, mask, filled in plan:
            output = F.scaled_dot_product_attention(
                _take(query, query_index),
                _take(key, key_index),
                _take(value, key_index),
                attn_mask=mask,
                # Padding stands behind the rows of its run, where causality already hides it.
                is_causal=mask is None,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(output.transpose(1, 2).flatten(0, 1).index_select(0, filled))
        return torch.cat(outputs).index_select(0, order)

    def _plan(self, active: torch.Tensor | None) -> tuple[list, torch.Tensor]:
        segments = self.segments if active is None else self.segments[active]
        sizes = torch.bincount(segments, minlength=len(self.sizes))
        starts = sizes.cumsum(0) - sizes
        plan, positions = [], []
        for bucket in self.buckets.unique():
            chosen = ((self.buckets == bucket) & (sizes > 0)).nonzero().squeeze(1)
            if len(chosen) == 0:
                continue
            key_index, key_filled = _pad(self.starts[chosen], self.sizes[chosen])
            query_index, filled = _pad(starts[chosen], sizes[chosen])
            mask = None
            if active is not None:
                mask = key_index.unsqueeze(1) <= active[query_index].unsqueeze(2)
                # The last row of a run could see its own repetitions in the padding, too.
                mask = (mask & key_filled.unsqueeze(1)).unsqueeze(1)
            filled = filled.flatten().nonzero().squeeze(1)
            plan.append((query_index, key_index, mask, filled))
            positions.append(query_index.flatten()[filled])
        return plan, torch.cat(positions).argsort()


def _pad(starts: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = torch.arange(int(sizes.max()), device=sizes.device)
    filled = offsets < sizes.unsqueeze(1)
    # Padding repeats the last row of its run; causality or a mask hides it, so that it gets no gradient either.
    return starts.unsqueeze(1) + torch.minimum(offsets, sizes.unsqueeze(1) - 1), filled


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    taken = rows.index_select(0, index.flatten()).unflatten(0, index.shape)
    return taken.transpose(1, 2)  # (runs, heads, longest run, head_dim)


class ExpertAttention:
    """The attention of one layer's experts over all steps of one forward pass, with its cache for generation.

    Args:
        routes (`torch.Tensor` of shape `(batch, seq, slots)`): Experts of each token.
        sequence_ids (`torch.Tensor` of shape `(batch, seq)`): Number of the document within its row, -1 for padding.
        order (`torch.Tensor` of shape `(rows,)`):
            Position of each row among the pairs `(batch, seq, slots)`, sorted by expert, then by sequence.
        segmented (`bool`): Whether to attend within runs of rows (fast), or in one masked product (the reference).
        num_layers (`int`), layer_idx (`int`): Where this layer's slots in the cache begin.
        cache ([`~transformers.Cache`], *optional*): Keys and values of earlier tokens. After the slots of the decoder
            layers come one slot per layer for the routes, then one per step and layer for keys and values.
    """

    def __init__(
        self,
        routes: torch.Tensor,
        sequence_ids: torch.Tensor,
        order: torch.Tensor,
        segmented: bool,
        num_layers: int,
        layer_idx: int,
        cache: Cache | None = None,
    ):
        self.routes, self.order, self.cache = routes, order, cache
        self.num_layers, self.layer_idx = num_layers, layer_idx
        self.keys = self.values = None
        past = 0
        if cache is not None:
            self._grow(num_layers + layer_idx)
            past = cache.layers[num_layers + layer_idx].get_seq_length()
        self.past = past
        all_routes, all_ids = self._extend_routes(sequence_ids)
        self.segments = self.mask = None
        if segmented and past == 0:
            key = _sequence_keys(routes, sequence_ids).flatten()[order]
            self.segments = SegmentedAttention(key)
        else:
            self.mask = _route_mask(routes, sequence_ids, all_routes, all_ids)

    def check_steps(self, num_recurrences: int):
        """Raises `ValueError` if the cache was filled with another number of steps."""
        if self.past == 0:
            return
        used = (len(self.cache.layers) - self.num_layers) // self.num_layers - 1
        if used != num_recurrences:
            raise ValueError(
                f"The cache was filled with num_recurrences={used}, but this call asks for {num_recurrences}; "
                "keep the number or start with an empty cache."
            )

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, active: torch.Tensor | None, step: int
    ) -> torch.Tensor:
        """Attends from the rows `active` (all if `None`); rows that have exited keep the keys of their last step.

        Args:
            query (`torch.Tensor` of shape `(active rows, heads, head_dim)`), key and value (the same with kv heads).
            active (`torch.Tensor`, *optional*): Ascending index of the rows that still iterate.
            step (`int`): Index of the recurrence.
        """
        if active is None:
            self.keys, self.values = key, value
        else:
            self.keys = self.keys.index_copy(0, active, key)
            self.values = self.values.index_copy(0, active, value)
        keys, values = self._store(step)
        if self.segments is not None:
            return self.segments(query, self.keys, self.values, active)
        if active is not None:
            query = query.new_zeros(len(self.order), *query.shape[1:]).index_copy(0, active, query)
        output = F.scaled_dot_product_attention(
            self._merge(self._to_sequences(query)),
            self._merge(keys),
            self._merge(values),
            attn_mask=self.mask,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        batch, seq, slots = self.routes.shape
        output = output.unflatten(2, (slots, seq)).permute(0, 3, 2, 1, 4)  # (batch, seq, slots, heads, head_dim)
        output = output.flatten(0, 2).index_select(0, self.order)
        return output if active is None else output.index_select(0, active)

    def fill(self, first: int, num_recurrences: int):
        """Caches the last keys and values for the steps from `first` on, which no row of this call has taken."""
        for step in range(first, num_recurrences):
            self._store(step)

    def _store(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache is None and self.segments is not None:
            return self.keys, self.values
        keys, values = self._to_sequences(self.keys), self._to_sequences(self.values)
        if self.cache is None:
            return keys, values
        slot = self.num_layers * (2 + step) + self.layer_idx
        self._grow(slot)
        heads = keys.shape[2]
        stored = self.cache.update(keys.flatten(1, 2), values.flatten(1, 2), slot)
        return tuple(states.unflatten(1, (-1, heads)) for states in stored)

    def _to_sequences(self, rows: torch.Tensor) -> torch.Tensor:
        # Pairs whose expert is on another process have no row; nothing here attends to their zeros.
        states = rows.new_zeros(self.routes.numel(), *rows.shape[1:]).index_copy_(0, self.order, rows)
        states = states.view(*self.routes.shape, *rows.shape[1:])
        return states.permute(0, 2, 3, 1, 4)  # (batch, slots, heads, seq, head_dim)

    @staticmethod
    def _merge(states: torch.Tensor) -> torch.Tensor:
        return states.transpose(1, 2).flatten(2, 3)  # (batch, heads, slots * seq, head_dim)

    def _extend_routes(self, sequence_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache is None:
            return self.routes, sequence_ids
        routes = self.routes.permute(0, 2, 1).unsqueeze(-1)  # (batch, slots, seq, 1), as keys are laid out
        ids = sequence_ids[:, None, :, None].expand_as(routes)
        all_routes, all_ids = self.cache.update(routes, ids, self.num_layers + self.layer_idx)
        return all_routes.squeeze(-1).permute(0, 2, 1), all_ids[:, 0, :, 0]

    def _grow(self, slot: int):
        if not isinstance(self.cache, DynamicCache):
            raise ValueError(
                f"`more_a` experts cache one slot per layer and step and need a DynamicCache, got a "
                f"{type(self.cache).__name__}."
            )
        while len(self.cache.layers) <= slot:
            self.cache.layers.append(DynamicLayer())


def _sequence_keys(routes: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    """A number for each pair of expert and sequence, ascending by expert: `(batch, seq, slots)`."""
    batch, seq, _ = routes.shape
    rows = torch.arange(batch, device=routes.device).unsqueeze(1)
    sequences = rows * (seq + 2) + sequence_ids + 1
    return routes * (batch * (seq + 2)) + sequences.unsqueeze(-1)


def sort_by_expert_and_sequence(routes: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
    """Order of the pairs `(batch, seq, slots)` by expert, then sequence, then time: `(rows,)`."""
    return _sequence_keys(routes, sequence_ids).flatten().argsort(stable=True)


def _route_mask(
    routes: torch.Tensor, sequence_ids: torch.Tensor, all_routes: torch.Tensor, all_ids: torch.Tensor
) -> torch.Tensor:
    """Who sees whom: `(batch, 1, slots * seq, slots * total)`, true for the same expert and sequence and no later."""
    seq, total = routes.shape[1], all_routes.shape[1]
    times = torch.arange(total, device=routes.device)
    visible = times.unsqueeze(0) <= times[total - seq :].unsqueeze(1)
    visible = visible & (sequence_ids.unsqueeze(2) == all_ids.unsqueeze(1))  # (batch, seq, total)
    same = routes.permute(0, 2, 1)[:, :, :, None, None] == all_routes.permute(0, 2, 1)[:, None, None]
    mask = same & visible[:, None, :, None, :]  # (batch, slots, seq, slots, total)
    return mask.flatten(3, 4).flatten(1, 2).unsqueeze(1)
