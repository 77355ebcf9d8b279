"""The log of a run over several games: TensorBoard, and a line of JSON for each update."""

import json
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from .continual_ppo_config import ContinualPpoConfig
from .whole_files import write_whole_text

METRICS = "metrics.jsonl"


class ContinualLog:
    """
    Writes in the first process only.

    Args:
        config ([`ContinualPpoConfig`]): Of the run.
    """

    def __init__(self, config: ContinualPpoConfig):
        self.path = Path(config.output_dir, METRICS)
        self.active = config.process_index == 0
        self._folder = config.output_dir
        self._writer: SummaryWriter | None = None

    def write(self, figures: dict[str, float | str]) -> None:
        """Writes figures, of which `step` and `update` say when they were."""
        if not self.active:
            return
        self._show({name: value for name, value in figures.items() if name not in ("step", "update")}, figures["step"])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def write_retention(self, results: dict) -> None:
        """Writes to TensorBoard what the `results` of the run say of all games together."""
        names = ("final_score", "average_forgetting", "backward_transfer")
        self._show({f"retention/{name}": results.get("metrics", {}).get(name) for name in names}, results["steps"])
        self.close()

    def _show(self, figures: dict[str, float | str | None], step: int) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(self._folder)
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def resume(self, updates: int, evaluates: bool) -> None:
        """
        Drops what is about to be written again.

        Args:
            updates (`int`): Number of the last update that is not made again.
            evaluates (`bool`): Whether the evaluation that followed it is.
        """
        if self.active and self.path.is_file():
            kept = [
                line
                for line in read_lines(self.path)
                if line["update"] < updates or (line["update"] == updates and not (evaluates and _evaluated(line)))
            ]
            write_whole_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def close(self) -> None:
        """Ends TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _evaluated(line: dict) -> bool:
    return any(name.startswith("eval/") for name in line)


def read_lines(path: str | os.PathLike) -> list[dict]:
    """The lines of a log; one that is cut off, because the process was killed, is left out."""
    lines = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
