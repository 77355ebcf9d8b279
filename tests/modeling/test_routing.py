"""The router, its balance, and losses that do not depend on how a batch is split or padded."""

import math

import pytest
import torch
from torch import nn

from mixturekit.modeling.routing import TopKRouter, balancing_loss, router_scores, z_loss

EXPERTS, HIDDEN = 4, 16
score_functions = pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])


def build_router(top_k=2, **options):
    router = TopKRouter(HIDDEN, EXPERTS, top_k, **options)
    nn.init.normal_(router.weight, std=0.3)
    return router


@score_functions
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_router_picks_the_best_scores(top_k, score_function, normalize):
    router, tokens = build_router(top_k, score_function=score_function, normalize=normalize), torch.randn(50, HIDDEN)
    logits, weights, indices = router(tokens)
    torch.testing.assert_close(logits, tokens @ router.weight.T)
    scores = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
    best = scores.sort(dim=-1, descending=True)
    assert torch.equal(indices, best.indices[:, :top_k])
    chosen = best.values[:, :top_k]
    if normalize and top_k > 1:
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(50))
    torch.testing.assert_close(weights, chosen)


def test_router_computes_in_float32_and_weighs_in_the_tokens_dtype():
    router, tokens = build_router().to(torch.bfloat16), torch.randn(50, HIDDEN).to(torch.bfloat16)
    logits, weights, _ = router(tokens)
    assert (logits.dtype, weights.dtype) == (torch.float32, torch.bfloat16)
    exact = tokens.double() @ router.weight.double().T
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(tokens)[0], logits)


@score_functions
def test_single_expert_gives_the_router_a_gradient_from_the_language_modelling_loss(
    build_more, build_tokens, score_function
):
    model = build_more(router_score_function=score_function, router_aux_loss_coef=0.0).train()
    ids = build_tokens(2, 16)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert (layer.mlp.gate.weight.grad.abs().amax(dim=1) > 1e-5).all()


def test_bias_steers_the_choice_but_not_the_weights():
    router, tokens = build_router(top_k=1, bias_balancing=True), torch.randn(50, HIDDEN)
    _, _, before = router(tokens)
    assert before.unique().numel() == EXPERTS
    router.e_score_correction_bias[2] = 10
    logits, weights, indices = router(tokens)
    assert (indices == 2).all()
    torch.testing.assert_close(weights, logits.softmax(-1)[:, 2:3])


@score_functions
def test_bias_balances_a_skewed_router(score_function):
    router = build_router(top_k=1, bias_balancing=True, score_function=score_function).train()
    tokens = torch.randn(400, HIDDEN) + 2 * router.weight[0].detach() / router.weight[0].norm().square().detach()

    def load():
        return torch.bincount(router(tokens)[2].flatten(), minlength=EXPERTS) / len(tokens)

    skewed = load()
    for _ in range(400):
        router(tokens)
        router.update_bias(0.01)
    assert skewed.max() > 0.5
    assert load().max() < 0.3
    assert load().min() > 0.2


def test_bias_counts_training_tokens_only():
    router, tokens = build_router(top_k=2, bias_balancing=True), torch.randn(10, HIDDEN)
    mask = torch.arange(10) < 7
    router.eval()(tokens)
    assert router.tokens_per_expert.sum() == 0
    _, _, indices = router.train()(tokens, mask)
    counts = torch.bincount(indices[mask].flatten(), minlength=EXPERTS)
    assert torch.equal(router.tokens_per_expert, counts)
    router(tokens, mask)
    assert torch.equal(router.tokens_per_expert, 2 * counts)
    router.update_bias(0.5)
    assert router.tokens_per_expert.sum() == 0
    assert router.e_score_correction_bias.tolist() == (0.5 * torch.sign(counts.float().mean() - counts)).tolist()


def test_update_router_bias_moves_every_layer_of_a_model(build_more, build_tokens):
    model = build_more(router_balancing="bias", router_bias_update_rate=0.25).train()
    ids = build_tokens(2, 16)
    output = model(ids, labels=ids)
    assert output.aux_loss is None
    torch.testing.assert_close(output.loss, output.lm_loss)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.zero_()
    model.update_router_bias()
    for layer in model.model.layers:
        assert set(layer.mlp.gate.e_score_correction_bias.abs().tolist()) <= {0.25, 0.0}
        assert layer.mlp.gate.e_score_correction_bias.any()


def test_model_in_bfloat16_keeps_its_bias_and_counts_exactly(build_more, build_tokens):
    model = build_more(router_balancing="bias")
    model.model.layers[0].mlp.gate.e_score_correction_bias.fill_(1.001)
    state, bfloat16 = model.state_dict(), torch.bfloat16
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=state, dtype=bfloat16)
    router = loaded.model.layers[0].mlp.gate
    assert (loaded.dtype, router.e_score_correction_bias.dtype) == (bfloat16, torch.float32)
    assert torch.equal(router.e_score_correction_bias, torch.full((EXPERTS,), 1.001))
    with torch.no_grad():
        loaded.train()(build_tokens(1, 1501), use_cache=False)
    assert router.tokens_per_expert.sum() == 1501


