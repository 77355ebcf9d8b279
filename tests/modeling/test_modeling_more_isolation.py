"""A token sees its own past and nothing else: no later token, no other row, no padding, no other document."""

import pytest
import torch

BATCH, SEQ = 3, 12


def forced(model, num_experts_per_tok):
    """Sends every token to the first experts, which then hold the longest sequences that they can."""
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias[:num_experts_per_tok] = 10.0
    return model


@pytest.fixture(params=["learned routing", "one expert for all"])
def model(request, variant, build_more):
    if request.param == "learned routing":
        return build_more(**variant)
    return forced(build_more(**variant, router_balancing="bias"), variant["num_experts_per_tok"])


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def assert_changes_only_the_future(model, ids, **steps):
    logits = logits_of(model, ids, **steps)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        row = int(torch.randint(BATCH, (), generator=generator))
        position = int(torch.randint(SEQ, (), generator=generator))
        changed = ids.clone()
        changed[row, position] = (ids[row, position] + 1 + torch.randint(500, (), generator=generator)) % 512
        difference = (logits_of(model, changed, **steps) - logits).abs().amax(dim=-1)
        may_change = torch.zeros(BATCH, SEQ, dtype=torch.bool)
        may_change[row, position:] = True
        assert difference[~may_change].max() < 1e-3
        assert difference[may_change].min() > 1e-2


def test_forced_routing_is_forced(variant, build_more, build_tokens):
    top_k = variant["num_experts_per_tok"]
    model = forced(build_more(**variant, router_balancing="bias"), top_k)
    output = model(build_tokens(BATCH, SEQ), output_router_indices=True)
    assert all(set(layer.flatten().tolist()) == set(range(top_k)) for layer in output.router_indices)


def test_token_changes_no_earlier_logits_and_no_other_row(model, build_tokens):
    assert_changes_only_the_future(model, build_tokens(BATCH, SEQ))


def test_early_exit_leaks_nothing(recurrent_variant, build_more, build_tokens, exit_threshold):
    assert_changes_only_the_future(
        build_more(**recurrent_variant), build_tokens(BATCH, SEQ), exit_threshold=exit_threshold
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_content_changes_nothing(model, build_tokens, side):
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[0, :5] = mask[2, :2] = 0
    mask = mask if side == "left" else mask.flip(1)
    ids, others = build_tokens(BATCH, SEQ), build_tokens(BATCH, SEQ, seed=1)
    refilled = torch.where(mask.bool(), ids, others)
    logits, refilled_logits = (logits_of(model, tokens, attention_mask=mask) for tokens in (ids, refilled))
    torch.testing.assert_close(logits[mask.bool()], refilled_logits[mask.bool()], atol=1e-3, rtol=1e-4)
    assert (logits - refilled_logits)[~mask.bool()].abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_row_equals_unpadded_row(model, build_tokens, side):
    """Positions need not be told: rotary positions are relative, and masks hide the padding."""
    ids, lengths = build_tokens(BATCH, SEQ), (SEQ, 7, 1)
    steps = torch.arange(SEQ)
    mask = torch.stack([steps >= SEQ - length if side == "left" else steps < length for length in lengths])
    padded = logits_of(model, ids, attention_mask=mask.long())
    for row, real in enumerate(mask):
        alone = logits_of(model, ids[row : row + 1, real])[0]
        torch.testing.assert_close(padded[row, real], alone, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}], ids=["default", "without a cache"])
@torch.no_grad()
def test_packed_documents_equal_separate_documents(model, build_tokens, arguments):
    """Two rows of documents whose borders differ, told by positions that start again."""
    rows = [(5, 4, 3), (2, 10)]
    ids = build_tokens(len(rows), SEQ)
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])
    packed = model(ids, position_ids=positions, **arguments).logits
    for row, lengths in enumerate(rows):
        for tokens, logits in zip(ids[row].split(lengths), packed[row].split(lengths), strict=True):
            torch.testing.assert_close(logits, logits_of(model, tokens.unsqueeze(0))[0], atol=1e-3, rtol=1e-4)
    assert (logits_of(model, ids) - packed)[:, -1].abs().max() > 0.1


def test_noise_of_a_training_pass_leaks_nothing(build_more, build_tokens):
    """Gradients tell who saw whom in a training pass, where states start from noise."""
    model = build_more(expert_type="more_a", num_experts_per_tok=2, state_initialization="noise").train()
    embeddings = model.get_input_embeddings()(build_tokens(BATCH, SEQ)).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits[1, 6].sum().backward()
    seen = embeddings.grad.abs().amax(dim=-1) > 0
    assert seen.nonzero().tolist() == [[1, position] for position in range(7)]
