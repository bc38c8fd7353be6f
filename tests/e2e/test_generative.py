"""Chat and translation through the real client: tiny random bases in a folder, trained until they answer."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

from app.privacy.report_check import check_report
from tests.running import Running, wait_for_job
from tests.trainer.causal import CHAT_WORDS, make_causal_base
from tests.trainer.hub_folders import make_marian
from tests.trainer.seq2seq import make_seq2seq_base, translations

PAIRS = {"cat": "it sat", "dog": "it ran", "tree": "a mat", "mat": "a tree"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_causal_base(root / "tiny-llama", "llama", CHAT_WORDS, positions=64)
    make_seq2seq_base(root / "tiny-t5", "t5")
    make_marian(root / "Helsinki-NLP" / "opus-mt-en-fr")
    return root


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client() as opened:
        yield opened


def upload(client: openai.OpenAI, path: Path, lines: list[dict[str, Any]], **extra: Any) -> Any:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    file = client.files.create(file=path, purpose="fine-tune", extra_body=extra)
    file = client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=60)
    assert file.status == "processed", file
    return file


def chats(count: int) -> list[dict[str, Any]]:
    """As OpenAI's guide has them: nothing but `messages`."""
    made = []
    for index in range(count):
        who, does = list(PAIRS.items())[index % 4]
        turns = [("system", "be brief"), ("user", f"what does the {who} do"), ("assistant", does)]
        made.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return made


def download(running: Running, client: openai.OpenAI, job: Any, into: Path) -> tuple[Path, dict[str, Any]]:
    """The unpacked bundle, and its metrics."""
    headers = {"authorization": f"Bearer {client.api_key}"}
    url = f"{running.url}/v1/models/{job.fine_tuned_model}/download"
    tar = httpx.get(url, params={"format": "tar"}, headers=headers, timeout=60).raise_for_status()
    with tarfile.open(fileobj=io.BytesIO(tar.content)) as archive:
        archive.extractall(into, filter="data")
    folder = next(into.rglob("config.json")).parent
    return folder, json.loads((folder / "metrics.json").read_text())


def test_a_chat_file_of_openais_makes_a_private_model_that_answers(
    running: Running, client: openai.OpenAI, models: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = upload(client, tmp_path / "chat.jsonl", chats(600))
    job = client.fine_tuning.jobs.create(  # nothing says that it is a chat
        model="tiny-llama",
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 30, "batch_size": 128}}},
        extra_body={
            "adaptation": {"type": "full"},
            "privacy": {"target_epsilon": 100.0, "target_delta": 1e-5},
            "evaluation": {"split": 0.2},
        },
    )
    job = wait_for_job(client, job.id)
    assert job.status == "succeeded", job.error
    bundle, metrics = download(running, client, job, tmp_path / "bundle")
    assert metrics["released"] == "private"
    assert metrics["perplexity"] > 1.0
    report = json.loads((bundle / "privacy_report.json").read_text())
    assert [check.name for check in check_report(report) if not check.holds] == []

    def answers(folder: Path) -> tuple[list[str], torch.Tensor]:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(bundle)
        told = []
        for who in PAIRS:
            asked = tokenizer.apply_chat_template(
                [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": f"what does the {who} do"},
                ],
                add_generation_prompt=True,
                return_tensors="pt",
            )
            written = model.generate(**asked, max_new_tokens=6, do_sample=False)[0, asked["input_ids"].shape[1] :]
            told.append(tokenizer.decode(written, skip_special_tokens=True))
        with torch.inference_mode():
            return told, model(**asked).logits

    (told, logits), (before, base_logits) = answers(bundle), answers(models / "tiny-llama")
    assert not torch.allclose(logits, base_logits, atol=1e-3)
    # Answers of the set, though not always the right one: of 31 words a guess is one in a thousand tries.
    assert sum(text in PAIRS.values() for text in told) >= 3, told
    assert not any(text in PAIRS.values() for text in before)
    assert metrics["token_accuracy"] > 0.3


def test_a_broken_chat_is_refused_with_its_line(client: openai.OpenAI, tmp_path: Path) -> None:
    lines = chats(30)
    lines[4]["messages"] = lines[4]["messages"][:2]
    file = upload(client, tmp_path / "broken.jsonl", lines)
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id)
    assert (refused.value.code, refused.value.param) == ("invalid_messages", "training_file")
    assert "Line 5" in refused.value.message


