"""What turns minigrid's observations into features: the image, the direction, the hands and the mission.

Shapes: batch, time, side (cells along one side of an image), missions (distinct ones), words, vision, mission.
"""

import re

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from .configuration_mop import MopConfig

PADDING, UNKNOWN, FIRST_WORD = range(3)
NUM_DIRECTIONS = 4


class MissionEncoder(nn.Module):
    """Word embeddings and a GRU, which learn with the policy."""

    def __init__(self, config: MopConfig):
        super().__init__()
        words = dict.fromkeys(config.mission_vocabulary)
        self.word_ids = {word: FIRST_WORD + index for index, word in enumerate(words)}
        self.embedding = nn.Embedding(FIRST_WORD + len(self.word_ids), config.word_dim, padding_idx=PADDING)
        self.gru = nn.GRU(config.word_dim, config.mission_dim, batch_first=True)

    def prepare(self, missions: list[str]) -> dict[str, torch.Tensor]:
        """Word ids of missions, `(missions, words)`, padded on the right."""
        rows = [re.findall(r"[a-z0-9]+", mission.lower()) or [""] for mission in missions]
        ids = torch.full((len(rows), max(map(len, rows))), PADDING)
        for row, words in zip(ids, rows, strict=True):
            row[: len(words)] = torch.tensor([self.word_ids.get(word, UNKNOWN) for word in words])
        return {"mission_input_ids": ids.to(self.embedding.weight.device)}

    def forward(self, mission_input_ids: torch.Tensor) -> torch.Tensor:
        """Encodes `mission_input_ids` of shape `(missions, words)` as `(missions, mission)`."""
        states, _ = self.gru(self.embedding(mission_input_ids))
        last = (mission_input_ids != PADDING).sum(dim=1) - 1
        return states[torch.arange(len(last), device=last.device), last]


class PretrainedMissionEncoder(nn.Module):
    """
    A frozen text model of transformers, whose mean state over a mission's tokens a learned layer projects.

    Each mission is encoded once. The text model is no part of the policy's checkpoint: it is loaded by its name when
    the first mission comes.
    """

    def __init__(self, config: MopConfig):
        super().__init__()
        self.name = config.mission_model_name_or_path
        self.projection = nn.Linear(config.mission_feature_dim, config.mission_dim)
        self._features: dict[str, torch.Tensor] = {}
        # In a tuple, so that it is neither saved nor trained.
        self._text_model: tuple = ()

    def prepare(self, missions: list[str]) -> dict[str, torch.Tensor]:
        """Features of missions, `(missions, text)`."""
        missing = [mission for mission in dict.fromkeys(missions) if mission not in self._features]
        if missing:
            self._features.update(zip(missing, self._encode(missing), strict=True))
        weight = self.projection.weight
        features = torch.stack([self._features[mission] for mission in missions])
        return {"mission_features": features.to(weight.device, weight.dtype)}

    @torch.no_grad()
    def _encode(self, missions: list[str]) -> torch.Tensor:
        if not self._text_model:
            tokenizer = AutoTokenizer.from_pretrained(self.name)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            self._text_model = (tokenizer, AutoModel.from_pretrained(self.name).eval())
        tokenizer, model = self._text_model
        tokens = tokenizer(missions, return_tensors="pt", padding=True)
        mask = tokens["attention_mask"].unsqueeze(-1)
        states = model(**tokens).last_hidden_state
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    def forward(self, mission_features: torch.Tensor) -> torch.Tensor:
        """Projects `mission_features` of shape `(missions, text)` to `(missions, mission)`."""
        return self.projection(mission_features)


def _starts(counts: list[int]) -> list[int]:
    return [sum(counts[:index]) for index in range(len(counts))]


class FlatVision(nn.Module):
    """The codes of all cells, one-hot and side by side."""

    def __init__(self, config: MopConfig):
        super().__init__()
        self.width = config.view_size**2 * sum(config.cell_values)
        self.cell_values = config.cell_values
        self.register_buffer("offsets", torch.tensor(self.constants()["offsets"]), persistent=False)

    def constants(self) -> dict[str, list[int]]:
        """Values of the buffer that is not saved: the first feature of each code of each cell."""
        starts = _starts(self.cell_values)
        return {
            "offsets": [start + first for start in range(0, self.width, sum(self.cell_values)) for first in starts]
        }

    def forward(self, images: torch.Tensor, mission: torch.Tensor) -> torch.Tensor:
        """Encodes `images` of shape `(frames, side, side, 3)` as `(frames, vision)`."""
        codes = images.flatten(1).long() + self.offsets
        return mission.new_zeros(len(images), self.width).scatter_(1, codes, 1.0)


