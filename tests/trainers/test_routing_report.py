import csv
import html
import json
import re
import runpy
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from plotly.offline import get_plotlyjs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

from mixturekit.trainers.routes import record_routes, write_routes_csv
from mixturekit.trainers.routing_report import route_links, write_load_heatmap, write_report

TEXT = 'The cat sat on the mat while <script>alert("1")</script> ran & slept.\nThe dog, too.'
RECIPE = Path(__file__).parents[2] / "recipes" / "report_routing.py"
TINY = dict(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def mixtral():
    torch.manual_seed(0)
    return spread(MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)))


def olmoe():
    # Weights that are not renormalised: their sum differs from layer to layer.
    torch.manual_seed(0)
    return spread(OlmoeForCausalLM(OlmoeConfig(**TINY, num_experts=12, num_experts_per_tok=3, norm_topk_prob=False)))


def spread(model):
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    # `<script>` is one token.
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens(["<script>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def routes(tokenizer):
    model = mixtral()
    model.resize_token_embeddings(len(tokenizer))
    routes = record_routes(model, tokenizer, TEXT)
    for layer in routes.layers[1:]:
        layer.steps = 1 + layer.indices
    return routes


def own_part(path):
    """The page without the embedded library, which mentions many addresses."""
    page = Path(path).read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


def figures(page):
    """Data and layout of each figure on the page."""
    decoder = json.JSONDecoder()
    for call in re.finditer(r'Plotly\.newPlot\(\s*"([\w-]+)",\s*', page):
        data, end = decoder.raw_decode(page, call.end())
        layout, _ = decoder.raw_decode(page, page.index("{", end))
        yield call.group(1), data, layout


@pytest.mark.parametrize("build", [mixtral, olmoe])
def test_routes_are_what_the_model_computes(build, tokenizer):
    model = build().train()
    model.resize_token_embeddings(len(tokenizer))
    routes = record_routes(model, tokenizer, TEXT)
    assert model.training
    assert "".join(routes.tokens) == TEXT and "<script>" in routes.tokens
    input_ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = model.eval().model(input_ids, output_router_logits=True).router_logits
    assert [layer.layer for layer in routes.layers] == [0, 1, 2]
    for layer, logits in zip(routes.layers, expected, strict=True):
        torch.testing.assert_close(layer.logits, logits)
        weights, indices = logits.softmax(-1).topk(layer.indices.shape[1])
        assert torch.equal(layer.indices, indices)
        if build is mixtral:
            weights = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(layer.weights, weights)
        assert layer.load.sum().item() == pytest.approx(1) and len(layer.load) == routes.num_experts


@pytest.mark.parametrize("build", [mixtral, olmoe])
def test_link_widths_are_routing_weights(build, tokenizer):
    model = build()
    model.resize_token_embeddings(len(tokenizer))
    routes = record_routes(model, tokenizer, TEXT)
    entering, leaving = defaultdict(float), defaultdict(float)
    for (source, target), widths in route_links(routes).items():
        for position, width in widths.items():
            assert source[0] != "token" or source == ("token", position)
            entering[target, position] += width
            leaving[source, position] += width
    for index, layer in enumerate(routes.layers):
        for position in range(len(routes.tokens)):
            total = layer.weights[position].sum().item()
            into = {t[1]: width for (t, p), width in entering.items() if t[0] == layer.layer and p == position}
            # Per token and layer: the weights, expert by expert and in sum.
            assert into == pytest.approx({expert: weight for expert, weight, _ in layer.slots(position)})
            assert sum(into.values()) == pytest.approx(total)
            # What enters an expert leaves it, in the proportion of the sums of the two layers' weights.
            if index + 1 < len(routes.layers):
                ratio = routes.layers[index + 1].weights[position].sum().item() / total
                for expert, width in into.items():
                    assert leaving[(layer.layer, expert), position] == pytest.approx(width * ratio)
                    if build is mixtral:
                        assert ratio == pytest.approx(1)


def test_report_needs_no_network_and_escapes_tokens(routes, tmp_path):
    write_report(routes, tmp_path / "routes.html")
    page = own_part(tmp_path / "routes.html")
    # The only addresses are names of namespaces and of a server that plotly's button would upload to, never loaded.
    assert not re.search(r"(src|href|action)\s*=|@import|url\(|fetch\(|import\s*\(", page)
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {"https://plotly.com", "https://plot.ly"}
    assert "alert(" not in page.replace(html.escape(TEXT), "")
    assert page.count("<script") == page.count("</script>") and "&lt;script&gt;" in page
    assert [name for name, _, _ in figures(page)] == ["routes", "expert-load", "router-entropy", "recurrence-steps"]


def test_sankey_of_the_page(routes, tmp_path):
    write_report(routes, tmp_path / "routes.html", layers=range(1, 3), max_tokens=5)
    page = own_part(tmp_path / "routes.html")
    _, (sankey,), layout = next(figures(page))
    labels, link = sankey["node"]["label"], sankey["link"]
    assert [labels[i] for i in range(5)] == [f"{i} {routes.tokens[i].strip()}" for i in range(5)]
    assert [note["text"] for note in layout["annotations"]] == ["tokens", "layer 1", "layer 2"]
    # Two layers with weights that sum to one, five tokens: ten in all.
    assert sum(link["value"]) == pytest.approx(10, rel=1e-4)
    assert f"first 5 of {len(routes.tokens)} tokens" in page
    assert "<option" in page and page.count("<option") == 6
    # One colour per expert, whatever the layer.
    colours = defaultdict(set)
    for label, colour in list(zip(labels, sankey["node"]["color"], strict=True))[5:]:
        colours[label].add(colour)
    assert all(len(seen) == 1 for seen in colours.values())
    # Hovering over a link shows tokens and weights.
    first = link["customdata"][0]
    assert re.search(r"0 The → layer 1, expert \d<br>weight 0\.\d\d from 1 token<br>0 The: 0\.\d\d", first)


def test_other_pictures_of_the_page(routes, tmp_path):
    write_report(routes, tmp_path / "routes.html", max_tokens=5)
    pictures = {name: data for name, data, _ in figures(own_part(tmp_path / "routes.html"))}
    load = torch.tensor(pictures["expert-load"][0]["z"])
    torch.testing.assert_close(load, torch.stack([layer.load for layer in routes.layers]))
    bars, limit = pictures["router-entropy"]
    probabilities = routes.layers[2].logits.softmax(-1)
    assert bars["y"][2] == pytest.approx(-(probabilities * probabilities.log()).sum(-1).mean().item(), rel=1e-5)
    assert limit["y"] == pytest.approx([1.386294] * 3)
    steps = pictures["recurrence-steps"][0]
    assert steps["z"][0] == [None] * 5
    assert steps["z"][1] == routes.layers[1].steps[:5].float().mean(-1).tolist()
    expert, _, taken = routes.layers[1].slots(3)[0]
    assert f"3 on, layer 1<br>expert {expert}: {taken} steps" in steps["customdata"][1][3]


def test_report_without_recurrence_and_with_many_experts(tokenizer, tmp_path):
    model = olmoe()
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 8
    routes = record_routes(model, tokenizer, TEXT)
    assert len(routes.tokens) == 8
    write_report(routes, tmp_path / "routes.html")
    page = own_part(tmp_path / "routes.html")
    assert "Recurrence" not in page and "beginning of a text of" in page
    (load,) = dict((name, data) for name, data, _ in figures(page))["expert-load"]
    assert len(load["z"][0]) == 12


def test_csv_has_one_row_per_token_layer_and_slot(routes, tmp_path):
    write_routes_csv(routes, tmp_path / "routes.csv")
    with (tmp_path / "routes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(routes.tokens) * 3 * 2
    row = rows[2 * (3 * 1 + 2) + 1]
    assert (row["token_index"], row["token"], row["layer"], row["slot"]) == ("1", routes.tokens[1], "2", "1")
    expert, weight, steps = routes.layers[2].slots(1)[1]
    assert (int(row["expert"]), int(row["steps"])) == (expert, steps)
    assert float(row["weight"]) == pytest.approx(weight, rel=1e-5)
    assert rows[0]["steps"] == ""


def test_load_heatmap_is_a_png(routes, tmp_path):
    write_load_heatmap(routes, tmp_path / "load.png", layers=range(2))
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_clear(routes, tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match="layers 2 to 3 are not all in the model, whose layers with experts are 0 to 2"
    ):
        write_report(routes, tmp_path / "routes.html", layers=range(2, 4))
    with pytest.raises(ValueError, match="The text is empty"):
        record_routes(mixtral(), tokenizer, " \n")
    with pytest.raises(ValueError, match="MixtralForCausalLM has no recurrent experts"):
        record_routes(mixtral(), tokenizer, TEXT, num_recurrences=2)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router"):
        record_routes(LlamaForCausalLM(LlamaConfig(**TINY)), tokenizer, TEXT)


def test_hooks_and_mode_are_restored_when_the_forward_fails(tokenizer):
    model = mixtral().train()
    model.model.norm.forward = lambda hidden_states: 1 / 0
    with pytest.raises(ZeroDivisionError):
        record_routes(model, tokenizer, "The cat")
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = mixtral()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_recipe(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments)])
    runpy.run_path(str(RECIPE), run_name="__main__")


def test_recipe(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["--model_name_or_path", checkpoint, "--text_file", tmp_path / "text.txt", "--output_dir", tmp_path]
    run_recipe(monkeypatch, *arguments, "--layers", 1, 2, "--max_tokens", 8)
    printed = capsys.readouterr().out
    for name in ("routes.html", "expert_load.png", "routes.csv"):
        assert (tmp_path / name).stat().st_size > 0 and str(tmp_path / name) in printed
    assert f"Routes through {checkpoint}" in own_part(tmp_path / "routes.html")
    with pytest.raises(SystemExit, match="has a report .*: add --overwrite to replace it"):
        run_recipe(monkeypatch, *arguments)
    run_recipe(monkeypatch, *arguments, "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_name_or_path", "no/such/folder", "--text", "hi"], "There is no folder no/such/folder"),
        (["--text", " "], "The text is empty"),
        (["--text_file", "nothing.txt"], "There is no file nothing.txt"),
        ([], "Give either --text or --text_file"),
        (["--text", "hi", "--layers", "3"], "the first and the last layer"),
        (["--text", "hi", "--layers", "1", "5"], "layers 1 to 5 are not all in the model"),
        (["--text", "hi", "--num_recurrences", "2"], "has no recurrent experts"),
    ],
)
def test_recipe_says_what_is_wrong(arguments, message, checkpoint, tmp_path, monkeypatch):
    model = [] if "--model_name_or_path" in arguments else ["--model_name_or_path", checkpoint]
    with pytest.raises(SystemExit, match=message):
        run_recipe(monkeypatch, *model, *arguments, "--output_dir", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_recipe_refuses_a_dense_model(tokenizer, tmp_path, monkeypatch):
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="LlamaForCausalLM has no router: it is not a mixture of experts"):
        run_recipe(monkeypatch, "--model_name_or_path", tmp_path, "--text", "hi", "--output_dir", tmp_path / "report")
