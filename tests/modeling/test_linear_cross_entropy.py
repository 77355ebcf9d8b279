"""The chunked head gives the loss and gradients of the plain one, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from mixturekit.modeling.linear_cross_entropy import linear_cross_entropy

TOKENS, HIDDEN, VOCAB = 50, 16, 97


def head(dtype=torch.float32):
    hidden_states = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN).to(dtype).requires_grad_()
    return hidden_states, weight, torch.randint(VOCAB, (TOKENS,))


def plain(hidden_states, weight, labels):
    return F.cross_entropy((hidden_states @ weight.T).float(), labels, reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("chunk_size", [1, 7, 25, TOKENS, 1000])
@pytest.mark.parametrize("ignored", [0, 0.4, 1], ids=["all count", "some count", "none count"])
def test_loss_and_gradients_equal_the_plain_ones(chunk_size, ignored):
    hidden_states, weight, labels = head()
    labels = labels.masked_fill(torch.rand(TOKENS) < ignored, -100)
    results = []
    for loss in (
        linear_cross_entropy(hidden_states, weight, labels, chunk_size),
        plain(hidden_states, weight, labels),
    ):
        # A factor, as the mean over a batch and a loss scale give it.
        results.append((loss, *torch.autograd.grad(3 * loss, (hidden_states, weight))))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)
    assert (results[0][0] > 0) == (ignored < 1)


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_bfloat16_sums_in_float32(chunk_size):
    hidden_states, weight, labels = head(torch.bfloat16)
    results = []
    for loss in (
        linear_cross_entropy(hidden_states, weight, labels, chunk_size),
        plain(hidden_states, weight, labels),
    ):
        assert loss.dtype == torch.float32
        results.append((loss, *torch.autograd.grad(loss, (hidden_states, weight))))
    torch.testing.assert_close(*results, atol=0.05, rtol=0.02)


def test_autocast_multiplies_in_bfloat16_and_keeps_gradients_in_float32():
    hidden_states, weight, labels = head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden_states, weight, labels, 7)
    gradients = torch.autograd.grad(loss, (hidden_states, weight))
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2
    rounded = plain(hidden_states.bfloat16(), weight.bfloat16(), labels)
    torch.testing.assert_close(
        (loss, *gradients), (rounded, *torch.autograd.grad(rounded, (hidden_states, weight))), atol=0.1, rtol=0.02
    )
    assert loss != plain(hidden_states, weight, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradients(dtype):
    hidden_states, weight, labels = head(dtype)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden_states, weight, labels, 7)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden_states, weight, labels).detach(), atol=1e-2, rtol=1e-4)


def test_frozen_head():
    hidden_states, weight, labels = head()
    loss = linear_cross_entropy(hidden_states, weight.detach(), labels, 7)
    (gradient,) = torch.autograd.grad(loss, hidden_states)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(plain(hidden_states, weight, labels), hidden_states)[0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_gradient", [True, False], ids=["training", "evaluation"])
def test_logits_of_all_tokens_never_exist(dtype, with_gradient):
    hidden_states, weight, labels = head(dtype)

    def largest_allocation(chunk_size):
        # A profiler, because the fused operator hides what it allocates from a dispatch mode.
        with profile(profile_memory=True) as memory, torch.set_grad_enabled(with_gradient):
            loss = linear_cross_entropy(hidden_states, weight, labels, chunk_size)
            if with_gradient:
                loss.backward()
        return max(event.self_cpu_memory_usage for event in memory.events())

    float32_bytes = 4
    assert largest_allocation(TOKENS) >= TOKENS * VOCAB * float32_bytes
    assert largest_allocation(5) <= max(5 * VOCAB, VOCAB * HIDDEN) * float32_bytes
