"""Train a MoRE language model, on text or on the built-in stories and sums.

accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/train_more.py \
    --config recipes/more/quickstart.yaml --expert_type more_c --output_dir out

Experts that do not fit in memory are kept on a disk with --nvme_path; --fast_capacity and --ram_capacity say how many
of a layer are not. Under recipes/accelerate_configs/zero3_nvme.yaml the same folder is DeepSpeed's.
"""


def main() -> None:
    """Parses the arguments, trains, and says where the results are."""
    from mixturekit.trainers.language_modeling_config import DataArguments, LanguageModelingConfig, ModelArguments
    from mixturekit.trainers.offload_arguments import OffloadArguments
    from mixturekit.trainers.recipe_parser import parse_recipe
    from mixturekit.trainers.recipe_process import errors_in_one_sentence, leave_process_group_at_exit

    types = (ModelArguments, DataArguments, LanguageModelingConfig, OffloadArguments)
    with errors_in_one_sentence():
        arguments = parse_recipe(types, description=__doc__)
        from mixturekit.trainers.language_modeling import train_language_model

        leave_process_group_at_exit()
        metrics = train_language_model(*arguments)
    config, offload = arguments[2:]
    if config.process_index == 0:
        print(f"Held-out perplexity {metrics['eval_perplexity']:.2f} after {metrics['steps']} steps.")
        print(f"Model, tokenizer, metrics and logs are in {config.output_dir}")
        if "store_bytes_read" in metrics:
            read, written = metrics["store_bytes_read"] / 1e6, metrics["store_bytes_written"] / 1e6
            hits = f"{100 * metrics['store_hit_rate']:.1f} % of the experts were there when asked for"
            print(f"The store in {offload.nvme_path}: {hits}, {read:.0f} MB read, {written:.0f} MB written.")
        print(f"Curves: tensorboard --logdir {config.output_dir}")


if __name__ == "__main__":
    main()
