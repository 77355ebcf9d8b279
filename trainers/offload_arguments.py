"""The options of recipes that keep a model's experts on disk."""

from dataclasses import dataclass, field
from pathlib import Path

from ..modeling.expert_files import MANIFEST
from ..modeling.expert_store import ExpertStore, ExpertStoreConfig


@dataclass
class OffloadArguments:
    """Where the experts are, if not in memory; see [`ExpertStoreConfig`]."""

    nvme_path: str | None = field(
        default=None, metadata={"help": "Folder on a fast disk for experts that do not fit in memory; unset, they do."}
    )
    fast_capacity: int = field(
        default=8,
        metadata={"help": "Experts per layer in the fast tier: the accelerator's memory, or RAM without one."},
    )
    ram_capacity: int = field(default=32, metadata={"help": "Experts per layer in RAM, besides those."})
    shared_pool: bool = field(default=False, metadata={"help": "Whether the layers share these, in total."})
    eviction_policy: str = field(default="lru", metadata={"help": "Who leaves a full tier: lru, s3fifo or frequency."})
    nvme_engine: str = field(default="auto", metadata={"help": "What moves the bytes: auto, pread or deepspeed."})
    direct_io: bool = field(default=True, metadata={"help": "Whether to pass the page cache by; few disks cannot."})
    store_trace: str | None = field(
        default=None, metadata={"help": "File for every access to an expert, to be replayed with other policies."}
    )

    def store_config(self, training: bool = True, **options) -> ExpertStoreConfig:
        """The configuration of the store; `options` are further arguments of [`ExpertStoreConfig`]."""
        return ExpertStoreConfig(
            self.nvme_path,
            self.fast_capacity,
            self.ram_capacity,
            self.shared_pool,
            self.eviction_policy,
            training,
            self.nvme_engine,
            self.direct_io,
            record_trace=self.store_trace is not None,
            **options,
        )

    def store_metrics(self, store: ExpertStore) -> dict[str, float]:
        """What the store of a run has done, as metrics; its accesses are written if they were asked for."""
        if self.store_trace:
            store.save_trace(self.store_trace)
        metrics = {f"store_{name}": value for name, value in store.stats.as_dict().items()}
        return metrics | {"store_bytes_read": store.files.bytes_read, "store_bytes_written": store.files.bytes_written}

    def clear_folder(self, overwrite: bool) -> None:
        """
        Makes sure that a new run does not begin with the experts of an earlier one.

        Args:
            overwrite (`bool`): Whether experts that are in the folder may be replaced.

        Raises:
            FileExistsError: If the folder has experts that may not.
        """
        manifest = Path(self.nvme_path, MANIFEST)
        if manifest.exists() and not overwrite:
            raise FileExistsError(
                f"{self.nvme_path} already holds the experts of a run; choose another --nvme_path, continue it with "
                "--resume_from_checkpoint last, or replace them with --overwrite_output_dir."
            )
        manifest.unlink(missing_ok=True)
