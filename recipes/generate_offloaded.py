"""Generate with a mixture of experts that does not fit in memory: any checkpoint with fused experts, or MoRE.

python recipes/generate_offloaded.py --model_name_or_path out --nvme_path /nvme/experts --fast_capacity 16 \
    --prompt "Mary went to the kitchen." --max_new_tokens 32

The first start copies the experts to the folder, one layer at a time; later ones find them there.
"""

import time
from dataclasses import dataclass, field

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass
class GenerationArguments:
    """The model, and what it is to continue."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a checkpoint."})
    prompt: list[str] = field(metadata={"help": "Texts to continue; several are one batch."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens to generate at most."})
    temperature: float = field(default=0.0, metadata={"help": "Of sampling; 0 takes the likeliest token."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    device: str = field(default="cpu", metadata={"help": "Of the rest of the model, and of the fast tier."})
    dtype: str = field(default="auto", metadata={"help": f"Precision: {', '.join(PRECISIONS)}."})
    prefetch_next_layer: bool = field(
        default=False, metadata={"help": "Whether each layer asks the next one's router which experts to bring."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code of the checkpoint may run."})


def main() -> None:
    """Parses the arguments, generates, and prints the texts and what the store did."""
    from mixturekit.trainers.offload_arguments import OffloadArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence

    with errors_in_one_sentence():
        arguments, offload = parse_recipe((GenerationArguments, OffloadArguments), description=__doc__)
        if offload.nvme_path is None:
            raise ValueError("--nvme_path names the folder for the experts; without one, use transformers alone.")
        if arguments.dtype not in PRECISIONS:
            raise ValueError(f"--dtype is one of {', '.join(PRECISIONS)}, not {arguments.dtype!r}.")
        generate(arguments, offload)


def generate(arguments: GenerationArguments, offload) -> None:
    """Loads the model with its experts in a store, continues the prompts, and prints."""
    import torch
    from transformers import AutoTokenizer

    from mixturekit.modeling import load_offloaded

    config = offload.store_config(training=False, prefetch_next_layer=arguments.prefetch_next_layer)
    source, trust = arguments.model_name_or_path, arguments.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust, padding_side="left")
    model, store = load_offloaded(
        source, config, device=arguments.device, dtype=arguments.dtype, trust_remote_code=trust
    )
    with store:
        if store.metadata:
            raise ValueError(f"{offload.nvme_path} holds the experts of a training run: choose another folder.")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        prompts = tokenizer(arguments.prompt, return_tensors="pt", padding=True).to(arguments.device)
        sampling = {"do_sample": False}
        if arguments.temperature > 0:
            sampling = {"do_sample": True, "temperature": arguments.temperature}
        torch.manual_seed(arguments.seed)
        store.stats.reset()
        read, started = store.files.bytes_read, time.perf_counter()
        tokens = model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
        seconds = time.perf_counter() - started
        for row, mask in zip(tokens, prompts.attention_mask, strict=True):
            print(tokenizer.decode(row[len(mask) - mask.sum() :]))
        new = tokens[:, prompts.input_ids.shape[1] :].numel()
        stats = store.stats
        print(
            f"{new / seconds:.1f} tokens/s; {100 * stats.hit_rate:.1f} % of the experts were in the fast tier, "
            f"{stats.ram_hits} came from RAM and {stats.disk_misses} from disk, {stats.stall_seconds:.2f} of "
            f"{seconds:.2f} s were spent waiting, {(store.files.bytes_read - read) / 1e6:.0f} MB were read."
        )
        if offload.store_trace:
            store.save_trace(offload.store_trace)


if __name__ == "__main__":
    main()
