"""One attention for all heads of a pooling layer, learnt: which tokens a head reads, and how much of each.

A score for each token, a linear function of its vector, becomes a weight by softmax (Lin et al. 2017, with one hop and
no hidden layer). It is written as the pooling layer's own key matrix: the query, the same for every token, picks one
row of it in each of the layer's heads, and these rows are one and the same. All else of the layer stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SharedKey(nn.Module):
    """In the place of the key matrix while a job trains: `score`, (1, width), is the row that all heads share."""

    def __init__(self, key: nn.Linear, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.score = nn.Linear(key.in_features, 1, bias=False)
        self.score.weight = nn.Parameter(key.weight[:1].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(…, width): the scores at each head's first place, else zeros."""
        score = self.score(x).unsqueeze(-1)
        size = x.shape[-1] // self._num_heads
        return F.pad(score.expand(*score.shape[:-2], self._num_heads, 1), (0, size - 1)).flatten(-2)

    def merged(self) -> nn.Linear:
        """The same as a plain key matrix."""
        width = self.score.in_features
        key = nn.Linear(width, width)
        with torch.no_grad():
            for parameter in key.parameters():
                parameter.zero_()
            key.weight[:: width // self._num_heads] = self.score.weight
        return key.requires_grad_(False)


@torch.no_grad()
def pick_shared_row(query: nn.Linear, num_heads: int) -> None:
    """Makes the query pick the row; the softmax is then over scores / √width, whatever the number of heads."""
    size = query.out_features // num_heads
    query.weight.zero_()
    query.bias.zero_()
    query.bias[::size] = math.sqrt(size / query.out_features)


class AttentiveHead(nn.Module):
    """What reads the states: scores, the pooling that they make, and the classifier; as the whole model computes it.

    norm: (the tokens' weighted mean, the first token's vector), each (rows, width) → the vectors before centring.
    features: the classifier's inputs from those, (rows, width). Both are frozen.
    """

    def __init__(
        self,
        score: nn.Linear,
        classifier: nn.Linear,
        norm: Callable[[Tensor, Tensor], Tensor],
        features: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.score, self.classifier = score, classifier
        self._norm, self._features = norm, features

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """states: (rows, length, width), mask: (rows, length) → (rows, width), as `PooledFamily.pooled` has it."""
        scores = self.score(states).squeeze(-1) / math.sqrt(states.shape[-1])
        weights = scores.masked_fill(mask == 0, -torch.inf).softmax(1)
        return self._norm(torch.bmm(weights.unsqueeze(1), states).squeeze(1), states[:, 0])

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Logits, (rows, classes)."""
        logits: Tensor = self.classifier(self._features(self.pooled(states, mask)))
        return logits
