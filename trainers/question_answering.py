"""Questions put to a causal language model: what it says, and which of several answers it finds most likely."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.routing_statistics import Routing, RoutingRecorder, find_recorded
from .arithmetic import SYMBOLS, parse_answer
from .metrics.answer_accuracy import first_word
from .perplexity import IGNORED, token_nats
from .task_data import TaskExample
from .tokenization import encode_answers, encode_prompts


@dataclass(frozen=True)
class AnsweredQuestion:
    """
    What a model made of a question.

    Args:
        example ([`TaskExample`]): The question.
        predicted (`str`): Its answer: a word, or a number with the most significant digit first; empty if the text
            that it wrote does not begin with one.
        true_answer (`str`): The right answer in the same form.
        is_correct (`bool`): Whether they are the same.
        log_likelihood (`float`): Of the right answer, in nats, given the prompt.
        ranked (`str`, *optional*): The most likely of the candidates, where there are some.
        routes (`str`): Layer, expert and weight of each choice of the routers at the token that predicts the answer,
            such as `0:3@0.71 1:0@0.55`; empty if they were not asked for.
        recurrence_steps (`float`, *optional*): Mean steps of the recurrent experts at that token.
    """

    example: TaskExample
    predicted: str
    true_answer: str
    is_correct: bool
    log_likelihood: float
    ranked: str | None = None
    routes: str = ""
    recurrence_steps: float | None = None

    @property
    def is_ranked_first(self) -> bool:
        """Whether the right answer is the most likely candidate."""
        return self.ranked == first_word(self.example.answer)


class QuestionAnswerer:
    """
    Puts questions to a model, by two protocols: generation, greedily and to the first word or number; and ranking, by
    the total log-likelihood of each candidate.

    Args:
        model (`PreTrainedModel`): A causal language model, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        num_recurrences (`int`, *optional*): Steps of recurrent experts; for MoRE models only.
        shots (`str`, *optional*): Solved examples before each prompt, from [`few_shot_prefix`].
        candidates (`Sequence[str]`, *optional*): Answers to rank, each with the space before it; none for sums.
        reverse_answer (`bool`, *optional*, defaults to `True`): Whether sums have the least significant digit first.
        with_routes (`bool`, *optional*, defaults to `False`): Whether to record routes and recurrence steps.
        max_new_tokens (`int`, *optional*, defaults to 8): The longest answer in tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_recurrences: int | None = None,
        shots: str = "",
        candidates: Sequence[str] = (),
        reverse_answer: bool = True,
        with_routes: bool = False,
        max_new_tokens: int = 8,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.num_recurrences = num_recurrences
        self.shots, self.candidates = shots, list(candidates)
        self.reverse_answer = reverse_answer
        self.with_routes = with_routes and bool(find_recorded(model, "router_logits"))
        self.max_new_tokens = max_new_tokens
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_prompt = None if limit is None else limit - max_new_tokens
        if self.max_prompt is not None and self.max_prompt < 1:
            raise ValueError(
                f"Answers of {max_new_tokens} tokens leave none of the {limit} that the model takes to the question."
            )

    def __call__(self, examples: Sequence[TaskExample]) -> list[AnsweredQuestion]:
        """Answers a batch of questions."""
        if not examples:
            # Of the last batch, the last of several processes may get nothing.
            return []
        prompts = encode_prompts(self.tokenizer, [self.shots + example.prompt for example in examples])
        if self.max_prompt is not None:
            prompts = [prompt[-self.max_prompt :] for prompt in prompts]
        said = self._generate(prompts)
        answers = encode_answers(self.tokenizer, [example.answer for example in examples])
        pairs = list(zip(prompts, answers, strict=True))
        ranked: list[str | None] = [None] * len(examples)
        if self.candidates:
            options = encode_answers(self.tokenizer, self.candidates)
            scores = self._log_likelihoods([(prompt, option) for prompt in prompts for option in options])
            best = torch.tensor(scores).view(len(prompts), len(options)).argmax(dim=1).tolist()
            ranked = [first_word(self.candidates[index]) for index in best]
        likelihoods, routes = self._likelihoods_and_routes(pairs)
        return [
            self._judge(example, text, likelihood, choice, *route)
            for example, text, likelihood, choice, route in zip(
                examples, said, likelihoods, ranked, routes, strict=True
            )
        ]

    def _judge(self, example, text, likelihood, ranked, routes, steps) -> AnsweredQuestion:
        if example.task in SYMBOLS:
            number = parse_answer(text, self.reverse_answer)
            predicted = "" if number is None else str(number)
            true_answer = str(parse_answer(example.answer, self.reverse_answer))
        else:
            predicted, true_answer = first_word(text), first_word(example.answer)
        correct = predicted == true_answer
        return AnsweredQuestion(example, predicted, true_answer, correct, likelihood, ranked, routes, steps)

    def _generate(self, prompts: list[list[int]]) -> list[str]:
        ids = [torch.tensor(prompt) for prompt in prompts]
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        inputs = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
        output = self.model.generate(
            input_ids=inputs.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=self.tokenizer.eos_token_id,
            **self._options(),
        )
        return self.tokenizer.batch_decode(output[:, inputs.shape[1] :], skip_special_tokens=True)

    def _options(self) -> dict[str, int]:
        return {} if self.num_recurrences is None else {"num_recurrences": self.num_recurrences}

    def _log_likelihoods(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        """
        The log-likelihood of each answer after its prompt. Pairs that differ in the last token only, as answers of one
        token do, share a row of the batch.
        """
        wanted: dict[tuple[int, ...], list[tuple[int, int, list[int]]]] = {}
        for number, (prompt, answer) in enumerate(pairs):
            wanted.setdefault((*prompt, *answer[:-1]), []).append((number, len(prompt) - 1, answer))
        scores = [0.0] * len(pairs)
        rows = list(wanted)
        # As many rows at once as there are questions: logits over a large vocabulary are larger than the model.
        size = len({tuple(prompt) for prompt, _ in pairs})
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            first = min(position for row in chunk for _, position, _ in wanted[row])
            logits = self._logits([torch.tensor(row) for row in chunk], first)
            for index, row in enumerate(chunk):
                for number, position, answer in wanted[row]:
                    at = logits[index, position - first :][: len(answer)].float().log_softmax(dim=-1)
                    scores[number] = at[range(len(answer)), answer].sum().item()
        return scores

    @torch.no_grad()
    def _logits(self, rows: list[torch.Tensor], first: int) -> torch.Tensor:
        """Logits of shape `(batch, seq - first, vocabulary)`, from position `first` on."""
        ids = pad_sequence(rows, batch_first=True).to(self.model.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.model.device)
        kept = ids.shape[1] - first
        return self.model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept, **self._options()
        ).logits

    def _likelihoods_and_routes(self, pairs) -> tuple[list[float], list[tuple[str, float | None]]]:
        inputs = [torch.tensor(prompt + answer[:-1]) for prompt, answer in pairs]
        targets = [torch.tensor([IGNORED] * (len(prompt) - 1) + answer) for prompt, answer in pairs]
        choices: dict[int, Routing] = {}
        steps: list[torch.Tensor] = []
        if not self.with_routes:
            nats = token_nats(self.model, inputs, targets, self.num_recurrences)
            return (-nats.sum(dim=1)).tolist(), [("", None)] * len(pairs)
        with RoutingRecorder(self.model, choices.__setitem__, lambda layer, taken, mask: steps.append(taken)):
            nats = token_nats(self.model, inputs, targets, self.num_recurrences)
        width = max(map(len, inputs))
        routes = []
        for row, (prompt, _) in enumerate(pairs):
            place = row * width + len(prompt) - 1
            text = " ".join(
                f"{layer}:{expert}@{weight:.3g}"
                for layer, routing in sorted(choices.items())
                for expert, weight in zip(
                    routing.indices[place].tolist(), routing.weights[place].tolist(), strict=True
                )
            )
            mean = torch.stack([taken[place].float().mean() for taken in steps]).mean().item() if steps else None
            routes.append((text, mean))
        return (-nats.sum(dim=1)).tolist(), routes


def few_shot_prefix(examples: Sequence[TaskExample]) -> str:
    """Solved examples as text before a prompt, an empty line after each."""
    return "".join(f"{example.prompt}{example.answer}\n\n" for example in examples)
