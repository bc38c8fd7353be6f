"""Chats and instructions: which tokens are targets, held against texts that were told by hand, and whole jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.catalog.chat_format import MAX_DEPTH
from app.catalog.recipes import MAIN_PHASE, Phase
from tests.trainer.causal import CHAT_WORDS, make_causal_base
from tests.trainer.jobs import ADAPTATIONS, KEY, as_its_card_says, make_job
from worker.trainer.control import Control
from worker.trainer.failure import TrainerFailure
from worker.trainer.families.registry import family_for
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.chat import Chat, Instruction
from worker.trainer.tasks.interface import IGNORED

CHAT = TaskSpec("chat", {"messages": "review"}, (), max_length=48)
INSTRUCTION = TaskSpec("instruction", {"instruction": "review", "response": "mood"}, (), max_length=48)

#: As SmolLM's and Qwen 2's: every turn between marks.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' + message.content }}{{ '<|im_end|> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
#: As Qwen 3's: the last turn of the assistant begins with its (empty) thoughts, earlier ones have lost theirs.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ 'a a ' }}{% endif %}"
    "{{ message.content + '<|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny Llamas that differ in their templates."""
    root = tmp_path_factory.mktemp("chat")
    templates = {"plain": None, "chatml": CHATML, "thinking": THINKING, "strict": STRICT}
    return {
        name: make_causal_base(root / name, "llama", CHAT_WORDS, template, positions=64)
        for name, template in templates.items()
    }


def said(*turns: tuple[str, str], weights: dict[int, int] | None = None) -> str:
    """A chat as a cell."""
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    for place, weight in (weights or {}).items():
        messages[place]["weight"] = weight
    return json.dumps(messages)


def words_of(task: Chat, cell: str, **columns: Any) -> list[tuple[str, bool]]:
    """(token, whether it is a target) of one record."""
    examples = task.encode({"messages": [cell], **columns})
    ids, labels = examples.sequences["input_ids"][0], examples.sequences["labels"][0]
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    names = task.processor.convert_ids_to_tokens(ids.tolist())
    return list(zip(names, (labels != IGNORED).tolist(), strict=True))


def told(text: str) -> list[tuple[str, bool]]:
    """By hand: words, the targets among them in [brackets]."""
    found, inside = [], False
    for word in text.split():
        inside = inside or word.startswith("[")
        found.append((word.strip("[]"), inside))
        inside = inside and not word.endswith("]")
    return found


TWO_TURNS = (
    ("system", "be brief"),
    ("user", "what"),
    ("assistant", "the cat sat"),
    ("user", "the dog"),
    ("assistant", "it ran"),
)


@pytest.mark.parametrize(
    ("base", "weights", "expected"),
    [
        (
            "plain",
            {},
            "System : be brief User : what Assistant : [the cat sat <eos>] User : the dog Assistant : [it ran <eos>]",
        ),
        (
            "plain",
            {2: 0},
            "System : be brief User : what Assistant : the cat sat <eos> User : the dog Assistant : [it ran <eos>]",
        ),
        (
            "chatml",
            {4: 1},
            "<|im_start|> system be brief <|im_end|> <|im_start|> user what <|im_end|> <|im_start|> assistant "
            "[the cat sat <|im_end|>] <|im_start|> user the dog <|im_end|> <|im_start|> assistant [it ran <|im_end|>]",
        ),
        (
            "thinking",
            {},
            "<|im_start|> system be brief <|im_end|> <|im_start|> user what <|im_end|> <|im_start|> assistant "
            "[the cat sat <|im_end|>] <|im_start|> user the dog <|im_end|> <|im_start|> assistant "
            "[a a it ran <|im_end|>]",
        ),
    ],
)
def test_only_what_the_assistant_says_is_a_target(
    bases: dict[str, Path], base: str, weights: dict[int, int], expected: str
) -> None:
    assert words_of(Chat(CHAT, bases[base], 64), said(*TWO_TURNS, weights=weights)) == told(expected)


