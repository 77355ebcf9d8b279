"""Perplexity: against plain loops over the tokens, and against models whose perplexity is known."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.trainers.perplexity import count_words, detokenize_wikitext, perplexity_by_position, score_texts
from mixturekit.trainers.text_data import load_documents
from mixturekit.trainers.tokenization import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
WIKITEXT = Path(os.environ.get("MIXTUREKIT_DATA", ROOT.parent / "shared" / "data")) / "wikitext"
WORDS = ["<eos>", "<unk>", "\n", *["the", "town", "was", "built", "in", "a", "valley", ",", "near", "river", "."]]


def word_tokenizer():
    """One token per word, and one per end of line."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    splits = [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split("\n", "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def build_model(expert_type="more_c", **overrides):
    """A small model whose predictions differ from token to token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "num_recurrences": 2}
    model = MoreForCausalLM(MoreConfig.from_preset("debug", expert_type, **{**sizes, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter), alpha=0.1)
    return model


def build_tiny(architecture, config, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(WORDS), "initializer_range": 1.0}
    return architecture(config(**sizes, **options)).eval()


def text_of(num_tokens, seed=0):
    source = random.Random(seed)
    return " ".join(source.choice(WORDS[2:]) for _ in range(num_tokens))


@torch.no_grad()
def nats_of_last(model, ids):
    """The negative log-likelihood of the last token after all the others."""
    logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -1]
    return -logits.double().log_softmax(dim=-1)[ids[-1]].item()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_model_without_a_preference_scores_the_size_of_its_vocabulary(tokenizer, batch_size):
    model = build_model(vocab_size=777, tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    score = score_texts(model, tokenizer, [text_of(50), text_of(7)], window=16, batch_size=batch_size)
    assert score.tokens == 57
    assert score.figures()["perplexity"] == pytest.approx(777, rel=1e-5)


def test_a_text_known_by_heart_scores_close_to_one(learn_by_heart):
    text = "The town was built in a valley , near the river Lea .\nIts walls are of the 12th century .\n"
    tokenizer = train_tokenizer([text], 300)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    model = build_model(vocab_size=len(tokenizer))
    learn_by_heart(model, {"input_ids": ids, "labels": ids})
    figures = score_texts(model, tokenizer, [text], window=256).figures()
    assert 1 < figures["perplexity"] < 1.05
    assert figures["perplexity"] < figures["word_perplexity"] < 1.3
    assert 0 < figures["bits_per_byte"] < 0.07


@pytest.mark.parametrize("window, stride", [(8, 1), (8, 3), (8, 4), (8, 8), (5, 2), (1, 1), (64, 32)])
@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 24, 29])
def test_each_token_is_predicted_once_from_its_own_window(model, tokenizer, num_tokens, window, stride):
    text = text_of(num_tokens)
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    total = 0.0
    for place in range(1, num_tokens + 1):
        # The first window predicts all that it reads, the next ones `stride` tokens, the last one what is left.
        steps = max(0, math.ceil((place - window) / stride))
        stop = min(window + steps * stride, num_tokens)
        total += nats_of_last(model, ids[max(0, stop - window) : place + 1])
    score = score_texts(model, tokenizer, [text], window=window, stride=stride, batch_size=3)
    assert score.tokens == num_tokens
    assert score.nats == pytest.approx(total, rel=1e-5)


def test_a_stride_of_the_window_cuts_the_text_into_windows(model, tokenizer):
    text = text_of(24)
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids[:-1].view(3, 8)).logits
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:], reduction="sum").item()
    assert score_texts(model, tokenizer, [text], window=8, stride=8).nats == pytest.approx(plain, rel=1e-5)


def test_the_stride_is_half_of_the_window_unless_it_is_given(model, tokenizer):
    texts = [text_of(50)]
    scores = [score_texts(model, tokenizer, texts, window=16, **options) for options in ({}, {"stride": 8})]
    assert scores[0] == scores[1]


def test_texts_of_any_lengths_score_the_same_in_batches_of_any_size(tokenizer):
    texts = [text_of(length, seed=length) for length in (3, 40, 1, 17, 29)]
    for expert_type in ("base", "more_a", "more_b", "more_c", "more_d"):
        model = build_model(expert_type)
        alone = sum(score_texts(model, tokenizer, [text], window=12, batch_size=1).nats for text in texts)
        for batch_size in (1, 2, 16):
            score = score_texts(model, tokenizer, texts, window=12, batch_size=batch_size)
            assert score.documents == 5 and score.tokens == 90
            assert score.nats == pytest.approx(alone, rel=1e-5), expert_type


def test_a_text_begins_after_the_token_that_begins_documents(tokenizer):
    model = build_tiny(LlamaForCausalLM, LlamaConfig)
    with_first = word_tokenizer()
    with_first.bos_token = "<unk>"
    for chosen, first in ((tokenizer, "<eos>"), (with_first, "<unk>")):
        ids = [WORDS.index(first), WORDS.index("town")]
        assert score_texts(model, chosen, ["town"]).nats == pytest.approx(nats_of_last(model, ids), rel=1e-5)


def test_the_number_of_recurrences_reaches_the_model(tokenizer):
    texts = [text_of(20)]
    scores = []
    for depth in (1, 3):
        model = build_model(num_recurrences=depth)
        scores.append(score_texts(model, tokenizer, texts).nats)
        assert score_texts(build_model(), tokenizer, texts, num_recurrences=depth).nats == scores[-1]
    assert abs(scores[0] - scores[1]) > 1e-3


def test_the_loss_that_balances_experts_is_not_in_the_perplexity(tokenizer):
    # MoRE adds it in training only; Mixtral adds it wherever there are labels.
    plain, balanced = (
        build_tiny(MixtralForCausalLM, MixtralConfig, output_router_logits=output, router_aux_loss_coef=weight)
        for output, weight in ((False, 0.0), (True, 100.0))
    )
    ids = torch.tensor([tokenizer(text_of(20))["input_ids"]])
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss.item() for model in (plain, balanced)]
    assert losses[1] > losses[0] + 50
    assert score_texts(plain, tokenizer, [text_of(20)]) == score_texts(balanced, tokenizer, [text_of(20)])


def test_words_are_tokens_where_the_tokenizer_has_a_token_for_each_word_and_end_of_line(model, tokenizer):
    text = " the town was built in a valley , near the river . \n \n the river was near . \n"
    score = score_texts(model, tokenizer, [text])
    assert score.words == score.tokens == 12 + 5 + 3
    figures = score.figures()
    assert figures["word_perplexity"] == figures["perplexity"] == math.exp(score.nats / 20)
    assert figures["bits_per_byte"] == pytest.approx(score.nats / math.log(2) / len(text))


def test_bytes_are_those_of_utf_8(model, tokenizer):
    assert score_texts(model, tokenizer, ["valley \u2013 né"]).bytes == 14


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="no WikiText in MIXTUREKIT_DATA")
def test_the_validation_text_of_wikitext_has_the_words_that_the_literature_counts(tmp_path):
    documents = load_documents(str(WIKITEXT / "valid.txt"), cache_dir=str(tmp_path))
    assert len(documents) == 60
    assert sum(map(count_words, documents["text"])) == 217_646


def test_detokenized_text_is_scored_as_people_write_it_and_counted_as_it_was(model, tokenizer):
    text = "the town , built in 1 @,@ 901 @-@ 2 , was ( near ) a river .\n"
    score, plain = (score_texts(model, tokenizer, [text], detokenize=choice) for choice in (True, False))
    assert (score.words, score.bytes) == (plain.words, plain.bytes)
    written = score_texts(model, tokenizer, ["the town, built in 1,901-2, was (near) a river.\n"])
    assert (score.nats, score.tokens) == (written.nats, written.tokens) != (plain.nats, plain.tokens)


@pytest.mark.parametrize(
    "words, written",
    [
        (' He said : " Go , now ! " , and \n went .\n', ' He said: "Go, now!", and \n went.\n'),
        (' " Go . " \n He " fell . \n ( " No " ) . . . \n', ' "Go." \n He "fell. \n ("No")... \n'),
        (" the <unk> 's 3 @.@ 5 % [ of ] well @-@ known\n", " the <unk>'s 3.5% [of] well-known\n"),
        (" = Title = \n", " = Title = \n"),
        ("", ""),
    ],
)
def test_detokenizing_joins_what_wikitext_takes_apart(words, written):
    assert detokenize_wikitext(words) == written


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 65}, "The window is 65 tokens: the model takes 1 to 64"),
        ({"window": 0}, "The window is 0 tokens"),
        ({"window": 8, "stride": 9}, "The stride is 9 tokens: choose 1 to the window, 8"),
        ({"window": 8, "stride": 0}, "The stride is 0 tokens"),
        ({"texts": ["the town", ""]}, "A text is empty"),
        ({"texts": []}, "there is nothing to predict"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(tokenizer, options, message):
    model = build_model(max_position_embeddings=64)
    with pytest.raises(ValueError, match=message):
        score_texts(model, tokenizer, **{"texts": ["the town"], "window": 8, **options})


def test_perplexity_by_position_is_the_mean_of_a_plain_forward_over_the_beginnings(model, tokenizer):
    texts = [text_of(length, seed=length) for length in (20, 31, 5, 45)]
    ids = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]][:21] for text in texts]
    long = torch.tensor([row for row in ids if len(row) == 21])
    assert len(long) == 3
    with torch.no_grad():
        logits = model(input_ids=long[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), long[:, 1:], reduction="none").mean(dim=0)
    for batch_size in (1, 2, 8):
        buckets = perplexity_by_position(model, tokenizer, texts, length=20, bucket=8, batch_size=batch_size)
        assert [(part["first"], part["last"], part["tokens"]) for part in buckets] == [
            (1, 8, 24), (9, 16, 24), (17, 20, 12)
        ]  # fmt: skip
        for part in buckets:
            plain = nats[part["first"] - 1 : part["last"]].mean().exp().item()
            assert part["perplexity"] == pytest.approx(plain, rel=1e-5)


def test_by_position_texts_that_are_all_short_are_joined_to_long_ones(model, tokenizer):
    texts = [text_of(9, seed=seed) for seed in range(5)]
    stream = torch.tensor([token for text in texts for token in [0, *tokenizer(text)["input_ids"]]])
    rows = torch.stack([stream[start : start + 17] for start in (0, 16, 32)])
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1]).logits
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).exp().item()
    (bucket,) = perplexity_by_position(model, tokenizer, texts, length=16, bucket=16)
    assert bucket["tokens"] == 48 and bucket["perplexity"] == pytest.approx(plain, rel=1e-5)
    with pytest.raises(ValueError, match="The texts have only 50 tokens: there is no sequence of 60"):
        perplexity_by_position(model, tokenizer, texts, length=60, bucket=8)


def measure(folder):
    """Scores that several processes share out, of more windows than a batch and of one sequence only."""
    model, tokenizer = MoreForCausalLM.from_pretrained(folder).eval(), load_tokenizer(str(folder))
    texts = [text_of(length, seed=length) for length in (3, 40, 1, 17, 29)]
    score = score_texts(model, tokenizer, texts, window=12, stride=5, batch_size=4)
    return {"score": asdict(score), "buckets": perplexity_by_position(model, tokenizer, texts, length=40, bucket=10)}


@pytest.mark.slow
def test_two_processes_score_like_one(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [ROOT / "recipes" / "accelerate_configs" / "ddp.yaml", "--num_processes", 2, "--main_process_port", 0]
    command += ["--mixed_precision", "no", __file__, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400, env=environment)
    assert run.returncode == 0, run.stderr[-5000:]
    expected = measure(tmp_path)
    for rank in range(2):
        actual = json.loads((tmp_path / f"scores_{rank}.json").read_text())
        assert actual["score"] == pytest.approx(expected["score"], rel=1e-6)
        for bucket, other in zip(actual["buckets"], expected["buckets"], strict=True):
            assert bucket == pytest.approx(other, rel=1e-6)


if __name__ == "__main__":
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    Path(sys.argv[1], f"scores_{state.process_index}.json").write_text(json.dumps(measure(sys.argv[1])))
    state.destroy_process_group()
