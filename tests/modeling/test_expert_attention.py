"""The attention inside an expert against one dense product under a mask that is spelled out pair by pair."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from mixturekit.modeling.expert_attention import (
    ExpertAttention,
    SegmentedAttention,
    apply_rotation,
    sort_by_expert_and_sequence,
)

EXPERTS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 8


def routing(seed, batch=3, seq=11, slots=2):
    """Random distinct experts per token, and documents within each row, the first of which may be padding."""
    generator = torch.Generator().manual_seed(seed)
    routes = torch.rand(batch, seq, EXPERTS, generator=generator).argsort(dim=-1)[..., :slots]
    borders = torch.rand(batch, seq, generator=generator) < 0.2
    return routes, borders.long().cumsum(dim=1) - 1


def random_heads(rows, requires_grad=False):
    shapes = ((rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def dense_attention(query, key, value, routes, ids, order):
    """Rows see rows of the same expert, batch row and document that are not later."""
    batch, seq, slots = routes.shape
    places = torch.stack(torch.unravel_index(order, (batch, seq, slots)), dim=1).tolist()
    facts = [(row, time, routes[row, time, slot].item(), ids[row, time].item()) for row, time, slot in places]
    mask = torch.tensor(
        [
            [(r, e, d) == (other_r, other_e, other_d) and other_t <= t for other_r, other_t, other_e, other_d in facts]
            for r, t, e, d in facts
        ]
    )
    heads = (states.transpose(0, 1).unsqueeze(0) for states in (query, key, value))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def attention_of(routes, ids, order, segmented, cache=None):
    return ExpertAttention(routes, ids, order, segmented, num_layers=2, layer_idx=1, cache=cache)


segmented_or_masked = pytest.mark.parametrize("segmented", [True, False], ids=["segmented", "masked"])


@segmented_or_masked
@pytest.mark.parametrize("slots", [1, 2])
def test_attention_equals_dense_attention(segmented, slots):
    for seed in range(10):
        routes, ids = routing(seed, slots=slots)
        order = sort_by_expert_and_sequence(routes, ids)
        heads = random_heads(len(order), requires_grad=True)
        output = attention_of(routes, ids, order, segmented)(*heads, None, 0)
        expected = dense_attention(*heads, routes, ids, order)
        torch.testing.assert_close(output, expected)
        weight = torch.randn_like(output)
        gradients = (torch.autograd.grad((result * weight).sum(), heads) for result in (output, expected))
        torch.testing.assert_close(*gradients)


@segmented_or_masked
@pytest.mark.parametrize("slots", [1, 2])
def test_rows_that_have_left_keep_their_last_keys(segmented, slots):
    """Three steps with ever fewer rows: those that are left attend to what the others last were."""
    for seed in range(10):
        routes, ids = routing(seed, slots=slots)
        order = sort_by_expert_and_sequence(routes, ids)
        attention = attention_of(routes, ids, order, segmented)
        _, keys, values = random_heads(len(order))
        attention(random_heads(len(order))[0], keys, values, None, 0)
        active = torch.arange(len(order))
        for step in (1, 2):
            active = active[torch.rand(len(active)) < 0.6]
            query, key, value = random_heads(len(active), requires_grad=True)
            output = attention(query, key, value, active, step)
            keys, values = keys.index_copy(0, active, key), values.index_copy(0, active, value)
            queries = torch.zeros(len(order), HEADS, HEAD_DIM).index_copy(0, active, query)
            expected = dense_attention(queries, keys, values, routes, ids, order)[active]
            torch.testing.assert_close(output, expected)
            weight = torch.randn_like(output)
            gradients = (
                torch.autograd.grad((result * weight).sum(), (query, key, value), retain_graph=True)
                for result in (output, expected)
            )
            torch.testing.assert_close(*gradients)


def test_order_is_by_expert_then_sequence_then_time():
    routes, ids = routing(seed=4)
    order = sort_by_expert_and_sequence(routes, ids)
    rows, times, slots = torch.unravel_index(order, routes.shape)
    keys = list(
        zip(routes[rows, times, slots].tolist(), rows.tolist(), ids[rows, times].tolist(), times.tolist(), strict=True)
    )
    assert keys == sorted(keys)


@pytest.mark.parametrize("lengths", [(1,), (1, 2, 3, 4, 5), (9, 1, 8, 16, 17)], ids=str)
def test_runs_of_any_length(lengths):
    """Runs are padded in groups of similar length, and the padding is invisible."""
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    heads = random_heads(len(segments))
    output = SegmentedAttention(segments)(*heads)
    pieces = [
        F.scaled_dot_product_attention(*(head.transpose(0, 1) for head in run), is_causal=True, enable_gqa=True)
        for run in zip(*(states.split(lengths) for states in heads), strict=True)
    ]
    torch.testing.assert_close(output, torch.cat([piece.transpose(0, 1) for piece in pieces]))


@segmented_or_masked
def test_cache_continues_where_a_longer_call_would_be(segmented):
    """Two steps over seven tokens, then four: the new ones see the cached keys of their own step."""
    routes, ids = routing(seed=1)
    ids = torch.zeros_like(ids)
    order = sort_by_expert_and_sequence(routes, ids)
    steps = [random_heads(len(order)) for _ in range(2)]
    whole = attention_of(routes, ids, order, segmented)
    expected = [whole(*heads, None, index) for index, heads in enumerate(steps)]
    cache = DynamicCache()
    for part in (slice(0, 7), slice(7, 11)):
        part_order = sort_by_expert_and_sequence(routes[:, part], ids[:, part])
        # Place of each row of the part among the rows of the whole.
        places = torch.arange(len(order)).view(routes.shape)[:, part].flatten()[part_order]
        rows = order.argsort()[places]
        attention = attention_of(routes[:, part], ids[:, part], part_order, segmented, cache)
        attention.check_steps(2)
        for index, heads in enumerate(steps):
            output = attention(*(states[rows] for states in heads), None, index)
            torch.testing.assert_close(output, expected[index][rows])
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_cache_slots():
    """Slots of decoder layers, then routes per layer, then keys and values per step and layer."""
    routes, ids = routing(seed=2, batch=1)
    order = sort_by_expert_and_sequence(routes, ids)
    cache = DynamicCache()
    attention = attention_of(routes, ids, order, segmented=True, cache=cache)
    attention(*random_heads(len(order)), None, 0)
    attention.fill(1, 3)
    filled = [layer.get_seq_length() for layer in cache.layers]
    assert filled == [0, 0, 0, 11, 0, 11, 0, 11, 0, 11]
    assert torch.equal(cache.layers[7].keys, cache.layers[5].keys)
    assert torch.equal(cache.layers[3].keys.squeeze(-1).transpose(1, 2), routes)


def test_rotation_is_relative():
    """Products of rotated queries and keys depend on the distance of their positions alone."""
    angles = torch.arange(12).unsqueeze(1) * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)
    cos, sin = angles.cos(), angles.sin()
    query, key = torch.randn(1, 2, 8).expand(12, -1, -1), torch.randn(1, 2, 8).expand(12, -1, -1)
    scores = torch.einsum("qhd,khd->hqk", apply_rotation(query, cos, sin), apply_rotation(key, cos, sin))
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance, dim1=1, dim2=2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert scores[0, 0].std() > 0.1
