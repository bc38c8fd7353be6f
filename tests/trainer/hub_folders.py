"""Translators as hubs have them, without tokenizer.json: real, small SentencePiece models and random weights."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers as hf

from app.catalog.languages import M2M_100, MBART_25, MBART_50
from tests.trainer.seq2seq import translations

_SIZES = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
_T5_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def pieces(texts: Iterable[str], **options: Any) -> bytes:
    """A SentencePiece model of these texts."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts] * 20),
        model_writer=written,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **{"bos_id": -1, **options},
    )
    return written.getvalue()


def make_marian(
    folder: Path, *, languages: tuple[str, ...] = (), pickled: bool = False, separate: bool = False
) -> Path:
    """The layout of Helsinki-NLP/opus-mt-en-fr. languages: of a model for several. pickled: as older weights are.
    separate: with a vocabulary and embeddings for each side, as some of opus-mt-tc-… have them."""
    folder.mkdir(parents=True)
    sides = [pieces(texts, vocab_size=40, unk_id=0, eos_id=1) for texts in zip(*translations(12), strict=True)]
    for name, model in zip(("source.spm", "target.spm"), sides, strict=True):
        (folder / name).write_bytes(model)
    read = [sentencepiece.SentencePieceProcessor(model_proto=model) for model in sides]
    tokens = [[model.id_to_piece(index) for index in range(model.get_piece_size())] for model in read]
    marks = [f">>{language}<<" for language in languages]
    named = [[*tokens[0], *marks], tokens[1]] if separate else [[*tokens[0], *tokens[1], *marks]]
    vocabularies = [dict.fromkeys(("</s>", "<unk>", *names)) for names in named]
    padding = max(map(len, vocabularies))  # one id of both, behind the last of either
    for names, name in zip(vocabularies, ("vocab.json", "target_vocab.json"), strict=False):
        ids = {token: index for index, token in enumerate(names)}
        (folder / name).write_text(json.dumps({**ids, "<pad>": padding}))
    told = {"source_lang": "en", "target_lang": "roa" if languages else "fr"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told | ({"separate_vocabs": True} if separate else {})))
    special = {"pad_token_id": padding, "decoder_start_token_id": padding, "eos_token_id": 0, "bos_token_id": 0}
    torch.manual_seed(7)
    config = hf.MarianConfig(
        **_SIZES, **special, vocab_size=padding + 1, forced_eos_token_id=0, scale_embedding=True,
        share_encoder_decoder_embeddings=not separate,
    )  # fmt: skip
    model = hf.MarianMTModel(config)
    _save(model, folder, pickled)
    # Written for an older transformers, which kept how to generate in both files.
    searching = {"bad_words_ids": [[padding]], "max_length": 32, "num_beams": 4}
    _rewrite(folder / "config.json", {**searching, "add_final_layer_norm": False, "extra_pos_embeddings": padding + 1})
    generating = {**special, **searching, "forced_eos_token_id": 0, "renormalize_logits": True}
    (folder / "generation_config.json").write_text(json.dumps(generating))
    return folder


def make_mt5(folder: Path) -> Path:
    """The layout of google/mt5-small: bytes for what is unknown, weights for more than its tokens, an untied head."""
    folder.mkdir(parents=True)
    texts = [text for pair in translations(12) for text in pair]
    model = pieces(texts, vocab_size=300, pad_id=0, eos_id=1, unk_id=2, byte_fallback=True)
    (folder / "spiece.model").write_bytes(model)
    (folder / "special_tokens_map.json").write_text(json.dumps(_T5_TOKENS))
    told = {**_T5_TOKENS, "extra_ids": 0, "additional_special_tokens": None, "name_or_path": "google/mt5-small"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size() + 12
    torch.manual_seed(7)
    config = hf.MT5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=size, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, tokenizer_class="T5Tokenizer",
    )  # fmt: skip
    made = hf.MT5ForConditionalGeneration(config)
    made.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(size, 16))
    _save(made, folder, False)
    _rewrite(folder / "config.json", {"tie_word_embeddings": False})
    return folder


