"""What a push to the Hub is configured by."""

from dataclasses import dataclass, field

from .recipe_parser import RepeatableOption

GENERATED = "generated"


@dataclass
class PushArguments:
    """What goes to the Hub, under which name, and how."""

    repo_id: str = field(metadata={"help": "Name on the Hub: user/name."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder of a run: its model goes there."})
    demonstrations: str | None = field(
        default=None,
        metadata={"help": "Demonstrations of BabyAI's bot, a folder or Parquet file, or 'generated': a data set."},
    )
    completions: str | None = field(
        default=None, metadata={"help": "Folder of evaluate_gsm8k.py: its solutions go there as a data set."}
    )
    evaluation: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders of evaluate_*.py whose results and pictures go onto the model's card. May be repeated.",
            "action": RepeatableOption,
        },
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "What an adapter belongs to: its name on the Hub, or a folder with --merge_adapter."},
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence; to be named where a base model decides it, or problems that are not known here."},
    )
    merge_adapter: bool = field(default=False, metadata={"help": "Whether adapters go there as part of their base."})
    env_id: list[str] = field(
        default_factory=lambda: ["BabyAI-GoToRedBall-v0"],
        metadata={"help": "Of generated demonstrations: the levels. May be repeated.", "action": RepeatableOption},
    )
    num_demonstrations: int = field(default=20_000, metadata={"help": "Of generated demonstrations: the episodes."})
    private: bool = field(default=False, metadata={"help": "Whether a new repository is private."})
    update: bool = field(default=False, metadata={"help": "Whether a repository that exists gets a new revision."})
    collection: str | None = field(default=None, metadata={"help": "Collection of the Hub to add the repository to."})
    commit_message: str | None = field(default=None, metadata={"help": "What the revision is called."})
    token: str | None = field(default=None, metadata={"help": "Token of the Hub; that of `hf auth login` if unset."})
    dry_run: bool = field(
        default=False, metadata={"help": "Shows files, card and what is wrong with them, and sends nothing."}
    )

    def __post_init__(self):
        given = [
            name for name in ("model_name_or_path", "demonstrations", "completions") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError("Give one of --model_name_or_path, --demonstrations and --completions.")
        if self.repo_id.count("/") != 1 or not all(self.repo_id.split("/")):
            raise ValueError(f"repo_id is {self.repo_id!r}: a name on the Hub is user/name.")
        if self.model_name_or_path is None and (self.evaluation or self.merge_adapter or self.base_model):
            raise ValueError("--evaluation, --base_model and --merge_adapter are for models, not for data sets.")

    @property
    def kind(self) -> str:
        """`model` or `dataset`."""
        return "dataset" if self.model_name_or_path is None else "model"
