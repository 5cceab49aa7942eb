"""The published pair-scoring procedure, written plainly in PyTorch: the benchmark's comparison.

Forward: one full-logit forward a response, one response at a time (as the CHES scripts do).
Gradients: one full backward a response, or a token, gradients flattened to vectors, dot products of
those.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from simgrad.pairs import Pair


def random_model(shape: dict[str, int], max_length: int, seed: int = 0) -> Any:
    """A random-weight transformers GPT-2 (with key heads, a Llama), in evaluation mode."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    size, width, depth, heads = (shape[k] for k in ("vocab_size", "width", "depth", "heads"))
    if "kv_heads" not in shape:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size, n_positions=max_length, n_embd=width, n_layer=depth, n_head=heads
            )
        ).eval()
    llama = LlamaConfig(
        vocab_size=size,
        max_position_embeddings=max_length,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["mlp_width"],
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(llama).eval()


def _response(
    model: Any, prompt: Sequence[int], response: Sequence[int], states: bool = False
) -> tuple[torch.Tensor, Any]:
    """Log-probs of a response's tokens and, where asked for, the states that predict them."""
    import torch

    ids = torch.tensor([[*prompt, *response]], device=model.device)
    output = model(ids, output_hidden_states=states)
    every = output.logits[0, :-1].float().log_softmax(-1)
    logp = every.gather(-1, ids[0, 1:, None])[-len(response) :, 0]
    return logp, output.hidden_states[-1][0, len(prompt) - 1 : -1] if states else None


def _both(model: Any, pair: Pair) -> Iterator[torch.Tensor]:
    """Log π_w, then log π_l."""
    for response in (pair.chosen, pair.rejected):
        yield _response(model, pair.prompt, response)[0].sum()


def _flat_gradient(model: Any, value: torch.Tensor, keep: bool = False) -> torch.Tensor:
    import torch

    gradient = torch.autograd.grad(value, list(model.parameters()), retain_graph=keep)
    return torch.cat([g.reshape(-1) for g in gradient])


def log_probs(model: Any, pairs: Sequence[Pair], wide: bool = False) -> list[list[float]]:
    """Log π_w and log π_l of every pair (there are no dot products to be ``wide``)."""
    import torch

    with torch.no_grad():
        return [[logp.item() for logp in _both(model, pair)] for pair in pairs]


def forward_scores(
    model: Any, pairs: Sequence[Pair], wide: bool = False
) -> list[tuple[float, float, float]]:
    """Log π_w, log π_l and CHES of every pair, ``wide`` or not."""
    import torch

    found = []
    with torch.no_grad():
        for pair in pairs:
            chosen, states_w = _response(model, pair.prompt, pair.chosen, True)
            rejected, states_l = _response(model, pair.prompt, pair.rejected, True)
            w, l = states_w.sum(0), states_l.sum(0)  # noqa: E741
            found.append((chosen.sum().item(), rejected.sum().item(), (w @ l - w @ w).item()))
    return found


def gradient_scalars(
    model: Any, pairs: Sequence[Pair], wide: bool = False
) -> list[tuple[float, float, float]]:
    """‖g_w‖², ⟨g_w,g_l⟩, ‖g_l‖²; ``wide`` takes the dot products in float64 (as a reference)."""
    found = []
    for pair in pairs:
        flat = [_flat_gradient(model, logp) for logp in _both(model, pair)]
        w, l = (g.double() for g in flat) if wide else flat  # noqa: E741
        found.append(((w @ w).item(), (w @ l).item(), (l @ l).item()))
    return found


def token_kernel(
    model: Any, pairs: Sequence[Pair], tokens: Sequence[int], wide: bool = False
) -> np.ndarray:
    """Inner products of these tokens' gradients in the first pair's chosen response.

    This takes one backward pass a token.
    """
    logp, _ = _response(model, pairs[0].prompt, pairs[0].chosen)
    return _products([_flat_gradient(model, logp[i], keep=True) for i in tokens], wide)


def dataset_kernel(model: Any, pairs: Sequence[Pair], wide: bool = False) -> np.ndarray:
    """Inner products of all responses' gradients, all kept: one backward pass a response."""
    rows = [_flat_gradient(model, logp) for pair in pairs for logp in _both(model, pair)]
    return _products(rows, wide)


def _products(gradients: Sequence[torch.Tensor], wide: bool) -> np.ndarray:
    import torch

    if not wide:
        rows = torch.stack([*gradients])
        return (rows @ rows.T).float().cpu().numpy()
    return np.array([[(a.double() @ b.double()).item() for b in gradients] for a in gradients])


def directional_changes(
    model: Any, pairs: Sequence[Pair], coefficient: float, wide: bool = False
) -> list[list[float]]:
    """⟨∇log π(y), D⟩ of every response, with D = coefficient · mean (g_w - g_l).

    This takes two rounds of backward passes.
    """

    def push(pair: Pair) -> torch.Tensor:
        chosen, rejected = _both(model, pair)
        return _flat_gradient(model, (chosen - rejected) * (coefficient / len(pairs)))

    direction = functools.reduce(operator.add, map(push, pairs))
    direction = direction.double() if wide else direction

    def change(logp: torch.Tensor) -> float:
        return (_flat_gradient(model, logp).to(direction.dtype) @ direction).item()

    return [[change(logp) for logp in _both(model, pair)] for pair in pairs]
