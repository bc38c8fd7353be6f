"""Texts that a model wrote against references: BLEU and chrF by sacrebleu, ROUGE by rouge-score. For public data only.

Bounded, since generating is many times dearer than a loss. ROUGE's tokens are runs of a-z and 0-9 in lower case, so it
says nothing of texts in other scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Rows that texts are generated for, tokens of each, and rows at a time.
MAX_ROWS, MAX_TOKENS, ROWS_AT_ONCE = 200, 128, 16

_ROUGE = ("rouge1", "rouge2", "rougeL")


def scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """bleu and chrf from 0 to 100, of the corpus; rouge1, rouge2 and rougeL from 0 to 1, mean F over the rows."""
    from rouge_score.rouge_scorer import RougeScorer  # seconds to import, and few jobs need them
    from sacrebleu import corpus_bleu, corpus_chrf

    scorer = RougeScorer(list(_ROUGE), use_stemmer=True)
    rows = [scorer.score(reference, text) for text, reference in zip(written, references, strict=True)]
    return {
        "bleu": float(corpus_bleu(list(written), [list(references)]).score),
        "chrf": float(corpus_chrf(list(written), [list(references)]).score),
        **{name: sum(row[name].fmeasure for row in rows) / max(1, len(rows)) for name in _ROUGE},
    }


def lines(metrics: Mapping[str, Any]) -> list[str]:
    """For the model card; none where nothing was generated."""
    if "bleu" not in metrics:
        return []
    rouge = ", ".join(f"{name} {metrics[name]:.4f}" for name in _ROUGE)
    return [
        f"- BLEU {metrics['bleu']:.2f}, chrF {metrics['chrf']:.2f}, {rouge}, of what the model wrote greedily for "
        f"{metrics['generated_rows']} rows"
    ]