class BowConvFilmVision(nn.Module):
    """
    Bags of embedded codes per cell, convolutions that the mission modulates, and a maximum over the cells.

    In the manner of BabyAI 1.1 (Hui et al. 2020, arXiv 2007.12770) with FiLM (Perez et al. 2018, arXiv 1709.07871).
    It has no batch norm, which would make what one environment does depend on the others; instead cells have a learned
    position, which the maximum would otherwise lose.
    """

    def __init__(self, config: MopConfig):
        super().__init__()
        width = config.vision_dim
        self.embedding = nn.Embedding(sum(config.cell_values), width)
        self.position = nn.Parameter(torch.empty(width, config.view_size, config.view_size))
        self.stem = nn.Conv2d(width, width, 3, padding=1)
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])
        self.modulations = nn.ModuleList([nn.Linear(config.mission_dim, 2 * width) for _ in range(2)])
        self.cell_values = config.cell_values
        self.register_buffer("offsets", torch.tensor(self.constants()["offsets"]), persistent=False)

    def constants(self) -> dict[str, list[int]]:
        """Values of the buffer that is not saved: the first row of the embeddings of objects, colours and states."""
        return {"offsets": _starts(self.cell_values)}

    def forward(self, images: torch.Tensor, mission: torch.Tensor) -> torch.Tensor:
        """Encodes `images` `(frames, side, side, 3)` under missions `(frames, mission)` as `(frames, vision)`."""
        bags = self.embedding(images.long() + self.offsets).sum(dim=3)
        cells = torch.relu(self.stem(bags.permute(0, 3, 1, 2) + self.position))
        for convolution, modulation in zip(self.convolutions, self.modulations, strict=True):
            scale, shift = modulation(mission)[:, :, None, None].chunk(2, dim=1)
            cells = cells + torch.relu(convolution(cells) * (1 + scale) + shift)
        return cells.amax(dim=(2, 3))


class ObservationEncoder(nn.Module):
    """Features of minigrid's observations: image, direction, whether the hands are full, and mission."""

    def __init__(self, config: MopConfig):
        super().__init__()
        self.view_size = config.view_size
        self.cell_values = config.cell_values
        self.empty_object = config.empty_object
        self.vision = FlatVision(config) if config.encoder == "flat" else BowConvFilmVision(config)
        mission_encoders = {"gru": MissionEncoder, "pretrained": PretrainedMissionEncoder}
        self.mission = mission_encoders[config.mission_encoder](config)

    def check_images(self, images: torch.Tensor):
        """Raises `ValueError` unless `images` has the shape `(batch, time, side, side, 3)`."""
        expected = (self.view_size, self.view_size, len(self.cell_values))
        if images.dim() != 5 or images.shape[2:] != expected:
            raise ValueError(
                f"`images` has the shape {tuple(images.shape)}; this policy reads (batch, time, "
                f"{', '.join(map(str, expected))})."
            )

    def forward(
        self,
        images: torch.Tensor,
        directions: torch.Tensor,
        mission_index: torch.Tensor,
        mission_embeddings: torch.Tensor,
    ) -> torch.Tensor:
        """Encodes steps as features `(batch, time, input)`.

        Args:
            images (`torch.Tensor` of shape `(batch, time, side, side, 3)`): Codes of the cells that the agent sees.
            directions (`torch.Tensor` of shape `(batch, time)`): Where it faces, 0 to 3.
            mission_index (`torch.Tensor` of shape `(batch, time)`): The row of its mission.
            mission_embeddings (`torch.Tensor` of shape `(missions, mission)`): Encoded missions.
        """
        self.check_images(images)
        mission = mission_embeddings[mission_index.flatten()]
        frames = images.flatten(0, 1)
        direction = nn.functional.one_hot(directions.flatten(), NUM_DIRECTIONS)
        # The agent's own cell, in the middle of the last row of its view, shows what it carries.
        carrying = frames[:, self.view_size // 2, self.view_size - 1, :1] != self.empty_object
        parts = [self.vision(frames, mission), direction.to(mission), carrying.to(mission), mission]
        return torch.cat(parts, dim=1).unflatten(0, images.shape[:2])


__all__ = ["BowConvFilmVision", "FlatVision", "MissionEncoder", "ObservationEncoder", "PretrainedMissionEncoder"]
