"""What the tests of MoRE share: its variants, models whose every part shows in the logits, and a small tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixturekit.modeling import MoreConfig, MoreForCausalLM
from mixturekit.modeling.configuration_more import EXPERT_TYPES

VARIANTS = [
    pytest.param({"expert_type": expert_type, "num_experts_per_tok": top_k}, id=f"{expert_type}-top{top_k}")
    for expert_type in EXPERT_TYPES
    for top_k in (1, 2)
]
# Relative changes of the state at which some tokens of a `lively_model` leave the recurrence early and others do not.
EXIT_THRESHOLDS = {"more_a": 0.6, "more_b": 0.5, "more_c": 0.15, "more_d": 0.3}
SENTENCES = [
    "mary went to the kitchen .",
    "john took the milk there .",
    "mary moved to the garden .",
    "where is the milk ? kitchen",
]


# More threads than free cores make models this small hundreds of times slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Configuration of each kind of expert, with one and with two experts per token."""
    return request.param


@pytest.fixture(params=VARIANTS[2:])
def recurrent_variant(request):
    """The same without `base`, which has no recurrence."""
    return request.param


@pytest.fixture(params=["all steps", "two steps", "early exit"])
def steps(request, recurrent_variant):
    """Arguments of a forward pass that change how far a recurrence goes."""
    exit_threshold = EXIT_THRESHOLDS[recurrent_variant["expert_type"]]
    return {
        "all steps": {},
        "two steps": {"num_recurrences": 2},
        "early exit": {"exit_threshold": exit_threshold},
    }[request.param]


@pytest.fixture
def exit_threshold(recurrent_variant):
    """The relative change below which some tokens leave a recurrence early, and others do not."""
    return EXIT_THRESHOLDS[recurrent_variant["expert_type"]]


@pytest.fixture
def build_more():
    return lively_model


@pytest.fixture
def build_tokens():
    return random_tokens


@pytest.fixture
def sentences():
    return SENTENCES


@pytest.fixture
def tokenizer():
    """One token per word of the sentences."""
    words = ["<pad>", "<eos>", "<unk>", *sorted({word for sentence in SENTENCES for word in sentence.split()})]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def lively_model(**overrides) -> MoreForCausalLM:
    """A `debug` model in evaluation mode.

    Fresh weights are so small, and gates and norms so neutral, that many a mistake would not show in the logits.
    """
    model = MoreForCausalLM(MoreConfig.from_preset("debug", **{"num_key_value_heads": 2, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter), alpha=0.1)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 512, shape, generator=torch.Generator().manual_seed(seed))
