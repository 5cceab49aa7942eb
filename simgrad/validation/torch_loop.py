"""DPO in PyTorch as a plain loop, the contestant of :mod:`simgrad.validation.bench.sweeps`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as f

from simgrad.models import ModelConfig
from simgrad.pairs import Pair
from simgrad.typing import Float, Int, Theta


class _Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.heads = config.width, config.heads
        self.attention_norm, self.mlp_norm = (
            nn.RMSNorm(d, config.norm_eps),
            nn.RMSNorm(d, config.norm_eps),
        )
        self.qkv, self.output = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = (
            self.qkv(self.attention_norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        mixed = f.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(f.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    """A model with learned positions, RMSNorm first and a plain MLP.

    Weights come from ``theta`` of a :class:`ModelConfig` like it.
    """

    def __init__(self, theta: Theta, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.unembedding = nn.Linear(config.width, config.vocab_size, bias=False)
        layers = theta["layers"]
        weights = {
            "embedding.weight": theta["embedding"]["table"],
            "positions.weight": theta["positions"]["table"],
            "norm.weight": theta["final_norm"]["scale"],
            "unembedding.weight": theta["unembedding"]["table"],
        }
        for i in range(config.depth):
            attention = {name: x["kernel"][i] for name, x in layers["attention"].items()}
            weights |= {
                f"blocks.{i}.attention_norm.weight": layers["attention_norm"]["scale"][i],
                f"blocks.{i}.mlp_norm.weight": layers["mlp_norm"]["scale"][i],
                f"blocks.{i}.qkv.weight": np.concatenate(
                    [attention[k] for k in ("query", "key", "value")], 1
                ).T,
                f"blocks.{i}.output.weight": attention["output"].T,
                f"blocks.{i}.up.weight": layers["mlp"]["up"]["kernel"][i].T,
                f"blocks.{i}.down.weight": layers["mlp"]["down"]["kernel"][i].T,
            }
        self.load_state_dict({name: torch.tensor(np.array(x)) for name, x in weights.items()})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits at every position."""
        x = self.embedding(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembedding(self.norm(x))

    def log_probs(self, pairs: Sequence[Pair]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Log-probs at an index, chosen then rejected responses, all of the same length."""
        start = len(pairs[0].prompt)
        chosen = torch.tensor([[*p.prompt, *p.chosen] for p in pairs])
        rejected = torch.tensor([[*p.prompt, *p.rejected] for p in pairs])

        def logp(index: torch.Tensor) -> torch.Tensor:
            ids = torch.cat([chosen[index], rejected[index]])
            logits = self(ids)[:, start - 1 : -1]
            return logits.log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0].sum(-1)

        return logp


class Linear(nn.Module):
    """Logits = W h with a feature vector h for each pair's prompt."""

    def __init__(
        self, features: Float[np.ndarray, "B D"], unembedding: Float[np.ndarray, "V D"]
    ) -> None:
        super().__init__()
        self.features = torch.tensor(features)
        self.weight = nn.Parameter(torch.tensor(unembedding))

    def log_probs(self, pairs: Sequence[Pair]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Log-probs of the chosen, then of the rejected tokens at an index."""
        targets = torch.tensor([[p.chosen[0], p.rejected[0]] for p in pairs])

        def logp(index: torch.Tensor) -> torch.Tensor:
            logits = self.features[index] @ self.weight.T
            return logits.log_softmax(-1).gather(-1, targets[index]).T.reshape(-1)

        return logp


def tune(
    model: Transformer | Linear,
    pairs: Sequence[Pair],
    order: Int[np.ndarray, "E M"],
    learning_rate: float,
    beta: float,
) -> tuple[float, Float[np.ndarray, "B 2"]]:
    """DPO by SGD on the batches of ``order``: loop seconds, and the change in each log-prob."""
    logp, size, count = model.log_probs(pairs), order.shape[1], len(pairs)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    steps, every = torch.tensor(order, dtype=torch.long), torch.arange(count)
    with torch.no_grad():
        reference = logp(every)
    begin = time.perf_counter()
    for index in steps:
        gain = logp(index) - torch.cat([reference[index], reference[count + index]])
        loss = -f.logsigmoid(beta * (gain[:size] - gain[size:])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        return seconds, (logp(every) - reference).reshape(2, -1).T.numpy()
