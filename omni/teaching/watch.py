"""Reports the progress of a run once a minute: speed, time left, and the held-out score beside its baselines."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from omni.data.collate import ConversationCollator
from omni.data.conversations import Example
from omni.evaluation.asking import Example as Asking
from omni.evaluation.asking import Questionnaire
from omni.evaluation.scores import Asked, Evaluation, Score
from omni.registry import get_modality
from omni.training.answers import before_labels, predicted, right_answers

EVERY, SHARE = 60.0, 0.1
"""Seconds between two reports, and the largest share of the time that they may take. Slow models report less often."""
EXAMPLES, ROWS = 32, 4
"""Examples whose questions are asked, and examples in a batch."""


class Watch(TrainerCallback):
    """Reports a line about every minute.

    The score is the share of questions that greedy decoding would answer right. One forward pass is enough to know it: each
    token of the expected answer must be the most likely one after those before it.

    Args:
        questions: the held-out questions.
        processor: the model's processor.
        say: called with each line.
        steps: the steps of each stage.
        stage: the number of this stage, from 0 on.
    """

    def __init__(
        self,
        questions: Questionnaire,
        processor: Any,
        say: Callable[[str], None],
        steps: Sequence[int],
        stage: int = 0,
    ) -> None:
        self.say, self.before, self.all_steps = say, sum(steps[:stage]), sum(steps)
        self._collate = ConversationCollator(processor)
        self._examples = [questions[index] for index in range(min(EXAMPLES, len(questions)))]
        self._swapped = [_swapped(questions, index, example) for index, example in enumerate(self._examples)]
        nouns = dict.fromkeys(get_modality(name).noun for name in questions.modalities)
        self.another = f"with another {' and '.join(nouns) or 'item'}"
        self.scores: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start, self._first = time.monotonic(), state.global_step
        self._next = self._start + EVERY

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report, if it is time."""
        last = state.global_step >= state.max_steps
        if not state.is_world_process_zero or (time.monotonic() < self._next and not last):
            return
        begin = time.monotonic()
        real, other = self.look(kwargs["model"])
        now = time.monotonic()
        self._next = now + max(EVERY, (now - begin) / SHARE)
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        done, spent = state.global_step - self._first, now - self._start
        step = self.before + state.global_step
        left = (self.all_steps - step) * spent / max(done, 1)
        self.scores.append({"step": state.global_step, "score": real.accuracy, "another": other.accuracy})
        self.say(
            f"{rows * step:,} of {rows * self.all_steps:,} samples, {rows * done / spent:.2g} a second, "
            f"{duration(left)} left. Held out {real.accuracy:.2f}; best constant answer {real.constant:.2f}, "
            f"{self.another} {other.accuracy:.2f}"
        )

    def look(self, model: Any) -> tuple[Score, Score]:
        """The scores over all questions: with the real items, and with items of other examples."""
        model.eval()
        real = self._asked(model, [example.items for example in self._examples])
        other = self._asked(model, self._swapped)
        return Evaluation.of(real).overall(), Evaluation.of(other, "swapped").overall()

    @torch.no_grad()
    def _asked(self, model: Any, items: Sequence[Any]) -> list[Asked]:
        asked: list[Asked] = []
        device = next(model.parameters()).device
        for start in range(0, len(items), ROWS):
            examples = self._examples[start : start + ROWS]
            pairs = zip(examples, items[start : start + ROWS], strict=True)
            batch = self._collate([Example(shown, _chats(example), example.source) for example, shown in pairs])
            labels = batch.pop("labels")
            before = before_labels(labels)
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            logits = model(**inputs, logits_to_keep=before.to(device)).logits
            for example, row in zip(examples, predicted(logits.cpu(), labels), strict=True):
                for query, right in zip(example.queries, right_answers(row), strict=True):
                    asked.append(Asked(query.kind, query.text, query.expected, query.expected if right else ""))
        return asked


def _swapped(questions: Questionnaire, index: int, example: Asking) -> dict[str, list[Any]]:
    """The items of another example. The own items stay if no other example has this modality."""
    return {
        name: list(items if questions.why_not_swapped(name) else questions.swapped(index, name))
        for name, items in example.items.items()
    }


def _chats(example: Asking) -> list[list[dict[str, Any]]]:
    """The conversations of an example: one per question, or a single one with all turns."""
    answered = [[*query.conversation, _answer(query.expected)] for query in example.queries]
    return answered[-1:] if any(len(query.conversation) > 1 for query in example.queries) else answered


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
