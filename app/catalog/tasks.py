"""The tasks that this service can train, and the columns each one reads.

A new task is an entry here and one file in `worker/trainer/tasks`; contract tests resolve every entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: Which of transformers' model classes a task trains: AutoModelFor…
ModelClass = Literal[
    "sequence_classification",
    "token_classification",
    "causal_lm",
    "seq2seq_lm",
    "masked_lm",
    "image_classification",
]

#: Where a task's outputs come from. pooled: a new head on one vector a record, which frozen bodies compute once;
#: tokens: a new head on every token; pretrained: the base's own head, so that nothing starts from zero.
HeadKind = Literal["pooled", "tokens", "pretrained"]

_HEADS: dict[ModelClass, HeadKind] = {
    "sequence_classification": "pooled",
    "image_classification": "pooled",
    "token_classification": "tokens",
    "causal_lm": "pretrained",
    "seq2seq_lm": "pretrained",
    "masked_lm": "pretrained",
}

#: What a column's cells must be: text of any kind, JSON in OpenAI's chat format, lists of strings, lists of classes
#: (strings, or integers throughout), or images.
Cells = Literal["text", "messages", "tools", "lists", "class_lists", "images"]

#: Number of classes and the task's options → L2 norm of what one unit adds to the released statistics.
Sensitivity = Callable[[int, Mapping[str, Any]], float]


@dataclass(frozen=True, slots=True)
class Column:
    """One role that a task reads from a dataset.

    names: column names, lower case, by which the role is inferred where the request names none, in order of preference.
    required: an optional column is read where the file has it; nullable: and may have rows without a value.
    as_long_as: the role whose lists are as long in every row.
    """

    role: str
    names: tuple[str, ...]
    required: bool = True
    nullable: bool = False
    holds: Cells = "text"
    as_long_as: str | None = None


def _one_cell(num_labels: int, options: Mapping[str, Any]) -> float:
    return 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """An ML task.

    class_role: the column whose values are the classes, declared in the request or taken from the file (then stated as
    public in the report); None: the task has no classes. class_elements: the cells are lists, and classes their
    elements; also where the option `multi_label` says so.
    metrics: what an evaluation releases; public_metrics: what only one on data declared public does, exactly: of
    texts that the model generates, of whole entities, the mean loss where the others are counts. sensitivity: of the
    statistics that they follow from.
    options: fields of the request's `task` block that this task takes, beside columns, labels and max_length.
    loss_bound: where the loss curve clips a record's loss; None: at twice that of a guess among the classes.
    max_length: of a record, in tokens, where the request names no other number; no more than the base reads.
    """

    type: str
    title: str
    model: ModelClass
    columns: tuple[Column, ...]
    metrics: tuple[str, ...]
    class_role: str | None = None
    class_elements: bool = False
    sensitivity: Sensitivity = _one_cell
    options: tuple[str, ...] = ()
    loss_bound: float | None = None
    max_length: int = 128
    public_metrics: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether it has a list of classes."""
        return self.class_role is not None

    @property
    def head(self) -> HeadKind:
        """Where its outputs come from."""
        return _HEADS[self.model]


