"""Demonstrations and completions as data sets of the Hub: Parquet files, and cards with what is in them."""

from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import DatasetCard

from ..hub_cards import render_dataset_card
from ..hub_cards.published_files import shareable
from .gsm8k_completions import COLUMNS, read_completions, read_report
from .gsm8k_evaluation_config import COMPLETIONS, RESULTS
from .ppo_card import record_rows
from .shared_card import OWN_LICENCE, on_hub

_SHARD_BYTES = 400_000_000
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
# Of problems that are known here; solutions have the problems in them, and so their licence.
_LICENCES = {"openai/gsm8k": "mit", "generated": OWN_LICENCE}
_SETTINGS = ("prompt_format", "num_shots", "temperature", "top_p", "max_new_tokens", "seed", "dtype")


def stage_demonstrations(episodes: datasets.Dataset, folder: str | Path) -> None:
    """Writes demonstrations as Parquet files below `folder`."""
    _write_shards(episodes, Path(folder), "train")


def demonstrations_card(
    episodes: datasets.Dataset, repository: str, revision: str | None = None, licence: str | None = None
) -> DatasetCard:
    """
    The card of demonstrations.

    Args:
        episodes (`datasets.Dataset`): By [`generate_demonstrations`] or [`load_demonstrations`].
        repository (`str`): Where they will be loaded from.
        revision (`str`, *optional*): The revision to pin.
        licence (`str`, *optional*): That of this library if unset.
    """
    licence = licence or OWN_LICENCE
    overview = episodes.select_columns(["level", "actions", "episode_return", "bot_failures"])
    names = np.array(overview["level"])
    lengths = np.array([len(actions) for actions in overview["actions"]])
    returns = np.array(overview["episode_return"], dtype=float)
    levels = [
        {
            "level": level,
            "episodes": f"{(names == level).sum():,}",
            "frames": f"{lengths[names == level].sum():,}",
            "length": f"{lengths[names == level].mean():.1f}",
            "episode_return": f"{returns[names == level].mean():.3f}",
        }
        for level in dict.fromkeys(names.tolist())
    ]
    name = f"BabyAI demonstrations: {', '.join(row['level'].removeprefix('BabyAI-') for row in levels[:3])}"
    return render_dataset_card(
        "demonstrations",
        {
            "license": licence,
            "pretty_name": name if len(levels) <= 3 else f"{name} and others",
            "task_categories": ["reinforcement-learning"],
            "size_categories": [_size(len(episodes))],
            "tags": ["mixturekit", "babyai", "minigrid", "imitation-learning", "demonstrations"],
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
        },
        pretty_name=name if len(levels) <= 3 else f"{name} and others",
        repository=repository,
        revision=revision,
        episodes=f"{len(episodes):,}",
        frames=f"{lengths.sum():,}",
        levels=levels,
        failures=f"{sum(overview['bot_failures']):,}",
        licence=licence,
    )


def load_completions(folder: str | Path) -> tuple[datasets.Dataset, dict]:
    """
    What an evaluation on GSM8K has left.

    Args:
        folder (`str` or `Path`): With `completions.jsonl` and `eval_results.json`.

    Returns:
        The solutions, sorted, and the report.
    """
    for name in (COMPLETIONS, RESULTS):
        if not Path(folder, name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: evaluate_gsm8k.py writes it.")
    rows = list(read_completions(Path(folder, COMPLETIONS)))
    rows.sort(key=lambda row: (row["decoding"], row["problem"], row["sample"]))
    features = datasets.Features({name: datasets.Value(kind) for name, (kind, _) in COLUMNS.items()})
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    report = read_report(Path(folder, RESULTS))
    return datasets.Dataset.from_dict(columns, features), shareable(report)


def stage_completions(solutions: datasets.Dataset, folder: str | Path) -> None:
    """Writes solutions as Parquet files below `folder`."""
    _write_shards(solutions, Path(folder), "test")


def completions_card(
    solutions: datasets.Dataset,
    report: Mapping,
    repository: str,
    revision: str | None = None,
    licence: str | None = None,
) -> DatasetCard:
    """
    The card of solutions to word problems.

    Args:
        solutions (`datasets.Dataset`): By [`load_completions`].
        report (`Mapping`): What `eval_results.json` has.
        repository (`str`): Where they will be loaded from.
        revision (`str`, *optional*): The revision to pin.
        licence (`str`, *optional*): That of the problems if unset.

    Raises:
        ValueError: If there is no licence and the problems are not known here.
    """
    settings, model = report["settings"], Path(report["model"]).name
    source = settings["dataset_name"]
    from_hub = on_hub(source)
    licence = licence or _LICENCES.get(source)
    if licence is None:
        raise ValueError(f"The solutions have the problems of {source} in them: name their licence with --license.")
    shown = {"model": report["model"] if on_hub(report["model"]) else model, "hardware": report["hardware"]}
    shown |= {name.replace("_", " "): settings[name] for name in _SETTINGS if settings.get(name) is not None}
    metadata = {
        "license": licence,
        "pretty_name": f"Solutions of {model}",
        "language": ["en"],
        "task_categories": ["text-generation"],
        "size_categories": [_size(len(solutions))],
        "tags": ["mixturekit", "gsm8k", "completions", "evaluation"],
        "configs": [{"config_name": "default", "data_files": [{"split": "test", "path": "data/test-*"}]}],
    }
    metadata |= {"source_datasets": [source]} if from_hub else {}
    return render_dataset_card(
        "completions",
        metadata,
        pretty_name=metadata["pretty_name"],
        repository=repository,
        revision=revision,
        rows=f"{len(solutions):,}",
        problems=f"{report['problems']:,}",
        model=shown["model"],
        source=source if from_hub else "generated word problems" if source == "generated" else Path(source).name,
        results=record_rows(report),
        columns=[{"name": name, "type": kind, "meaning": what} for name, (kind, what) in COLUMNS.items()],
        settings=shown,
        licence=licence,
    )


def _size(rows: int) -> str:
    return next((name for limit, name in _SIZES if rows < limit), "1M<n<10M")


def _write_shards(rows: datasets.Dataset, folder: Path, split: str) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    count = max(1, -(-rows.data.nbytes // _SHARD_BYTES))
    for index in range(count):
        name = f"{split}-{index:05d}-of-{count:05d}.parquet"
        rows.shard(count, index, contiguous=True).to_parquet(str(folder / "data" / name))
