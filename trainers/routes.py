"""
Which experts each token of a text visits in a mixture of experts, recorded from one forward pass.

Shapes: tokens, of one text; top_k, the experts that one token uses in a layer; experts, of one layer.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.routing_statistics import (
    Routing,
    RoutingRecorder,
    expert_counts,
    expert_load,
    infer_scores,
)


@dataclass
class LayerRoutes:
    """
    The routes of a text's tokens through one layer.

    Args:
        layer (`int`): The number of the layer in the model.
        indices (`torch.LongTensor` of shape `(tokens, top_k)`): The experts of each token.
        weights (`torch.FloatTensor` of shape `(tokens, top_k)`): The weights of their outputs.
        logits (`torch.FloatTensor` of shape `(tokens, experts)`): The router's logits.
        steps (`torch.LongTensor` of shape `(tokens, top_k)`, *optional*): The recurrences that each expert ran.
    """

    layer: int
    indices: Tensor
    weights: Tensor
    logits: Tensor
    steps: Tensor | None = None

    @property
    def load(self) -> Tensor:
        """The fraction of the assignments that each expert received, of shape `(experts,)`."""
        return expert_load(expert_counts(self.indices, self.logits.shape[-1]))

    def slots(self, position: int) -> list[tuple[int, float, int | None]]:
        """Expert, weight and steps, for each expert of the token at `position`."""
        experts, weights = self.indices[position].tolist(), self.weights[position].tolist()
        steps = [None] * len(experts) if self.steps is None else self.steps[position].tolist()
        return list(zip(experts, weights, steps, strict=True))


@dataclass
class Routes:
    """
    The routes of a text's tokens through a model.

    Args:
        model_name (`str`): What the page calls the model.
        tokens (`list[str]`): The text of each token.
        layers (`list[LayerRoutes]`): The layers that have routers, in order.
        scores (`str`): How entropies turn logits into probabilities, as in
            [`~modeling.routing_statistics.router_probabilities`].
        num_text_tokens (`int`): The tokens of the whole text, of which `tokens` may be the beginning.
    """

    model_name: str
    tokens: list[str]
    layers: list[LayerRoutes]
    scores: str
    num_text_tokens: int

    @property
    def num_experts(self) -> int:
        """The number of experts of the layer that has most."""
        return max(layer.logits.shape[-1] for layer in self.layers)

    def select_layers(self, layers: range | None) -> "Routes":
        """The routes through the layers whose numbers are in `layers`; through all of them with `None`."""
        if layers is None:
            return self
        numbers = [layer.layer for layer in self.layers]
        selected = [layer for layer in self.layers if layer.layer in layers]
        if not selected or min(layers) < 0 or max(layers) > numbers[-1]:
            raise ValueError(
                f"The layers {layers.start} to {layers.stop - 1} are not all in the model, whose layers with experts "
                f"are {numbers[0]} to {numbers[-1]}."
            )
        return replace(self, layers=selected)


def record_routes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    num_recurrences: int | None = None,
    scores: str | None = None,
) -> Routes:
    """
    Run a model over a text once, and record what its routers decide.

    Args:
        model (`PreTrainedModel`): Any transformers MoE model that declares `router_logits` in `_can_record_outputs`.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        text (`str`): The text, of which the model reads what fits into its `max_position_embeddings`.
        num_recurrences (`int`, *optional*): Passed to the model's forward, for models with recurrent experts.
        scores (`str`, *optional*): `"softmax"`, `"sigmoid"` or `"probabilities"`; told from the routers by default.

    Example:

    ```python
    routes = record_routes(model, tokenizer, "The cat sat on the mat.")
    write_report(routes, "routes.html", layers=range(0, 4))
    ```
    """
    token_ids = tokenizer(text, verbose=False)["input_ids"]
    if not text.strip() or not token_ids:
        raise ValueError("The text is empty: there are no tokens to follow.")
    recurrences = {}
    if num_recurrences is not None:
        if "num_recurrences" not in model.config.to_dict():
            raise ValueError(f"{type(model).__name__} has no recurrent experts, so num_recurrences has no meaning.")
        recurrences["num_recurrences"] = num_recurrences
    # Some models have no such limit.
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    layers: list[LayerRoutes] = []

    def on_routing(layer: int, routing: Routing) -> None:
        nonlocal scores
        scores = scores or infer_scores(routing)
        parts = (routing.indices.long(), routing.weights.float(), routing.logits.float())
        layers.append(LayerRoutes(layer, *(part.cpu() for part in parts)))

    def on_steps(layer: int, steps: Tensor, mask: Tensor | None) -> None:
        # The experts of a layer come right after their router.
        layers[-1].steps = steps.cpu()

    was_training = model.training
    model.eval()
    try:
        with RoutingRecorder(model, on_routing, on_steps), torch.no_grad():
            # The body without its head: logits over the vocabulary are large and of no use here.
            input_ids = torch.tensor([token_ids[:limit]], device=model.device)
            model.base_model(input_ids=input_ids, use_cache=False, **recurrences)
    finally:
        model.train(was_training)
    if len({layer.layer for layer in layers}) < len(layers):
        # A model that runs its layers several times: count the passes.
        layers = [replace(layer, layer=number) for number, layer in enumerate(layers)]
    tokens = [tokenizer.decode([token_id]) for token_id in token_ids[:limit]]
    return Routes(model.config.name_or_path or type(model).__name__, tokens, layers, scores, len(token_ids))


def write_routes_csv(routes: Routes, path: str | Path) -> None:
    """Write one row per token, layer and slot: where the token went, with what weight and for how many steps."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["token_index", "token", "layer", "slot", "expert", "weight", "steps"])
        for position, token in enumerate(routes.tokens):
            for layer in routes.layers:
                for slot, (expert, weight, steps) in enumerate(layer.slots(position)):
                    writer.writerow([position, token, layer.layer, slot, expert, f"{weight:.6g}", steps])
