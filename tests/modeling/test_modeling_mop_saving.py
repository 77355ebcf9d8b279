"""A saved policy comes back: through its class, the auto class, in other precisions, and without this package."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from mixturekit.modeling import MopConfig, MopForActionPrediction, MopModel

SMALL = {"layers": "0,4;6,12", "intermediate_dim": 16, "router_dim": 5, "mission_dim": 8}
MISSIONS = ["go to a red ball", "pick up the grey key"]


@pytest.fixture(
    params=[{}, {"encoder": "bow_conv_film", "vision_dim": 8}, {"expert_norm": "batchnorm"}],
    ids=["flat", "film", "batch norm"],
)
def policy(request):
    return MopForActionPrediction(MopConfig(**SMALL, **request.param)).eval()


def logits_of(policy):
    images = np.random.default_rng(0).integers(3, size=(2, 7, 7, 3), dtype=np.uint8)
    return policy.step(images, np.array([0, 3]), MISSIONS).logits


def test_saved_policy_acts_the_same(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    for auto_class in (MopForActionPrediction, AutoModel):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is MopForActionPrediction and not any(info.values())
        torch.testing.assert_close(logits_of(loaded), logits_of(policy))
    assert AutoConfig.from_pretrained(tmp_path).layers == [[0, 4], [6, 12]]
    assert AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_layers_alone_load_from_the_same_checkpoint(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    layers = MopModel.from_pretrained(tmp_path)
    features = torch.randn(2, 3, policy.config.input_dim)
    torch.testing.assert_close(layers(features).last_hidden_state, policy.model(features).last_hidden_state)
    layers.save_pretrained(tmp_path / "layers")
    assert type(AutoModel.from_pretrained(tmp_path / "layers")) is MopModel


def test_loads_without_the_package(policy, tmp_path):
    policy.save_pretrained(tmp_path / "checkpoint")
    torch.save(logits_of(policy), tmp_path / "logits.pt")
    program = """
        import sys
        sys.modules["mixturekit"] = None
        import numpy as np, torch
        from transformers import AutoModel
        policy = AutoModel.from_pretrained("checkpoint", trust_remote_code=True).eval()
        images = np.random.default_rng(0).integers(3, size=(2, 7, 7, 3), dtype=np.uint8)
        observations = [
            {"image": image, "direction": direction, "mission": mission}
            for image, direction, mission in zip(images, (0, 3), ("go to a red ball", "pick up the grey key"))
        ]
        actions, state = policy.act(observations)
        logits = torch.load("logits.pt", weights_only=True)
        assert torch.equal(actions, logits[:, 0].argmax(dim=-1))
        missions = ["go to a red ball", "pick up the grey key"]
        torch.testing.assert_close(policy.step(images, np.array([0, 3]), missions).logits, logits)
        print(type(policy).__module__.split(".")[0], state.keys())
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("transformers_modules")


def test_frozen_text_model_is_used_but_neither_trained_nor_saved(tmp_path):
    words = ["[PAD]", "[UNK]", *sorted({word for mission in MISSIONS for word in mission.split()})]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "text")
    shape = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text_model = BertModel(BertConfig(vocab_size=len(words), **shape)).eval()
    text_model.save_pretrained(tmp_path / "text")

    config = MopConfig(**SMALL, mission_encoder="pretrained", mission_model_name_or_path=str(tmp_path / "text"))
    assert config.mission_feature_dim == 12
    policy = MopForActionPrediction(config).eval()
    features = policy.prepare_missions(MISSIONS)["mission_features"]
    for mission, feature in zip(MISSIONS, features, strict=True):
        tokens = tokenizer(mission, return_tensors="pt")
        expected = text_model(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-4)
    assert not any("text" in name for name in policy.state_dict())
    policy.save_pretrained(tmp_path / "policy")
    torch.testing.assert_close(logits_of(AutoModel.from_pretrained(tmp_path / "policy")), logits_of(policy))