_TEXT = Column("text", ("text", "sentence", "content", "message", "review", "comment", "body", "document", "sentence1"))
_PAIR = Column("text_pair", ("text_pair", "sentence2", "second_sentence"), required=False)
_LABEL = Column("label", ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic"))


def _one_cell_a_label(num_labels: int, options: Mapping[str, Any]) -> float:
    """One cell of the confusion matrix; of several labels, one of four binary cells for each."""
    return math.sqrt(num_labels) if options.get("multi_label") else 1.0


def _moments(num_labels: int, options: Mapping[str, Any]) -> float:
    """An absolute error, and target and prediction with their squares and product, each within [-1, 1]."""
    return math.sqrt(6.0)


def _loss_and_accuracy(num_labels: int, options: Mapping[str, Any]) -> float:
    """A loss and a share of right tokens, each scaled to [0, 1]."""
    return math.sqrt(2.0)


def _text_to_text(
    type: str,
    title: str,
    source: tuple[str, ...],
    target: tuple[str, ...],
    *others: Column,
    options: tuple[str, ...] = (),
) -> Task:
    return Task(
        type=type,
        title=title,
        model="seq2seq_lm",
        columns=(Column("source", source), Column("target", target), *others),
        metrics=("loss", "perplexity", "token_accuracy"),
        sensitivity=_loss_and_accuracy,
        options=("source_prefix", "max_target_length", *options),
        loss_bound=10.0,
        max_length=256,
        public_metrics=("bleu", "chrf", "rouge1", "rouge2", "rougeL"),
    )


TASKS: dict[str, Task] = {
    task.type: task
    for task in (
        Task(
            type="text_classification",
            title="Text classification",
            model="sequence_classification",
            columns=(_TEXT, _PAIR, _LABEL),
            metrics=("accuracy", "precision", "recall", "f1", "confusion_matrix"),
            class_role="label",
            sensitivity=_one_cell_a_label,
            options=("multi_label",),
            public_metrics=("loss",),
        ),
        Task(
            type="text_regression",
            title="Text regression",
            model="sequence_classification",
            columns=(_TEXT, _PAIR, Column("target", ("target", "score", "rating", "value", "label"))),
            metrics=("rmse", "mae", "r2", "correlation"),
            sensitivity=_moments,
            options=("range",),
        ),
        Task(
            type="token_classification",
            title="Token classification",
            model="token_classification",
            columns=(
                Column("tokens", ("tokens", "words"), holds="lists"),
                Column("tags", ("tags", "ner_tags", "labels"), holds="class_lists", as_long_as="tokens"),
            ),
            metrics=("accuracy", "precision", "recall", "f1", "confusion_matrix"),
            class_role="tags",
            class_elements=True,
            public_metrics=("entity_precision", "entity_recall", "entity_f1", "entity_f1_per_type"),
        ),
        Task(
            type="image_classification",
            title="Image classification",
            model="image_classification",
            columns=(Column("image", ("image", "img", "picture"), holds="images"), _LABEL),
            metrics=("accuracy", "precision", "recall", "f1", "confusion_matrix"),
            class_role="label",
            public_metrics=("loss",),
        ),
        Task(
            type="language_modeling",
            title="Language modeling (causal, plain text)",
            model="causal_lm",
            columns=(_TEXT,),
            metrics=("loss", "perplexity", "token_accuracy"),
            sensitivity=_loss_and_accuracy,
            loss_bound=10.0,
        ),
        Task(
            type="masked_lm",
            title="Masked language modeling (adaptation without labels)",
            model="masked_lm",
            columns=(_TEXT,),
            metrics=("loss", "perplexity", "token_accuracy"),
            sensitivity=_loss_and_accuracy,
            loss_bound=10.0,
        ),
        Task(
            type="chat",
            title="Chat (causal, loss on what the assistant says)",
            model="causal_lm",
            columns=(
                Column("messages", ("messages", "conversation", "chat"), holds="messages"),
                Column("tools", ("tools",), required=False, nullable=True, holds="tools"),
            ),
            metrics=("loss", "perplexity", "token_accuracy"),
            sensitivity=_loss_and_accuracy,
            loss_bound=10.0,
            max_length=512,
        ),
        Task(
            type="instruction",
            title="Instruction following (causal, loss on the response)",
            model="causal_lm",
            columns=(
                Column("instruction", ("instruction", "prompt", "question")),
                Column("context", ("context", "input"), required=False, nullable=True),
                Column("response", ("response", "completion", "output", "answer")),
            ),
            metrics=("loss", "perplexity", "token_accuracy"),
            sensitivity=_loss_and_accuracy,
            loss_bound=10.0,
            max_length=512,
        ),
        _text_to_text(
            "text_to_text",
            "Text to text",
            ("source", "input", "prompt", "question", "text"),
            ("target", "output", "completion", "response", "answer"),
        ),
        _text_to_text(
            "translation",
            "Translation",
            ("source", "src", "source_text"),
            ("translation", "target", "tgt", "target_text"),
            Column("source_lang", ("source_lang", "source_language", "src_lang"), required=False),
            Column("target_lang", ("target_lang", "target_language", "tgt_lang"), required=False),
            options=("source_lang", "target_lang"),
        ),
        _text_to_text(
            "summarization",
            "Summarization",
            ("document", "article", "dialogue", "text", "source"),
            ("summary", "highlights", "abstract", "target"),
        ),
    )
}