def make_mbart(folder: Path, *, tokenizer: str = "MBart50Tokenizer", languages: tuple[str, ...] = MBART_50) -> Path:
    """The layout of facebook/mbart-large-50-many-to-many-mmt: a SentencePiece file and no tokenizer.json."""
    folder.mkdir(parents=True)
    model = _both_sides(vocab_size=60)
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    _tell(folder, tokenizer, list(languages), language_codes="ML50", src_lang="en_XX", tgt_lang=None)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size() + 1 + len(languages) + 1
    torch.manual_seed(7)
    config = hf.MBartConfig(
        **_SIZES, vocab_size=size, decoder_start_token_id=2, scale_embedding=True, tokenizer_class=tokenizer
    )
    made = hf.MBartForConditionalGeneration(config)
    made.final_logits_bias.uniform_(-0.1, 0.1)
    _save(made, folder, False)
    _rewrite(folder / "config.json", {"add_final_layer_norm": True, "normalize_before": True, "output_past": True})
    _rewrite(folder / "generation_config.json", {"max_length": 200, "num_beams": 5, "early_stopping": True})
    return folder


def make_mbart_25(folder: Path) -> Path:
    """The layout of facebook/mbart-large-cc25, without tokenizer.json."""
    made = make_mbart(folder, tokenizer="MBartTokenizer", languages=MBART_25)
    _rewrite(folder / "config.json", {"decoder_start_token_id": None})
    return made


def make_m2m(folder: Path) -> Path:
    """The layout of facebook/m2m100_418M: pieces in vocab.json, languages behind them, and eight rows for nothing."""
    folder.mkdir(parents=True)
    model = _both_sides(vocab_size=60)
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    read = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = ("<s>", "<pad>", "</s>", "<unk>", *(read.id_to_piece(index) for index in range(3, read.get_piece_size())))
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    marks = [f"__{code}__" for code in M2M_100]
    _tell(folder, "M2M100Tokenizer", marks, language_codes="m2m100", num_madeup_words=8, src_lang=None, tgt_lang=None)
    return _save_m2m(folder, len(tokens) + len(marks) + 8, max_length=200, num_beams=5, early_stopping=True)


def make_nllb(folder: Path) -> Path:
    """The layout of facebook/nllb-200-distilled-600M: M2M-100's architecture, another tokenizer, in tokenizer.json."""
    folder.mkdir(parents=True)
    model = _both_sides(vocab_size=32, model_type="bpe")
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    codes = ["deu_Latn", "eng_Latn", "fra_Latn", "zho_Hans", "zho_Hant"]
    read = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [read.id_to_piece(index) for index in range(3, read.get_piece_size())]
    ids = {token: index for index, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", *pieces))}
    merges = [(left, right) for whole in pieces for left, right in _halves(whole) if left in ids and right in ids]
    tokenizer = hf.NllbTokenizer(ids, merges, extra_special_tokens=codes)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    _tell(folder, "NllbTokenizer", codes, model_max_length=1024, src_lang=None, tgt_lang=None, tokenizer_file=None)
    return _save_m2m(folder, len(tokenizer) + 2, max_length=200)


def _halves(text: str) -> list[tuple[str, str]]:
    return [(text[:place], text[place:]) for place in range(1, len(text))]


def _both_sides(**options: Any) -> bytes:
    return pieces([text for pair in translations(12) for text in pair], bos_id=1, **options)


def _tell(folder: Path, tokenizer: str, special: list[str], **told: Any) -> None:
    """The tokenizer's two files, with what hubs' have besides."""
    tokens = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "unk_token": "<unk>"}
    tokens["pad_token"] = "<pad>"
    mask = {"content": "<mask>", "lstrip": True, "normalized": True, "rstrip": False, "single_word": False}
    more = {"name_or_path": "facebook/some", "sp_model_kwargs": {}, "special_tokens_map_file": "/home/somebody"}
    config = {**tokens, **told, **more, "tokenizer_class": tokenizer}
    special_tokens = {**tokens, "additional_special_tokens": special}
    if tokenizer != "M2M100Tokenizer":  # which has none
        config["mask_token"] = {**mask, "__type": "AddedToken"}
        special_tokens["mask_token"] = mask
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens))


def _save_m2m(folder: Path, size: int, **generating: Any) -> Path:
    torch.manual_seed(7)
    config = hf.M2M100Config(**_SIZES, vocab_size=size, scale_embedding=True)
    _save(hf.M2M100ForConditionalGeneration(config), folder, False)
    _rewrite(folder / "config.json", {"gradient_checkpointing": False, "num_hidden_layers": 2})
    _rewrite(folder / "generation_config.json", generating)
    return folder


def _save(model: Any, folder: Path, pickled: bool) -> None:
    model.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _rewrite(path: Path, more: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
