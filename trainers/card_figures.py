"""The pictures of a model card, drawn from what a run has logged."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402, the backend that needs no screen comes first

FOLDER = "figures"


def draw_expert_loads(loads: dict[str, list[float]], path: str | Path) -> None:
    """Draws the share of the tokens that each expert of each layer received, as a PNG file."""
    layers = sorted(loads, key=int)
    widest = max(len(loads[layer]) for layer in layers)
    cells = [loads[layer] + [float("nan")] * (widest - len(loads[layer])) for layer in layers]
    figure, axis = pyplot.subplots(figsize=(1.6 + 0.75 * widest, 1.1 + 0.55 * len(layers)))
    image = axis.imshow(cells, cmap="viridis", vmin=0, aspect="auto")
    bright = max(max(loads[layer]) for layer in layers) / 2
    for row, layer in enumerate(layers):
        for column, share in enumerate(loads[layer]):
            colour = "black" if share > bright else "white"
            axis.text(column, row, f"{100 * share:.0f} %", ha="center", va="center", color=colour, fontsize=9)
    axis.set_xticks(range(widest))
    axis.set_yticks(range(len(layers)), layers)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    figure.colorbar(image, ax=axis, label="share")
    _save(figure, path)


def draw_curve(log_history: list[dict], names: dict[str, str], path: str | Path) -> bool:
    """
    Draws figures of the log against the step, as a PNG file.

    Args:
        log_history (`list[dict]`): Of a `TrainerState`.
        names (`dict[str, str]`): What the axes are called, by the figures' names.
        path (`str` or `Path`): The file.

    Returns:
        `bool`: Whether there was a curve to draw: two points at least.
    """
    curves: dict[str, dict[int, float]] = {name: {} for name in names}
    for entry in log_history:
        for name in names:
            if entry.get(name) is not None:
                # A second evaluation of a step is that of the best checkpoint, which came before.
                curves[name].setdefault(entry["step"], entry[name])
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return False
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.6 * len(curves), 2.9), squeeze=False)
    for axis, (name, points) in zip(axes[0], curves.items(), strict=True):
        axis.plot(list(points), list(points.values()), linewidth=1.4)
        axis.set_title(names[name], fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    _save(figure, path)
    return True


def _save(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    # Without the name and version of what drew it, the same figures are the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
