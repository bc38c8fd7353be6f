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
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
        **options,
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


def _save(model: Any, folder: Path, pickled: bool) -> None:
    model.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _rewrite(path: Path, more: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
