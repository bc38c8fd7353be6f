"""Models of other kinds than a classifier of texts: tiny random ones, as plain transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from app.catalog.families import GROUP_NORM_CODE
from tests.exporter.readme import as_its_readme_says
from tests.trainer.jobs import BAD, FILLER, GOOD
from worker.exporter.spec import ExportFailure
from worker.trainer.families.group_norm import with_group_norm

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Make = Callable[..., tuple[Path, dict[str, Any]]]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
_RESNET: dict[str, Any] = {
    "embedding_size": 32, "hidden_sizes": [32, 48], "depths": [1, 1], "image_size": 32, "num_labels": 3,
}  # fmt: skip


def _as_if_pretrained(model: Any) -> Any:
    """BatchNorm's statistics fit the net, and a convolution's channels have scales of their own, as training leaves
    them: over two orders of magnitude."""
    generator = torch.Generator().manual_seed(4)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            scales = torch.exp(2.0 * torch.randn(module.out_channels, 1, 1, 1, generator=generator))
            module.weight.data = scales * torch.randn(module.weight.shape, generator=generator)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over what comes
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 3, 32, 32, generator=generator))
    return model.eval()


def build(kind: str) -> Any:
    """A random model of that kind."""
    torch.manual_seed(3)
    match kind:
        case "tokens":
            return BertForTokenClassification(BertConfig(**SIZES, num_labels=3))
        case "masked":
            return BertForMaskedLM(BertConfig(**SIZES))
        case "number":
            return BertForSequenceClassification(BertConfig(**SIZES, num_labels=1, problem_type="regression"))
        case "labels":
            config = BertConfig(**SIZES, num_labels=3, problem_type="multi_label_classification")
            return BertForSequenceClassification(config)
        case "gpt2":
            sizes = {"vocab_size": len(WORDS), "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
            return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5, bos_token_id=2, eos_token_id=3))
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, bos_token_id=2, eos_token_id=3))
        case "t5":
            sizes = {"vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
            return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
        case "image":
            sizes = {name: SIZES[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
            config = ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8, num_labels=3)
            return ViTForImageClassification(config)
        case "convnext":
            sizes = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32}
            return ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=3, initializer_range=0.5))
        case "resnet":
            return _as_if_pretrained(ResNetForImageClassification(ResNetConfig(**_RESNET)))
        case "efficientnet":
            blocks = {"in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2], "expand_ratios": [1, 6]}
            sizes = {"image_size": 32, "num_block_repeats": [1, 1], "kernel_sizes": [3, 3], "depthwise_padding": []}
            config = EfficientNetConfig(**sizes, **blocks, hidden_dim=1280, width_coefficient=1.0, num_labels=3)
            return _as_if_pretrained(EfficientNetForImageClassification(config))
        case "group_norm":
            model = ResNetForImageClassification(ResNetConfig(**_RESNET))
            return with_group_norm(model, lambda made: [name for name, _ in made.named_parameters()])
    raise AssertionError(kind)


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[[str], Path]:
    """A folder as plain transformers saves it."""

    def save(kind: str) -> Path:
        folder = tmp_path / f"bundle-{kind}"
        build(kind).save_pretrained(folder)
        if kind == "group_norm":
            (folder / GROUP_NORM_CODE).write_text("raise SystemExit('code of a bundle was run')")
        elif kind not in ("image", *IMAGES):
            (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
            BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), model_max_length=32).save_pretrained(folder)
        (folder / "privacy_report.json").write_text("{}")
        return folder

    return save


@pytest.mark.parametrize("kind", ["tokens", "masked", "number", "labels", "gpt2", "llama", "t5", "image", "group_norm"])
def test_half_precision_of_every_kind(make: Make, bundle_of: Any, kind: str) -> None:
    folder, metrics = make("fp16", of=bundle_of(kind))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert metrics["relative_difference"] < 0.05
    assert (metrics["agreement"] is None) == (kind == "number")
    brings_code = kind == "group_norm"
    assert ("trust_remote_code=True" in (folder / "README.md").read_text()) == brings_code
    assert not brings_code or "class GroupNorm" in (folder / GROUP_NORM_CODE).read_text()


@pytest.mark.parametrize("kind", ["tokens", "image", "group_norm"])
def test_onnx_of_other_kinds(make: Make, bundle_of: Any, kind: str) -> None:
    of = bundle_of(kind)
    folder, metrics = make("onnx", of=of)
    assert metrics["agreement"] == 1.0
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    taken = [entry.name for entry in session.get_inputs()]
    if kind in ("image", "group_norm"):
        size = 16 if kind == "image" else 32
        inputs = {"pixel_values": torch.randn(5, 3, size, size)}
    else:
        inputs = dict(
            AutoTokenizer.from_pretrained(folder)(["good", "the plot was awful"], padding=True, return_tensors="pt")
        )
    (logits,) = session.run(None, {name: inputs[name].numpy() for name in taken})
    with torch.inference_mode():
        expected = build(kind).eval()(**{name: inputs[name] for name in taken}).logits
    places = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    assert np.allclose(torch.from_numpy(logits)[places], expected[places], rtol=1e-3, atol=1e-4)


IMAGES = ["efficientnet", "resnet", "group_norm", "convnext"]


@pytest.mark.parametrize("kind", IMAGES)
def test_int8_of_convolutions(make: Make, bundle_of: Any, kind: str) -> None:
    """Each channel of their weights fills int8's range, and they are computed with in float32; the smallest, together
    a fiftieth at most, are not rounded."""
    folder, metrics = make("onnx_int8", of=bundle_of(kind))
    assert metrics["relative_difference"] < 0.1
    graph = onnx.load(folder / "model.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    convolved = [value for value in tensors.values() if value.ndim == 4 and value.shape[1] > 1]
    rounded = [value for value in convolved if value.dtype == np.int8]
    whole = [value.size for value in convolved if value.dtype == np.float32]
    assert all((np.abs(value).max((1, 2, 3)) == 127).all() for value in rounded)
    layers = [each for each in build(kind).modules() if isinstance(each, torch.nn.Conv2d) and each.groups == 1]
    sizes = sorted(each.weight.numel() for each in layers)
    assert len(rounded) + len(whole) == len(layers)
    assert sorted(whole) == sizes[: len(whole)]
    assert sum(whole) <= sum(sizes) / 50 < sum(sizes[: len(whole) + 1])
    assert (len(whole) > 0) == (kind == "efficientnet")
    assert "ConvInteger" not in {node.op_type for node in graph.node}
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * torch.arange(6).view(-1, 1, 1, 1)
    (logits,) = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.inference_mode():
        expected = build(kind).eval()(pixels).logits
    assert (torch.from_numpy(logits) - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_onnx_of_a_causal_model_writes_by_its_cache_what_the_model_writes(
    make: Make, bundle_of: Any, kind: str
) -> None:
    folder, metrics = make("onnx", of=bundle_of(kind))
    assert metrics["agreement"] == 1.0
    assert metrics["relative_difference"] < 1e-3
    texts = ["the plot was awful", "good", "a fine film is a film"]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    asked = tokenizer(texts, padding=True, return_tensors="pt")
    model, length = build(kind).eval(), asked["input_ids"].shape[1]
    with torch.inference_mode():
        written = model.generate(
            input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], do_sample=False, max_new_tokens=16
        )
    expected = tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
    assert len(set(expected)) == 3
    assert as_its_readme_says(folder, texts) == expected
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    taken = [declared.name for declared in session.get_inputs()]
    kept = [f"{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    assert taken == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{each}" for each in kept)]
    given = [declared.name for declared in session.get_outputs()]
    assert given == ["logits", *(f"present.{each}" for each in kept)]


def test_an_adapter_of_a_causal_language_model(make: Make, bundle_of: Any, tmp_path: Path) -> None:
    """GPT-2 keeps its matrices transposed."""
    base = bundle_of("gpt2")
    changed = build("gpt2")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in changed.named_parameters():
            if name.endswith("c_attn.weight"):
                left, right = (torch.randn(size, 2, generator=generator) for size in value.shape)
                value += 0.3 * left @ right.T
    merged = tmp_path / "merged"
    for path in base.iterdir():
        merged.mkdir(exist_ok=True)
        (merged / path.name).write_bytes(path.read_bytes())
    changed.save_pretrained(merged)
    folder, metrics = make("adapter", of=merged, base_path=str(base))
    assert metrics["adapted_matrices"] == 3
    inputs = AutoTokenizer.from_pretrained(folder)(["the plot was awful"], return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    adapted = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        assert torch.allclose(adapted(**inputs).logits, changed.eval()(**inputs).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "number"])
def test_students_of_other_kinds(make: Make, bundle_of: Any, texts: list[str], kind: str) -> None:
    folder, metrics = make("student", of=bundle_of(kind), texts=texts, num_layers=2, n_epochs=20)
    assert (metrics["num_layers"], metrics["model_num_layers"]) == (2, 3)
    assert metrics["relative_difference"] < 0.95
    layers = json.loads((folder / "config.json").read_text())
    assert layers.get("num_hidden_layers", layers.get("n_layer")) == 2


def test_an_unknown_architecture_is_refused_by_name(make: Make, bundle_of: Any) -> None:
    folder = bundle_of("number")
    config = json.loads((folder / "config.json").read_text())
    for architectures in (["BertForQuestionAnswering"], [], None):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        with pytest.raises(ExportFailure) as caught:
            make("fp16", of=folder)
        assert caught.value.code == "format_not_supported"
