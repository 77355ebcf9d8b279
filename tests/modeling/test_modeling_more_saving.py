"""What is saved is what comes back: through the auto classes, with other vocabularies, and without this package."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

from mixturekit.modeling import MoreConfig, MoreForCausalLM, MoreModel


def assert_same(model, other, ids):
    """Bit by bit the same weights; products may round differently where memory is aligned differently."""
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], other(ids)[0], atol=1e-4, rtol=1e-5)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


def test_saved_model_gives_the_same_logits(variant, tied, build_more, build_tokens, tmp_path):
    options = {"state_initialization": "learned", "router_balancing": "bias", "tie_word_embeddings": tied}
    model, ids = build_more(**variant, **options), build_tokens(2, 12)
    model.model.layers[0].mlp.gate.e_score_correction_bias.normal_()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MoreForCausalLM
    assert not any(info.values())
    assert_same(loaded.eval(), model, ids)
    saved = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in saved) is not tied
    assert not any("tokens_per_expert" in name for name in saved)
    fresh = MoreForCausalLM(model.config).eval()
    assert (fresh(ids).logits - model(ids).logits).abs().max() > 0.1


def test_auto_classes(variant, build_more, build_tokens, tmp_path):
    model, ids = build_more(**variant), build_tokens(2, 12)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MoreConfig
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MoreModel
    assert_same(base.eval(), model.model, ids)
    base.save_pretrained(tmp_path / "base")
    assert_same(AutoModel.from_pretrained(tmp_path / "base").eval(), base, ids)
    assert type(AutoModelForCausalLM.from_config(model.config)) is MoreForCausalLM


def test_loading_in_other_precisions(variant, build_more, tmp_path):
    build_more(**variant).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_sharded_checkpoint(variant, build_more, build_tokens, tmp_path):
    model, ids = build_more(**variant), build_tokens(2, 12)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), model, ids)


def test_tied_weights_stay_tied(tied, build_more, tmp_path):
    build_more(expert_type="more_c", tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert len(list(model.parameters())) == len(model.state_dict()) - tied


@pytest.mark.parametrize("vocab_size", [600, 100])
def test_resizing_the_vocabulary(tied, build_more, build_tokens, tmp_path, vocab_size):
    model, ids = build_more(expert_type="more_c", tie_word_embeddings=tied), build_tokens(2, 12) % 100
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(vocab_size)
        after = model(ids).logits
    assert after.shape[-1] == model.config.vocab_size == vocab_size
    torch.testing.assert_close(after[..., :512], before[..., :vocab_size])
    model.train()(ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same(loaded, model.eval(), ids)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_initialisation_follows_its_table():
    """Fresh parameters of every kind, as the docstring of `_init_weights` gives them."""
    model = MoreForCausalLM(
        MoreConfig.from_preset("tiny", "more_a", state_initialization="learned", num_hidden_layers=1)
    )
    experts = model.model.layers[0].mlp.experts
    for parameter in (
        experts.qkv_proj,
        experts.adapter_state,
        experts.down_proj,
        model.model.layers[0].mlp.gate.weight,
    ):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(parameter.mean().item()) < 2e-3
    assert experts.initial_state.std().item() == pytest.approx(0.6, rel=0.1)
    assert (experts.attention_output_norm == 1).all() and (experts.mlp_output_norm == 1).all()
    for expert_type, gate in (("more_c", "branch_gate"), ("more_d", "update_gate")):
        config = MoreConfig.from_preset("tiny", expert_type, num_hidden_layers=1)
        experts = MoreModel(config).layers[0].mlp.experts
        bound = config.hidden_size**-0.5
        assert 0.99 * bound < experts.gru_hidden.abs().max() <= bound
        assert experts.gru_input.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert not getattr(experts, gate).any()


def test_text_generation_pipeline(variant, build_more, tokenizer, sentences, tmp_path):
    model = build_more(**variant, vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    kwargs = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    singly = [generator(sentence, **kwargs)[0]["generated_text"] for sentence in sentences[:3]]
    batched = generator(sentences[:3], batch_size=3, **kwargs)
    assert [answer[0]["generated_text"] for answer in batched] == singly
    ids = tokenizer(sentences[0], return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert singly[0].split() == tokenizer.decode(expected, skip_special_tokens=True).split()
    assert len(set(singly)) > 1


WITHOUT_PACKAGE = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "mixturekit":
                raise ImportError("mixturekit is not installed here")

    sys.meta_path.insert(0, Blocker())
    try:
        import mixturekit
    except ImportError:
        pass
    else:
        sys.exit("the package could be imported")
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    torch.set_num_threads(1)
    ids = torch.load("ids.pt")
    for folder in sys.argv[1:]:
        for place in (folder, f"{folder}/again"):
            model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
            base = AutoModel.from_pretrained(place, trust_remote_code=True).eval()
            with torch.no_grad():
                results = {
                    "logits": model(ids).logits,
                    "states": base(ids).last_hidden_state,
                    "generated": model.generate(ids, max_new_tokens=4, do_sample=False, num_recurrences=2),
                }
            torch.save(results, f"{place}/results.pt")
            model.save_pretrained(f"{place}/again")
"""


def test_checkpoint_carries_its_code(build_more, build_tokens, tmp_path):
    """Where this package cannot be imported `trust_remote_code` is enough, and what is saved there loads again."""
    ids = build_tokens(2, 9)
    torch.save(ids, tmp_path / "ids.pt")
    models = {kind: build_more(expert_type=kind, pad_token_id=0) for kind in ("base", "more_a", "more_c")}
    for expert_type, model in models.items():
        model.save_pretrained(tmp_path / expert_type)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_PACKAGE), *models]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for expert_type, model in models.items():
        with torch.no_grad():
            expected = {"logits": model(ids).logits, "states": model.model(ids).last_hidden_state}
        expected["generated"] = model.generate(ids, max_new_tokens=4, do_sample=False, num_recurrences=2)
        for place in (tmp_path / expert_type, tmp_path / expert_type / "again"):
            torch.testing.assert_close(torch.load(place / "results.pt"), expected, atol=1e-4, rtol=1e-5)


def test_checkpoint_names_its_classes(build_more, tmp_path):
    build_more().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "more"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_more.MoreConfig",
        "AutoModel": "modeling_more.MoreModel",
        "AutoModelForCausalLM": "modeling_more.MoreForCausalLM",
    }
