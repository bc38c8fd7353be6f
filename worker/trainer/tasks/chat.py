"""Chats and instructions: causal language modeling in which only what the assistant says is a target.

One mean loss a record, over its target tokens; a record without any contributes zero. A record is one sequence, never
joined with another. One that is too long loses its beginning (but for a token that begins every text), so that the last
answer stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from app.catalog.chat_format import InvalidChat, Message, read_messages, read_tools
from worker.trainer.failure import TrainerFailure
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.chat_template import Span, plain_template, tell
from worker.trainer.tasks.examples import Examples, lengths_of
from worker.trainer.tasks.interface import IGNORED, require_texts
from worker.trainer.tasks.language_modeling import LanguageModeling


class Chat(LanguageModeling):
    """Chats in OpenAI's format, bound to one job's tokenizer. Without a chat template it gets the plain one."""

    asked: ClassVar[str] = '[{"role": "user", "content": "A question of yours."}], max_new_tokens=100'

    def __init__(self, spec: TaskSpec, base: Path, max_length: int) -> None:
        super().__init__(spec, base, max_length)
        if not self.processor.is_fast:
            raise TrainerFailure("base_model_invalid", "the tokenizer does not tell where its tokens stand")
        if self.processor.chat_template is None:
            self.processor.chat_template = plain_template(self.processor)

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Roles `messages` and, where the file has it, `tools`: JSON text, as `app.catalog.chat_format` reads it."""
        cells = require_texts(columns["messages"])
        tools = columns.get("tools", [None] * len(cells))
        try:
            return self._examples(
                (read_messages(cell), read_tools(tool) if tool else None)
                for cell, tool in zip(cells, tools, strict=True)
            )
        except InvalidChat as error:
            raise TrainerFailure("data_mismatch", error.code) from error

    def notes(self) -> list[str]:
        """How chats become inputs."""
        return [
            f"Chats are told by the tokenizer's chat template; of more than {self.max_length} tokens the last are read."
        ]

    def _examples(self, chats: Any) -> Examples:
        """chats: (messages, tools or None) of each record."""
        encoded = [self._encoded(*tell(self.processor, messages, tools)) for messages, tools in chats]
        ids = [row for row, _, _ in encoded]
        labels = [targets for _, targets, _ in encoded]
        lost = np.asarray([beyond for _, _, beyond in encoded], dtype=np.int64)
        return Examples({"input_ids": ids, "labels": labels}, {}, lengths_of(ids), {"chat": lost})

    def _encoded(self, text: str, spans: Sequence[Span]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
        """Token ids, the same as labels where a token lies within a span (IGNORED elsewhere), and how many were cut."""
        found = self.processor(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(found["input_ids"] or [self.padding], dtype=np.int64)
        offsets = np.asarray(found["offset_mapping"] or [(0, 0)], dtype=np.int64)
        target = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            target |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 0] < offsets[:, 1])
        labels = np.where(target, ids, IGNORED)
        if len(ids) <= self.max_length:
            return ids, labels, 0
        first = slice(0, 1 if ids[0] == self.processor.bos_token_id else 0)
        rest = slice(len(ids) - self.max_length + first.stop, None)
        ids_kept, labels_kept = (np.concatenate([values[first], values[rest]]) for values in (ids, labels))
        return ids_kept, labels_kept, len(ids) - self.max_length


class Instruction(Chat):
    """An instruction, perhaps with a context, and its response: a chat of one question and one answer."""

    def notes(self) -> list[str]:
        """How the two, or three, become a chat."""
        said = ["An instruction is what the user says, and its response the answer."]
        if "context" in self.spec.columns:
            said.append("A context stands below the instruction, behind an empty line.")
        return [*said, *super().notes()]

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Roles `instruction`, `response` and, where the file has it, `context`."""
        asked, answers = require_texts(columns["instruction"]), require_texts(columns["response"])
        contexts = columns.get("context", [None] * len(asked))
        return self._examples(
            (
                (
                    Message({"role": "user", "content": f"{question}\n\n{context}" if context else question}, False),
                    Message({"role": "assistant", "content": answer}, True),
                ),
                None,
            )
            for question, context, answer in zip(asked, contexts, answers, strict=True)
        )