def test_translation_on_public_data_is_scored_and_loads(
    running: Running, client: openai.OpenAI, models: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    pairs = [{"source": source, "target": target} for source, target in translations(200)]
    file = upload(client, tmp_path / "pairs.jsonl", pairs, public=True)
    job = client.fine_tuning.jobs.create(
        model="tiny-t5",
        training_file=file.id,
        hyperparameters={"n_epochs": 60, "learning_rate_multiplier": 100},
        extra_body={
            "task": {"source_lang": "en", "target_lang": "fr", "max_length": 16, "max_target_length": 8},
            "adaptation": {"type": "full"},
            "privacy": {"mechanism": "none"},
            "evaluation": {"split": 0.2},
        },
    )
    job = wait_for_job(client, job.id)
    assert job.status == "succeeded", job.error
    bundle, metrics = download(running, client, job, tmp_path / "bundle")
    assert metrics["released"] == "public"
    assert metrics["token_accuracy"] > 0.6
    assert metrics["chrf"] > 40.0
    assert metrics["generated_rows"] == 40
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(bundle), AutoTokenizer.from_pretrained(bundle)
    before = AutoModelForSeq2SeqLM.from_pretrained(models / "tiny-t5")
    says = "translate English to French: "
    assert says in (bundle / "README.md").read_text()
    asked = tokenizer(f"{says}the cat sleeps", return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=6)
    assert "chat" in tokenizer.decode(written[0], skip_special_tokens=True).split()
    with torch.inference_mode():
        given = {**asked, "decoder_input_ids": torch.zeros(1, 1, dtype=torch.int64)}
        assert not torch.allclose(model(**given).logits, before(**given).logits, atol=1e-3)


def test_a_translator_as_its_hub_has_it_is_trained_privately(
    running: Running, client: openai.OpenAI, models: Path, tmp_path: Path
) -> None:
    """source.spm, target.spm and vocab.json, no tokenizer.json; the bundle has them for plain transformers."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    base = "Helsinki-NLP/opus-mt-en-fr"
    headers = {"authorization": f"Bearer {client.api_key}"}
    listed = httpx.get(f"{running.url}/v1/base_models", headers=headers).raise_for_status().json()["data"]
    (told,) = [each for each in listed if each["id"] == base]
    assert (told["language_pair"], "translation" in told["tasks"]) == (["en", "fr"], True)
    pairs = [{"source": source, "target": target} for source, target in translations(300)]
    file = upload(client, tmp_path / "pairs.jsonl", pairs)
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        hyperparameters={"n_epochs": 20},
        extra_body={
            "task": {"source_lang": "en", "target_lang": "fr", "max_length": 24, "max_target_length": 16},
            "adaptation": {"type": "full"},
            "privacy": {"target_epsilon": 50.0, "target_delta": 1e-5},
        },
    )
    job = wait_for_job(client, job.id)
    assert job.status == "succeeded", job.error
    bundle, metrics = download(running, client, job, tmp_path / "bundle")
    assert (metrics["released"], metrics["not_released"]["bleu"]) == ("private", "public_data_only")
    assert {"source.spm", "target.spm", "vocab.json"} <= {path.name for path in bundle.iterdir()}
    with pytest.warns(UserWarning, match="sacremoses"):
        tokenizer = AutoTokenizer.from_pretrained(bundle)
    asked = tokenizer("the cat sleeps", return_tensors="pt")
    after, before = (
        AutoModelForSeq2SeqLM.from_pretrained(folder).generate(**asked, max_new_tokens=8, num_beams=1).tolist()
        for folder in (bundle, models / base)
    )
    assert after != before
    assert isinstance(tokenizer.batch_decode(after, skip_special_tokens=True)[0], str)


def trained(client: openai.OpenAI, base: str, file: Any, epochs: int) -> Any:
    """A job on all weights without noise, whose task the columns alone say."""
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        hyperparameters={"n_epochs": epochs, "batch_size": 50},
        extra_body={
            "adaptation": {"type": "full"},
            "privacy": {"mechanism": "none"},
            "optimizer": {"type": "adamw", "learning_rate": 1e-2},
            "evaluation": {"split": 0.2},
        },
    )
    job = wait_for_job(client, job.id)
    assert job.status == "succeeded", job.error
    return job


def test_prompts_and_completions_make_a_model_that_completes(
    running: Running, client: openai.OpenAI, models: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = [*PAIRS.items()] * 40
    lines = [{"prompt": f"what does the {who} do", "completion": does} for who, does in pairs]
    file = upload(client, tmp_path / "prompts.jsonl", lines, public=True)
    job = trained(client, "tiny-llama", file, 20)
    assert job.model_extra["task"]["type"] == "instruction"
    bundle, metrics = download(running, client, job, tmp_path / "bundle")
    assert metrics["token_accuracy"] > 0.6
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    turn = [{"role": "user", "content": lines[0]["prompt"]}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    written = []
    for folder in (bundle, models / "tiny-llama"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.inference_mode():
            answer = model.generate(**asked, max_new_tokens=2, do_sample=False)[0, asked["input_ids"].shape[1] :]
        written.append(tokenizer.decode(answer, skip_special_tokens=True))
    assert written[0] in PAIRS.values()
    assert written[1] not in PAIRS.values()


@pytest.mark.parametrize(
    ("columns", "task"), [(("document", "summary"), "summarization"), (("input", "output"), "text_to_text")]
)
def test_texts_and_what_becomes_of_them(
    running: Running, client: openai.OpenAI, models: Path, tmp_path: Path, columns: tuple[str, str], task: str
) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    pairs = [dict(zip(columns, pair, strict=True)) for pair in translations(120)]
    file = upload(client, tmp_path / "pairs.jsonl", pairs, public=True)
    job = trained(client, "tiny-t5", file, 30)
    assert job.model_extra["task"]["type"] == task
    bundle, metrics = download(running, client, job, tmp_path / "bundle")
    assert metrics["token_accuracy"] > 0.6
    assert metrics["rouge1"] > 0.4
    says = "summarize: " if task == "summarization" else ""
    asked = AutoTokenizer.from_pretrained(bundle)(f"{says}the dog runs", return_tensors="pt")
    told = []
    for folder in (bundle, models / "tiny-t5"):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder)
        told.append(tokenizer.decode(model.generate(**asked, max_new_tokens=4)[0], skip_special_tokens=True).split())
    assert "chien" in told[0]
    assert told[0] != told[1]
