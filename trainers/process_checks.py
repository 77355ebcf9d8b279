"""Whether the processes that were started will train together."""

import os

from accelerate import PartialState
from accelerate.utils import DistributedType


def check_processes(use_cpu: bool) -> None:
    """
    Makes sure, before any work, that all processes train together, and in the way that was configured.

    accelerate looks for accelerators. Where there are none it does without what needs them, and says nothing: each of
    several processes may then train alone, and write into the same folder.

    Args:
        use_cpu (`bool`): Whether the run was told to leave accelerators alone.

    Raises:
        ValueError: If accelerate does otherwise than its configuration says.
    """
    state, started = PartialState(cpu=use_cpu), int(os.environ.get("WORLD_SIZE", 1))
    with_deepspeed, with_fsdp = (
        os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("DEEPSPEED", "FSDP")
    )
    if with_deepspeed and use_cpu:
        raise ValueError(
            "use_cpu makes accelerate train by DDP instead of DeepSpeed without saying so: set --use_cpu false, and "
            "use_cpu: false in its configuration, with or without a GPU."
        )
    if with_fsdp and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            "accelerate has FSDP for accelerators only, and found none: on CPUs take ddp.yaml with --use_cpu true, or "
            "zero2.yaml or zero3.yaml with --use_cpu false --ddp_backend gloo."
        )
    if started > 1 and (state.num_processes < started or state.distributed_type == DistributedType.NO):
        raise ValueError(
            f"{started} processes were started, but accelerate found no accelerator and each would train alone: set "
            "--use_cpu true, or for DeepSpeed --use_cpu false --ddp_backend gloo."
        )
