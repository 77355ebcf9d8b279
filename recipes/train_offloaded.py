"""Train a mixture that does not fit in memory further, on text: Mixtral, Qwen3-MoE, OLMoE, or any with fused experts.

accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/train_offloaded.py \
    --model_name_or_path allenai/OLMoE-1B-7B-0924 --nvme_path /nvme/experts --fast_capacity 16 --ram_capacity 16 \
    --dataset_name my_text.txt --sequence_length 512 --max_steps 1000 --learning_rate 1e-5 --output_dir out

On the disk the weights of an expert have its optimizer state beside them: `python recipes/doctor.py` checks the space.
For MoRE there is train_more.py, with the same options.
"""


def main() -> None:
    """Parses the arguments, trains, and says where the results are."""
    from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig
    from mixturekit.trainers.offload_arguments import OffloadArguments
    from mixturekit.trainers.offloaded_language_modeling import CheckpointArguments, train_offloaded
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence

    types = (CheckpointArguments, DataArguments, LanguageModelingConfig, OffloadArguments)
    with errors_in_one_sentence():
        arguments = parse_recipe(types, description=__doc__)
        metrics = train_offloaded(*arguments)
    print(f"Held-out loss {metrics['eval_loss']:.4f} after {metrics['steps']} steps.")
    print(
        f"{100 * metrics['store_hit_rate']:.1f} % of the experts were there when asked for; "
        f"{metrics['store_bytes_read'] / 1e6:.0f} MB were read, {metrics['store_bytes_written'] / 1e6:.0f} MB written."
    )
    print(f"Model, tokenizer, metrics and logs are in {arguments[2].output_dir}")


if __name__ == "__main__":
    main()
