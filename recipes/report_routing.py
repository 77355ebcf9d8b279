"""
Shows which experts the tokens of a text visit, for a checkpoint of any transformers mixture of experts.

    python recipes/report_routing.py --model_name_or_path out --text "The cat sat on the mat."

Writes `routes.html` (opens without a network), `expert_load.png` and `routes.csv` to `--output_dir routing_report`.
Other arguments: `--text_file f` instead of `--text`, `--layers 0 3` (the first and the last layer to show),
`--num_recurrences 8` (recurrent experts), `--max_tokens 64` (tokens to draw one by one), `--overwrite` and
`--trust_remote_code`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from mixturekit.trainers.recipe_process import errors_in_one_sentence

FILES = ("routes.html", "expert_load.png", "routes.csv")


@dataclass
class ReportArguments:
    """The arguments of this recipe."""

    model_name_or_path: str = field(metadata={"help": "A folder with a checkpoint, or a model of the Hub."})
    text: str | None = field(default=None, metadata={"help": "The text to follow."})
    text_file: str | None = field(default=None, metadata={"help": "A UTF-8 file with the text to follow."})
    output_dir: str = field(default="routing_report", metadata={"help": "The folder to write to."})
    layers: list[int] | None = field(default=None, metadata={"help": "The first and the last layer to show."})
    num_recurrences: int | None = field(default=None, metadata={"help": "Steps of the recurrent experts."})
    max_tokens: int = field(default=64, metadata={"help": "How many tokens to draw one by one."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a report that is there."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})

    def __post_init__(self):
        if (self.text is None) == (self.text_file is None):
            raise ValueError("Give either --text or --text_file.")
        if self.text_file is not None:
            if not Path(self.text_file).is_file():
                raise ValueError(f"There is no file {self.text_file}.")
            self.text = Path(self.text_file).read_text(encoding="utf-8")
        if not self.text.strip():
            raise ValueError("The text is empty.")
        if self.layers is not None and (len(self.layers) != 2 or not 0 <= self.layers[0] <= self.layers[1]):
            raise ValueError("--layers takes the first and the last layer to show, such as --layers 0 3.")
        if self.max_tokens < 1:
            raise ValueError("--max_tokens must be at least 1.")
        path = Path(self.model_name_or_path)
        # A model of the Hub is owner/name; anything else can only be a folder.
        if not path.is_dir() and len(path.parts) != 2:
            raise ValueError(f"There is no folder {path}.")
        there = [name for name in FILES if (Path(self.output_dir) / name).exists()]
        if there and not self.overwrite:
            raise ValueError(f"{self.output_dir} has a report ({', '.join(there)}): add --overwrite to replace it.")


def load(arguments: ReportArguments):
    """The model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mixturekit.modeling  # noqa: F401, registers the architectures of mixturekit

    source, trust = arguments.model_name_or_path, arguments.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust, dtype="auto")
    except OSError as error:
        raise ValueError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.to(torch.accelerator.current_accelerator() or "cpu"), tokenizer


def report(arguments: ReportArguments) -> None:
    """Load, run, write."""
    from mixturekit.trainers.routes import record_routes, write_routes_csv
    from mixturekit.trainers.routing_report import write_load_heatmap, write_report

    model, tokenizer = load(arguments)
    routes = record_routes(model, tokenizer, arguments.text, num_recurrences=arguments.num_recurrences)
    layers = range(arguments.layers[0], arguments.layers[1] + 1) if arguments.layers else None
    page, picture, table = (Path(arguments.output_dir) / name for name in FILES)
    selected = routes.select_layers(layers)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_report(selected, page, max_tokens=arguments.max_tokens)
    write_load_heatmap(selected, picture)
    write_routes_csv(selected, table)
    print(f"{len(routes.tokens)} tokens through {len(selected.layers)} layers:")
    print(f"  {page}\n  {picture}\n  {table}")


def main() -> None:
    """Parse the arguments, and say in one sentence what is wrong with them."""
    with errors_in_one_sentence():
        (arguments,) = HfArgumentParser(ReportArguments).parse_args_into_dataclasses()
        report(arguments)


if __name__ == "__main__":
    main()
