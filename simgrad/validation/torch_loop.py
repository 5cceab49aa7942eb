"""DPO in PyTorch as a plain loop, the contestant of :mod:`simgrad.validation.bench.sweeps`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from torch.nn import functional as f

from simgrad.models import ContextApply, ModelConfig
from simgrad.pairs import Pair
from simgrad.typing import Float, Int, Theta


@dataclass(frozen=True)
class Model:
    """A policy and its pairs.

    Attributes:
        parameters: what is trained.
        logp: log-probs of some of the pairs, chosen responses first, then rejected.
        count: pairs.
    """

    parameters: list[torch.Tensor]
    logp: Callable[[torch.Tensor], torch.Tensor]
    count: int


def _tensors(tree: Any) -> Any:
    return jax.tree.map(lambda x: torch.tensor(np.array(x), requires_grad=True), tree)


def transformer(theta: Theta, config: ModelConfig, pairs: Sequence[Pair]) -> Model:
    """A model with learned positions, RMSNorm first and a plain MLP; responses of equal length."""
    names = ("embedding", "positions", "final_norm", "unembedding")
    ends = _tensors({name: theta[name] for name in names})
    layers = [
        _tensors(_layer(jax.tree.map(lambda x, i=i: np.asarray(x[i]), theta["layers"])))
        for i in range(config.depth)
    ]
    sides = [[[*p.prompt, *response] for response in (p.chosen, p.rejected)] for p in pairs]
    tokens, start = torch.tensor(sides), len(pairs[0].prompt)

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return f.rms_norm(x, scale.shape, scale, config.norm_eps)

    def block(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        each = f.linear(norm(x, p["attention_norm"]), p["qkv"])
        q, k, v = each.view(n, t, 3, config.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = f.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + f.linear(mixed.transpose(1, 2).reshape(n, t, d), p["output"])
        wide = f.linear(norm(x, p["mlp_norm"]), p["up"])
        return x + f.linear(f.gelu(wide, approximate="tanh"), p["down"])

    def logp(index: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([tokens[index, 0], tokens[index, 1]])
        x = f.embedding(ids, ends["embedding"]["table"])
        x = x + ends["positions"]["table"][: ids.shape[1]]
        for layer in layers:
            x = block(layer, x)
        logits = f.linear(norm(x, ends["final_norm"]["scale"]), ends["unembedding"]["table"])
        every = logits[:, start - 1 : -1].log_softmax(-1)
        return every.gather(-1, ids[:, start:, None])[..., 0].sum(-1)

    return Model(jax.tree.leaves([ends, layers]), logp, len(pairs))


def _layer(theta: Theta) -> dict[str, np.ndarray]:
    """One layer's arrays as PyTorch lays them out: (out, in), one map for q, k and v."""
    kernels = {name: x["kernel"] for name, x in theta["attention"].items()}
    qkv = np.concatenate([kernels[name] for name in ("query", "key", "value")], 1)
    mlp = {name: theta["mlp"][name]["kernel"].T for name in ("up", "down")}
    norms = {name: theta[name]["scale"] for name in ("attention_norm", "mlp_norm")}
    return {"qkv": qkv.T, "output": kernels["output"].T, **mlp, **norms}


def linear(apply: ContextApply, theta: Theta, pairs: Sequence[Pair]) -> Model:
    """Logits = W h with a frozen feature vector h for each pair's prompt; one-token responses."""
    prompts = [apply.contexts.index(tuple(p.prompt)) for p in pairs]
    features = torch.tensor(np.asarray(theta["features"]["table"])[prompts])
    weight = _tensors(theta["unembedding"]["table"])
    targets = torch.tensor([[p.chosen[0], p.rejected[0]] for p in pairs])

    def logp(index: torch.Tensor) -> torch.Tensor:
        logits = features[index] @ weight.T
        return logits.log_softmax(-1).gather(-1, targets[index]).T.reshape(-1)

    return Model([weight], logp, len(pairs))


def tune(
    model: Model, order: Int[np.ndarray, "E M"], learning_rate: float, beta: float
) -> tuple[float, Float[np.ndarray, "B 2"]]:
    """DPO by SGD on the batches of ``order``: loop seconds, and the change in each log-prob."""
    torch.set_num_threads(os.cpu_count() or 1)
    logp, size, count = model.logp, order.shape[1], model.count
    optimizer = torch.optim.SGD(model.parameters, lr=learning_rate)
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