def uniform_indices(batch, seq, slots):
    """Each expert is picked equally often in each row."""
    return (torch.arange(batch * seq).unsqueeze(1) + torch.arange(slots)) % EXPERTS


@score_functions
@pytest.mark.parametrize("slots", [1, 2])
def test_balancing_loss_is_least_when_even_and_most_when_collapsed(score_function, slots):
    mask = torch.ones(2, 8, dtype=torch.bool)
    even = balancing_loss(torch.zeros(16, EXPERTS), uniform_indices(2, 8, slots), mask, score_function)
    torch.testing.assert_close(even, torch.full((2,), float(slots)))
    logits = torch.full((16, EXPERTS), -20.0)
    logits[:, :slots] = 20.0
    collapsed = balancing_loss(logits, torch.arange(slots).expand(16, -1), mask, score_function)
    torch.testing.assert_close(collapsed, torch.full((2,), float(EXPERTS)))


@score_functions
def test_balancing_loss_grows_with_the_skew(score_function):
    logits, mask, losses = torch.randn(2 * 200, EXPERTS), torch.ones(2, 200, dtype=torch.bool), []
    for skew in (0.0, 0.5, 1.0, 2.0, 4.0):
        skewed = logits + torch.tensor([skew, 0, 0, 0])
        losses.append(balancing_loss(skewed, skewed.topk(2).indices, mask, score_function))
    assert (torch.stack(losses).diff(dim=0) > 1e-3).all()


@score_functions
def test_balancing_loss_by_definition(score_function):
    """Number of experts times the sum over experts of share of tokens times mean probability, per sequence."""
    logits, slots = torch.randn(2 * 6, EXPERTS), 2
    indices = logits.topk(slots).indices
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    loss = balancing_loss(logits, indices, mask, score_function)
    for row in range(2):
        tokens = [6 * row + place for place in range(6) if mask[row, place]]
        expected = 0.0
        for expert in range(EXPERTS):
            share = sum(expert in indices[token].tolist() for token in tokens) / len(tokens)
            scores = router_scores(logits[tokens], score_function)
            expected += share * (scores / scores.sum(dim=1, keepdim=True))[:, expert].mean().item()
        assert loss[row].item() == pytest.approx(EXPERTS * expected, rel=1e-5)


def test_z_loss_by_definition():
    logits = 3 * torch.randn(2 * 3, EXPERTS)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
    squares = [math.log(sum(math.exp(value) for value in token)) ** 2 for token in logits.tolist()]
    expected = [sum(squares[:3]) / 3, sum(squares[4:]) / 2]
    torch.testing.assert_close(z_loss(logits, mask), torch.tensor(expected))


def test_losses_ignore_padding_and_a_row_of_nothing_else():
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    logits = torch.randn(10, EXPERTS)
    changed = torch.where(mask.view(-1, 1), logits, 10 * torch.randn(10, EXPERTS))
    for loss in (
        lambda logits: balancing_loss(logits, logits.topk(2).indices, mask),
        lambda logits: z_loss(logits, mask),
    ):
        assert torch.equal(loss(logits), loss(changed))
        assert loss(logits)[0] > 0
        assert loss(logits)[1] == 0


def gradients_of(model):
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients


def total(outputs, field):
    return sum(getattr(output, field).detach() for output in outputs)


@pytest.mark.parametrize("padded", [False, True], ids=["full rows", "padded rows"])
def test_loss_of_a_batch_equals_that_of_accumulated_rows(variant, build_more, build_tokens, padded):
    """Every part of the loss, and its gradients: language modelling, balance and z-loss."""
    model = build_more(**variant, router_aux_loss_coef=0.5, router_z_loss_coef=0.1).train()
    ids = build_tokens(4, 12)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :7] = mask[2, 5:] = mask[3, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    whole = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=None)
    items = (labels[:, 1:] != -100).sum()
    whole.loss.backward()
    expected = gradients_of(model)
    rows = []
    for row in range(4):
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        rows.append(model(**{name: part[row : row + 1] for name, part in inputs.items()}, num_items_in_batch=items))
        rows[-1].loss.backward()
    for field in ("loss", "lm_loss", "aux_loss", "z_loss"):
        torch.testing.assert_close(total(rows, field), getattr(whole, field).detach())
    torch.testing.assert_close(whole.loss, whole.lm_loss + 0.5 * whole.aux_loss + 0.1 * whole.z_loss)
    assert whole.aux_loss > 0 and whole.z_loss > 0
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4 * expected[name].abs().max().item(), rtol=1e-4)


def test_auxiliary_losses_do_not_see_padding_content(variant, build_more, build_tokens):
    model = build_more(**variant, router_z_loss_coef=0.1).train()
    ids, others = build_tokens(2, 12), build_tokens(2, 12, seed=1)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    outputs = [
        model(torch.where(mask.bool(), ids, filling), attention_mask=mask, labels=labels) for filling in (ids, others)
    ]
    for field in ("loss", "aux_loss", "z_loss"):
        torch.testing.assert_close(*(getattr(output, field) for output in outputs))
    unmasked = [model(torch.where(mask.bool(), ids, filling), labels=labels).aux_loss for filling in (ids, others)]
    assert (unmasked[0] - unmasked[1]).abs() > 1e-3
