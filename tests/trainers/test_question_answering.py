"""Questions put to a model: the same answers in any batch, and the likelihoods of a plain forward."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.trainers.question_answering import QuestionAnswerer, few_shot_prefix
from mixturekit.trainers.tokenization import encode_answers, encode_prompts

EXPERTS = ["base", "more_a", "more_b", "more_c", "more_d"]
ARCHITECTURES = [*EXPERTS, "llama", "mixtral"]
# Of one token and of several.
CANDIDATES = [" garden", " kitchen", " zebra crossing", " bathroom", " q"]


def build_model(architecture, tokenizer, **overrides):
    """A small model whose answers differ from question to question."""
    torch.manual_seed(0)
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, **marks, **overrides}
    if architecture in EXPERTS:
        options = {"num_recurrences": 2, "num_experts_per_tok": 2, **sizes}
        model = MoreForCausalLM(MoreConfig.from_preset("debug", architecture, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3).add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()
    sizes |= {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).eval()
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, initializer_range=0.3)).eval()


@torch.no_grad()
def plain_log_likelihood(model, tokenizer, prompt, answer, **options):
    (prompt_ids,), (answer_ids,) = encode_prompts(tokenizer, [prompt]), encode_answers(tokenizer, [answer])
    logits = model(input_ids=torch.tensor([prompt_ids + answer_ids]), **options).logits[0].double().log_softmax(dim=-1)
    return sum(logits[len(prompt_ids) - 1 + place, token].item() for place, token in enumerate(answer_ids))


@pytest.fixture(scope="module")
def examples(solved):
    """Stories and sums by turns, so that long and short prompts share a batch."""
    mixed = [example for pair in zip(solved.stories, solved.sums, strict=False) for example in pair]
    assert len(mixed) >= 16
    return mixed[:16]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_question_has_the_same_answer_alone_and_padded_in_a_batch(solved, examples, architecture):
    model = build_model(architecture, solved.tokenizer)
    answerer = QuestionAnswerer(model, solved.tokenizer, candidates=CANDIDATES, with_routes=True, max_new_tokens=4)
    together = answerer(examples)
    assert len({answer.predicted for answer in together}) > 1
    for example, answer in zip(examples, together, strict=True):
        (alone,) = answerer([example])
        assert alone.log_likelihood == pytest.approx(answer.log_likelihood, rel=1e-4)
        same = {"log_likelihood": 0.0, "routes": ""}
        assert replace(alone, **same) == replace(answer, **same)
        assert choices(alone.routes) == choices(answer.routes)


def choices(routes):
    """Layers and experts without the weights, whose last digit depends on the batch."""
    return [choice.split("@")[0] for choice in routes.split()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_likelihoods_are_those_of_a_plain_forward_over_prompt_and_answer(solved, examples, architecture):
    model = build_model(architecture, solved.tokenizer)
    assert {len(ids) for ids in encode_answers(solved.tokenizer, [row.answer for row in examples])} >= {1, 2}
    for example, answer in zip(examples, QuestionAnswerer(model, solved.tokenizer)(examples), strict=True):
        plain = plain_log_likelihood(model, solved.tokenizer, example.prompt, example.answer)
        assert answer.log_likelihood == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("architecture", ["more_c", "llama"])
def test_the_candidate_that_a_plain_forward_finds_most_likely_is_ranked_first(solved, architecture):
    model = build_model(architecture, solved.tokenizer)
    lengths = {len(ids) for ids in encode_answers(solved.tokenizer, CANDIDATES)}
    assert 1 in lengths and max(lengths) > 4
    answers = QuestionAnswerer(model, solved.tokenizer, candidates=CANDIDATES)(solved.stories)
    for example, answer in zip(solved.stories, answers, strict=True):
        plain = [plain_log_likelihood(model, solved.tokenizer, example.prompt, text) for text in CANDIDATES]
        assert answer.ranked == CANDIDATES[plain.index(max(plain))].split()[0]
    assert len({answer.ranked for answer in answers}) > 1


def test_candidates_are_ranked_by_their_whole_likelihood(solved):
    example = solved.stories[0]
    twice = f"{example.answer} {example.answer}"
    candidates = [" q", twice, example.answer]
    (answer,) = QuestionAnswerer(solved.model, solved.tokenizer, candidates=candidates[:2])([example])
    assert answer.ranked == example.answer.strip()
    # Both begin with the right word, but after it the model knows that the answer ends.
    lead = QuestionAnswerer(solved.model, solved.tokenizer)
    likelihoods = [lead([replace(example, answer=text)])[0].log_likelihood for text in candidates]
    assert likelihoods[2] > likelihoods[1] + 3


def test_ranking_and_generation_agree_on_a_solved_task(solved):
    candidates = sorted({example.answer for example in solved.stories})
    assert len(candidates) > 2
    answers = QuestionAnswerer(solved.model, solved.tokenizer, candidates=candidates)(solved.stories)
    for example, answer in zip(solved.stories, answers, strict=True):
        assert answer.predicted == answer.true_answer == answer.ranked == example.answer.strip()
        assert answer.is_correct and answer.is_ranked_first
        assert answer.log_likelihood > -0.7


def test_solved_sums_read_with_the_most_significant_digit_first(solved):
    assert any(example.answer.strip() != example.answer.strip()[::-1] for example in solved.sums)
    for example, answer in zip(
        solved.sums, QuestionAnswerer(solved.model, solved.tokenizer)(solved.sums), strict=True
    ):
        left, _, right, _ = example.prompt.split()
        assert answer.predicted == answer.true_answer == str(int(left) + int(right))
        assert answer.is_correct and answer.ranked is None


def test_a_wrong_answer_is_wrong_by_both_protocols(solved):
    example = solved.stories[0]
    other = next(row.answer for row in solved.stories if row.answer != example.answer)
    answerer = QuestionAnswerer(solved.model, solved.tokenizer, candidates=[example.answer, other])
    (answer,) = answerer([replace(example, answer=other)])
    assert not answer.is_correct and not answer.is_ranked_first
    assert answer.predicted == answer.ranked == example.answer.strip() and answer.true_answer == other.strip()


def test_solved_examples_are_read_before_the_question(solved):
    model, example = build_model("more_c", solved.tokenizer), solved.stories[-1]
    shots = few_shot_prefix(solved.stories[:2])
    first, second = solved.stories[:2]
    assert shots == f"{first.prompt}{first.answer}\n\n{second.prompt}{second.answer}\n\n"
    (zero,) = QuestionAnswerer(model, solved.tokenizer)([example])
    (two,) = QuestionAnswerer(model, solved.tokenizer, shots=shots)([example])
    plain = plain_log_likelihood(model, solved.tokenizer, shots + example.prompt, example.answer)
    assert two.log_likelihood == pytest.approx(plain, rel=1e-4)
    assert two.log_likelihood != pytest.approx(zero.log_likelihood, rel=1e-2)


@pytest.mark.parametrize("architecture", [*EXPERTS, "mixtral"])
def test_routes_are_what_the_routers_say_of_the_last_token_of_the_prompt(solved, examples, architecture):
    model = build_model(architecture, solved.tokenizer)
    answers = QuestionAnswerer(model, solved.tokenizer, with_routes=True)(examples)
    for example, answer in zip(examples, answers, strict=True):
        (ids,) = encode_prompts(solved.tokenizer, [example.prompt])
        with torch.no_grad():
            outputs = model(input_ids=torch.tensor([ids]), output_router_logits=True)
        expected = []
        for layer, logits in enumerate(outputs.router_logits):
            weights, experts = logits[-1].softmax(dim=-1).topk(2)
            expected += zip([layer] * 2, experts.tolist(), (weights / weights.sum()).tolist(), strict=True)
        told = [choice.replace("@", ":").split(":") for choice in answer.routes.split()]
        assert [(int(layer), int(expert)) for layer, expert, _ in told] == [entry[:2] for entry in expected]
        assert [float(weight) for *_, weight in told] == pytest.approx([entry[2] for entry in expected], abs=2e-3)


def test_a_model_without_routers_has_no_routes(solved):
    model = build_model("llama", solved.tokenizer)
    (answer,) = QuestionAnswerer(model, solved.tokenizer, with_routes=True)(solved.stories[:1])
    assert answer.routes == "" and answer.recurrence_steps is None


@pytest.mark.parametrize("architecture", EXPERTS)
def test_the_steps_of_recurrent_experts_are_those_that_were_asked_for(solved, architecture):
    model = build_model(architecture, solved.tokenizer)
    for depth in (1, 3):
        options = {} if architecture == "base" else {"num_recurrences": depth}
        answers = QuestionAnswerer(model, solved.tokenizer, with_routes=True, **options)(solved.stories[:2])
        for example, answer in zip(solved.stories, answers, strict=False):
            assert answer.recurrence_steps == (None if architecture == "base" else depth)
            plain = plain_log_likelihood(model, solved.tokenizer, example.prompt, example.answer, **options)
            assert answer.log_likelihood == pytest.approx(plain, rel=1e-4)


def test_steps_are_the_mean_over_layers_where_tokens_leave_the_recurrence_early(solved):
    model = build_model("more_c", solved.tokenizer, exit_threshold=0.3, num_recurrences=6)
    answers = QuestionAnswerer(model, solved.tokenizer, with_routes=True)(solved.stories)
    steps = {answer.recurrence_steps for answer in answers}
    assert len(steps) > 1 and all(1 <= mean <= 6 for mean in steps)


def test_of_a_prompt_that_is_too_long_the_end_is_read(solved):
    model = build_model("more_c", solved.tokenizer, max_position_embeddings=16)
    example = max(solved.stories, key=lambda row: len(row.prompt))
    (ids,) = encode_prompts(solved.tokenizer, [example.prompt])
    assert len(ids) > 12
    (answer,) = QuestionAnswerer(model, solved.tokenizer, max_new_tokens=4)([example])
    (end,) = encode_answers(solved.tokenizer, [example.answer])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[-12:] + end])).logits[0].double().log_softmax(dim=-1)
    plain = sum(logits[11 + place, token].item() for place, token in enumerate(end))
    assert answer.log_likelihood == pytest.approx(plain, rel=1e-4)


def test_answers_that_leave_no_room_for_a_question_are_refused(solved):
    model = build_model("more_c", solved.tokenizer, max_position_embeddings=16)
    with pytest.raises(ValueError, match="Answers of 16 tokens leave none of the 16"):
        QuestionAnswerer(model, solved.tokenizer, max_new_tokens=16)


def test_no_questions_have_no_answers(solved):
    assert QuestionAnswerer(solved.model, solved.tokenizer, candidates=CANDIDATES)([]) == []
