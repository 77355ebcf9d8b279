"""How well a causal language model answers."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from .text_data import AnswerDataset, pad_blocks


@torch.no_grad()
def answer_accuracy(
    model: torch.nn.Module,
    dataset: AnswerDataset,
    tasks: Sequence[str],
    pad_token_id: int,
    num_recurrences: int | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Share of the prompts that greedy decoding completes with exactly the answer, by task.

    The model reads prompt and answer at once: greedy decoding gives the answer if and only if each of its tokens, the
    end token included, is the most likely one after those before it.

    Args:
        model (`torch.nn.Module`): A causal language model; put into evaluation mode.
        dataset ([`AnswerDataset`]): Prompts and answers.
        tasks (`Sequence[str]`): Task of each example.
        pad_token_id (`int`): Token that pads a batch.
        num_recurrences (`int`, *optional*): Steps of recurrent experts; for MoRE models only.
        batch_size (`int`, *optional*, defaults to 64): Examples at once.
    """
    model.eval()
    options = {} if num_recurrences is None else {"num_recurrences": num_recurrences}
    correct: list[bool] = []
    for start in tqdm(range(0, len(dataset), batch_size), desc="Answering", leave=False):
        examples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        batch = {name: value.to(model.device) for name, value in pad_blocks(examples, pad_token_id).items()}
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch, **options).logits[:, :-1].argmax(dim=-1)
        correct += ((predicted == labels) | (labels == -100)).all(dim=1).tolist()
    by_task: dict[str, list[bool]] = {}
    for task, right in zip(tasks, correct, strict=True):
        by_task.setdefault(task, []).append(right)
    return {task: sum(rights) / len(rights) for task, rights in by_task.items()}
