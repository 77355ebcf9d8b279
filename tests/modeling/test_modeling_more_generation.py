"""Generation with a cache gives what the full forward gives, whatever the experts, the padding and the steps."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

PROMPT = 11
CHUNKS = {"token by token": [1] * PROMPT, "in chunks": [4, 1, 3, 3]}


def left_padded(build_tokens):
    """Two prompts of 11 and 7 tokens, and their mask."""
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :4] = 0
    return build_tokens(2, PROMPT) * mask, mask


def positions(mask):
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


@torch.no_grad()
def logits_in_chunks(model, ids, mask, chunks, **steps):
    """Logits of all positions, computed chunk after chunk with a cache."""
    cache, pieces, end = DynamicCache(config=model.config), [], 0
    for length in chunks:
        start, end = end, end + length
        pieces.append(
            model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions(mask)[:, start:end],
                past_key_values=cache,
                use_cache=True,
                **steps,
            ).logits
        )
    return torch.cat(pieces, dim=1)


@torch.no_grad()
def full_logits(model, ids, mask, **steps):
    return model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, **steps).logits


def assert_cache_is_exact(model, ids, mask, chunks, **steps):
    real = mask.bool()
    full = full_logits(model, ids, mask, **steps)[real]
    torch.testing.assert_close(logits_in_chunks(model, ids, mask, chunks, **steps)[real], full, atol=1e-3, rtol=1e-4)
    # What stands in the cache matters: a token without its past predicts something else.
    alone = full_logits(model, ids[:1, -1:], mask[:1, -1:], **steps)
    assert (alone - full_logits(model, ids[:1], mask[:1], **steps)[:, -1:]).abs().max() > 0.5


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_cache_equals_full_forward(variant, build_more, build_tokens, chunks):
    assert_cache_is_exact(build_more(**variant), *left_padded(build_tokens), chunks)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_cache_equals_full_forward_for_any_number_of_steps(
    recurrent_variant, build_more, build_tokens, steps, implementation
):
    model = build_more(**recurrent_variant)
    model.set_experts_implementation(implementation)
    assert_cache_is_exact(model, *left_padded(build_tokens), [8, 1, 1, 1], **steps)


def test_early_exit_test_has_early_exits(recurrent_variant, build_more, build_tokens, exit_threshold):
    """Guards the test above: its thresholds let some tokens go and keep others, in the prompt as in each new token."""
    model = build_more(**recurrent_variant)
    ids, mask = left_padded(build_tokens)
    output = model(ids, attention_mask=mask, exit_threshold=exit_threshold, output_recurrence_steps=True)
    steps = torch.cat([layer.flatten() for layer in output.recurrence_steps])
    assert steps.min() < steps.max() <= model.config.num_recurrences


def generate(model, ids, mask, **kwargs):
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=8,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    assert output.sequences.shape[1] == ids.shape[1] + 8
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize(
    "search",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}],
    ids=["greedy", "beams", "sampling"],
)
def test_generation_is_the_same_with_and_without_a_cache(variant, build_more, build_tokens, search):
    model = build_more(**variant)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        results.append(
            generate(model, *left_padded(build_tokens), use_cache=use_cache, **{"do_sample": False, **search})
        )
    (cached, cached_logits), (plain, plain_logits) = results
    assert cached.tolist() == plain.tolist()
    torch.testing.assert_close(cached_logits, plain_logits, atol=1e-3, rtol=1e-4)
    assert len(set(cached[0, PROMPT:].tolist())) > 1


def test_generation_with_other_steps(recurrent_variant, build_more, build_tokens, steps):
    """`num_recurrences` and `exit_threshold` reach the model through `generate`, and hold for every token."""
    model = build_more(**recurrent_variant)
    ids, mask = left_padded(build_tokens)
    sequences, logits = generate(model, ids, mask, do_sample=False, **steps)
    grown = torch.cat((mask, mask.new_ones(2, 7)), dim=1)
    expected = full_logits(model, sequences[:, :-1], grown, **steps)[:, PROMPT - 1 :].transpose(0, 1)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
    if steps:
        _, configured = generate(model, ids, mask, do_sample=False)
        assert (configured[0] - logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_continues_from_a_cache(variant, build_more, build_tokens, num_beams):
    model = build_more(**variant)
    ids = build_tokens(1, PROMPT)
    kwargs = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "max_new_tokens": 5}
    first = model.generate(ids, **kwargs)
    prompt = torch.cat((first.sequences, build_tokens(1, 3, seed=1)), dim=1)
    cache = first.past_key_values
    if num_beams > 1:
        cache.batch_repeat_interleave(num_beams)
    continued = model.generate(prompt, past_key_values=cache, num_beams=num_beams, **kwargs).sequences
    assert continued.tolist() == model.generate(prompt, num_beams=num_beams, **kwargs).sequences.tolist()


def test_cache_can_be_cropped(variant, build_more, build_tokens):
    """Assisted generation takes back tokens that the model did not accept."""
    model = build_more(**variant)
    ids = build_tokens(1, PROMPT)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(6 - PROMPT)
        resumed = model(ids[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(resumed, model(ids).logits[:, 6:], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("expert_type", ["base", "more_b", "more_c", "more_d"])
def test_static_cache(expert_type, build_more, build_tokens):
    model = build_more(expert_type=expert_type)
    kwargs = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "disable_compile": True}
    ids, mask = left_padded(build_tokens)
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", **kwargs)
    assert static.tolist() == model.generate(ids, attention_mask=mask, **kwargs).tolist()


def test_more_a_needs_a_dynamic_cache(build_more, build_tokens):
    model = build_more(expert_type="more_a")
    with pytest.raises(ValueError, match="need a DynamicCache, got a StaticCache"):
        model(build_tokens(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=8))


def test_more_a_keeps_the_steps_of_its_cache(build_more, build_tokens):
    model = build_more(expert_type="more_a")
    cache = model(build_tokens(1, 4), use_cache=True, num_recurrences=3).past_key_values
    with pytest.raises(ValueError, match="filled with num_recurrences=3, but this call asks for 4"):
        model(build_tokens(1, 1), past_key_values=cache)


def test_prompt_may_be_embeddings(variant, build_more, build_tokens):
    model = build_more(**variant)
    ids = build_tokens(1, PROMPT)
    kwargs = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    from_embeddings = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **kwargs)
    assert from_embeddings.tolist() == model.generate(ids, **kwargs)[:, PROMPT:].tolist()