def test_tools_are_told_and_calls_are_targets(bases: dict[str, Path]) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "mat", "arguments": '{"a": "cat"}'}}
    cell = json.dumps(
        [
            {"role": "user", "content": [{"type": "text", "text": "what"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "x", "content": "sat"},
            {"role": "assistant", "content": "the cat sat"},
        ]
    )
    tools = json.dumps([{"type": "function", "function": {"name": "mat", "parameters": {}}}])
    task = Chat(TaskSpec("chat", {}, (), max_length=200), bases["plain"], 200)
    words = words_of(task, cell, tools=[tools])
    assert [word for word, _ in words[:2]] == ["Tools", ":"]
    targets = [word for word, target in words if target]
    assert targets[-4:] == ["the", "cat", "sat", "<eos>"]
    assert targets.index("mat") < targets.index("cat") < targets.index("<eos>")  # the call's name, and its argument
    assert targets.count("<eos>") == 2
    assert ("Tool", False) in words
    without = words_of(task, cell, tools=[None])
    assert [word for word, target in without if target] == targets


def test_a_long_chat_loses_its_beginning(bases: dict[str, Path]) -> None:
    task = Chat(TaskSpec("chat", {"messages": "review"}, (), max_length=8), bases["plain"], 64)
    words = words_of(task, said(*TWO_TURNS))
    assert words == words_of(Chat(CHAT, bases["plain"], 64), said(*TWO_TURNS))[-8:]
    assert words[-1] == ("<eos>", True)


def test_a_chat_that_the_template_refuses_contributes_nothing(bases: dict[str, Path]) -> None:
    task = Chat(CHAT, bases["strict"], 64)
    assert not any(target for _, target in words_of(task, said(*TWO_TURNS)))
    assert sum(target for _, target in words_of(task, said(*TWO_TURNS[1:]))) == 7


def test_the_deepest_chat_that_is_read_is_told(bases: dict[str, Path]) -> None:
    nested: Any = {}
    for _ in range(MAX_DEPTH - 1):
        nested = {"a": nested}
    call = {"type": "function", "function": {"name": "it", "arguments": json.dumps(nested)}}
    cell = json.dumps([{"role": "user", "content": "it"}, {"role": "assistant", "tool_calls": [call]}])
    assert any(target for _, target in words_of(Chat(TaskSpec("chat", {}, (), 600), bases["plain"], 600), cell))


@pytest.mark.parametrize("cell", ["no chat", "[]", said(("user", "what")), said(("nurse", "what"))])
def test_what_is_no_chat_is_refused_without_a_word_of_it(bases: dict[str, Path], cell: str) -> None:
    with pytest.raises(TrainerFailure) as failure:
        Chat(CHAT, bases["plain"], 64).encode({"messages": [cell]})
    assert failure.value.code == "data_mismatch"
    assert "nurse" not in str(failure.value)


def test_an_instruction_is_a_chat_of_one_answer(bases: dict[str, Path]) -> None:
    task = Instruction(INSTRUCTION, bases["plain"], 64)
    columns = {"instruction": ["what is it", "what"], "context": ["the mat", None], "response": ["a cat", "it"]}
    chat = Chat(CHAT, bases["plain"], 64).encode(
        {
            "messages": [
                said(("user", "what is it\n\nthe mat"), ("assistant", "a cat")),
                said(("user", "what"), ("assistant", "it")),
            ]
        }
    )
    examples = task.encode(columns)
    for name in ("input_ids", "labels"):
        for mine, its in zip(examples.sequences[name], chat.sequences[name], strict=True):
            np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("base", ["plain", "chatml"])
def test_a_records_loss_is_the_mean_over_its_own_targets(bases: dict[str, Path], base: str) -> None:
    """One record at a time, one target at a time, against the model's own probabilities."""
    model = family_for("llama", "chat").load(bases[base], CHAT)
    task = Chat(CHAT, bases[base], 64)
    cells = [said(*TWO_TURNS), said(*TWO_TURNS[1:3]), said(*TWO_TURNS[1:3], weights={1: 0})]
    examples = task.encode({"messages": cells})
    batch = task.batch(examples, range(3), torch.device("cpu"))
    losses = task.loss(task.outputs(model, batch), batch)
    for row, cell in enumerate(cells):
        ids = torch.from_numpy(examples.sequences["input_ids"][row])
        targets = [place for place, (_, target) in enumerate(words_of(task, cell)) if target]
        logs = [
            torch.log_softmax(model(input_ids=ids[None, :place]).logits[0, -1], -1)[ids[place]] for place in targets
        ]
        expected = -torch.stack(logs).mean() if logs else torch.tensor(0.0)
        torch.testing.assert_close(losses[row], expected)
    assert float(losses[2]) == 0.0


def test_a_chat_job_learns_to_answer_and_its_bundle_has_the_template(tmp_path: Path, bases: dict[str, Path]) -> None:
    pairs = [("cat", "it sat"), ("dog", "it ran"), ("tree", "a mat"), ("mat", "a tree")]
    data = [(said(("user", f"what does the {who} do"), ("assistant", does)), "") for who, does in pairs * 12]
    job = make_job(
        tmp_path / "job",
        bases["plain"],
        family="llama",
        task=CHAT,
        private=False,
        evaluation="public",
        phases=(Phase(MAIN_PHASE, ADAPTATIONS["full"], 0.5, 40, 2e-2, 2e-2),),
        data=data,
    )
    run(job.folder, KEY, Control(None))
    assert job.metrics()["token_accuracy"] > 0.7
    bundle = job.folder / "results/model"
    assert (bundle / "chat_template.jinja").is_file()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(bundle), AutoTokenizer.from_pretrained(bundle)
    right = 0
    for who, does in pairs:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"what does the {who} do"}], add_generation_prompt=True, return_tensors="pt"
        )
        answer = model.generate(**asked, max_new_tokens=6, do_sample=False)[0, asked["input_ids"].shape[1] :]
        right += tokenizer.decode(answer, skip_special_tokens=True) == does
    assert right >= 3
    assert "chat template" in (bundle / "README.md").read_text()


def test_a_private_instruction_job_runs(tmp_path: Path, bases: dict[str, Path]) -> None:
    job = make_job(
        tmp_path / "job",
        bases["chatml"],
        family="llama",
        task=INSTRUCTION,
        phases=(Phase(MAIN_PHASE, ADAPTATIONS["lora"], 0.5, 3, 1e-2, 1e-2),),
        data=[("what does it do", "it sat"), ("what", "a cat")] * 30,
    )
    run(job.folder, KEY, Control(None))
    assert job.metrics()["released"] == "private"
    told = as_its_card_says(job.folder / "results/model")([{"role": "user", "content": "what"}], max_new_tokens=2)
    assert told[0]["generated_text"][-1]["role"] == "assistant"
