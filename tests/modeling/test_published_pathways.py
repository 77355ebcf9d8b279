"""Weights in the published layout load strictly and compute what the published recurrence computes."""

import pytest
import torch
from torch import nn

from mixturekit.modeling import MopConfig, MopForActionPrediction
from mixturekit.modeling.published_pathways import load_published_state_dict

LAYERS, STREAM, ROUTER, FEATURES, ACTIONS = [[0, 4, 6], [5]], 8, 3, 7, 9
EMBEDDED = {"num_tasks": 4, "task_embedding_dim": 2}


class Published(nn.Module):
    """The layout and the recurrence of the published model, one `nn.GRU` per router and expert."""

    def __init__(self, tasks):
        super().__init__()
        if tasks:
            self.embedding = nn.Embedding(tasks["num_tasks"], tasks["task_embedding_dim"])
        self.input_layer = nn.Linear(FEATURES + tasks.get("task_embedding_dim", 0), STREAM)
        self.blocks = nn.ModuleList()
        for sizes in LAYERS:
            block = nn.ModuleDict({"hmoe": nn.ModuleDict(), "ln": nn.LayerNorm(STREAM)})
            router = {"rnn": nn.GRU(STREAM, ROUTER), "output_layer": nn.Linear(ROUTER, len(sizes))}
            block["hmoe"]["router"] = nn.ModuleDict(router)
            block["hmoe"]["experts"] = nn.ModuleList(map(self.expert, sizes))
            self.blocks.append(block)
        self.output_layer = nn.Linear(STREAM, ACTIONS)

    @staticmethod
    def expert(size):
        if size == 0:
            return nn.ModuleDict()
        parts = {"rnn": nn.GRU(STREAM, size), "batchnorm": nn.BatchNorm1d(size)}
        return nn.ModuleDict({**parts, "output_layer": nn.Linear(size, STREAM)})

    def forward(self, x, task_ids, threshold):
        if hasattr(self, "embedding"):
            x = torch.cat([x, self.embedding(task_ids)], dim=-1)
        x = self.input_layer(x)
        for block in self.blocks:
            router, experts = block["hmoe"]["router"], block["hmoe"]["experts"]
            # The first axis is the batch, but `nn.GRU` takes it for the time.
            logits = router["output_layer"](torch.relu(router["rnn"](x)[0]))
            weights = logits.softmax(dim=-1)
            active = weights >= threshold
            weights = logits.masked_fill(~active, -torch.inf).softmax(dim=-1)
            mixed = torch.zeros_like(x)
            for index, expert in enumerate(experts):
                chosen = x[active[..., index]]
                if len(expert) and len(chosen):
                    # All steps of all sequences are one unbatched sequence.
                    states = expert["batchnorm"](expert["rnn"](chosen)[0])
                    chosen = expert["output_layer"](torch.relu(states))
                mixed[active[..., index]] += weights[active[..., index]][:, index : index + 1] * chosen
            x = block["ln"](x + mixed)
        return self.output_layer(x)


@pytest.fixture(params=[{}, EMBEDDED], ids=["one task", "embedded tasks"])
def tasks(request):
    return request.param


@pytest.fixture
def published(tasks):
    model = Published(tasks)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        else:
            buffer.fill_(7)
    return model.eval()


@pytest.fixture
def policy(tasks):
    config = MopConfig(
        layers=LAYERS,
        intermediate_dim=STREAM,
        router_dim=ROUTER,
        encoder="features",
        input_dim=FEATURES,
        num_actions=ACTIONS,
        expert_norm="batchnorm",
        recurrence="published",
        **tasks,
    )
    return MopForActionPrediction(config).eval()


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("old_names", [False, True], ids=["names of today", "names of old"])
def test_parity_with_the_published_recurrence(published, policy, threshold, old_names):
    weights = published.state_dict()
    if old_names:
        weights = {name.replace("hmoe", "sparse_moe"): value for name, value in weights.items()}
    load_published_state_dict(policy, weights)
    features, task_ids = torch.randn(5, 11, FEATURES), torch.randint(4, (5, 11))
    output = policy(features=features, task_ids=task_ids, weight_threshold=threshold)
    torch.testing.assert_close(output.logits, published(features, task_ids, threshold), atol=1e-6, rtol=1e-5)


def test_published_recurrence_leaks_between_samples_and_ours_does_not(published, policy):
    load_published_state_dict(policy, published.state_dict())
    features, task_ids = torch.randn(5, 11, FEATURES), torch.randint(4, (5, 11))
    changed = features.clone()
    changed[0] += 1
    for recurrence, leaks in (("published", True), ("time", False)):
        policy.config.recurrence = recurrence
        logits = [policy(features=x, task_ids=task_ids).logits[1:] for x in (features, changed)]
        assert bool((logits[0] - logits[1]).abs().max() > 1e-5) == leaks


def test_weights_must_fit_exactly(published, policy):
    weights = published.state_dict()
    name = "blocks.0.hmoe.experts.1.rnn.weight_hh_l0"
    with pytest.raises(ValueError, match=f"lack '{name}'"):
        load_published_state_dict(policy, {key: value for key, value in weights.items() if key != name})
    with pytest.raises(ValueError, match="parts that this policy lacks: blocks.2.ln.weight"):
        load_published_state_dict(policy, {**weights, "blocks.2.ln.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has the shape \(1,\), but this policy's is \(12, 4\)"):
        load_published_state_dict(policy, {**weights, name: torch.zeros(1)})


def test_published_recurrence_knows_no_state(policy):
    features = torch.randn(2, 3, FEATURES)
    with pytest.raises(ValueError, match="neither states nor resets"):
        policy.model(features, state=policy.initial_state(2), task_ids=torch.zeros(2, 3, dtype=torch.long))
