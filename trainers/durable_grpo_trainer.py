"""TRL's `GRPOTrainer` that is saved in the middle of what it learns from, which is where most checkpoints are made."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn
from trl import GRPOTrainer

from .durable_training import DurableTraining


class DurableGRPOTrainer(DurableTraining, GRPOTrainer):
    """TRL's own trainer, without a critic, that saves, stops and resumes as the others here do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self._unwrapped(self.model).config.get_text_config()
        if config.model_type == "phimoe":
            # Its balancing loss asks for the name that all other mixtures have.
            config.num_experts = config.num_local_experts

    def _unwrapped(self, model: nn.Module):
        """The transformers model inside of distributed wrappers and PEFT."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def _save_rng_state(self, output_dir: str) -> None:
        """With each process's random state goes the rollout that it is learning from."""
        super()._save_rng_state(output_dir)
        state, tensors = _rollout_files(output_dir, self.args.process_index)
        cycle = self.args.steps_per_generation * self.num_iterations
        batches = self._buffered_inputs if self._step % cycle else []
        named = {f"{i} {key}": value for i, batch in enumerate(batches or []) for key, value in batch.items()}
        save_file({name: value.cpu().clone() for name, value in named.items() if value is not None}, tensors)
        state.write_text(json.dumps({"step": self._step, "batches": len(batches or []), "beta": self.beta}))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        state, tensors = _rollout_files(checkpoint, self.args.process_index)
        if not state.is_file() or not tensors.is_file():
            raise FileNotFoundError(
                f"{checkpoint} has no rollout of process {self.args.process_index}: resume with as many processes as "
                "before."
            )
        saved = json.loads(state.read_text())
        self._step, self.beta = saved["step"], saved["beta"]
        batches = [{} for _ in range(saved["batches"])]
        for name, value in load_file(tensors, device=str(self.accelerator.device)).items():
            index, key = name.split(" ")
            batches[int(index)][key] = value
        self._buffered_inputs = batches or None


def _rollout_files(folder: str | Path, process_index: int) -> tuple[Path, Path]:
    name = f"rollout_{process_index}"
    return Path(folder, f"{name}.json"), Path(folder, f"{name}.safetensors")
