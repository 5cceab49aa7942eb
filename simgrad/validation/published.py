"""The published pair-scoring procedure, written plainly in PyTorch: the benchmark's comparison.

Forward: one full-logit forward a response, one response at a time (as the CHES scripts do).
Gradients: one full backward a response, or a token, gradients flattened to vectors, dot products of
those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from simgrad.pairs import Pair


def random_model(shape: dict[str, Any], max_length: int, seed: int = 0) -> Any:
    """A random-weight transformers GPT-2 (with a gated MLP, a Llama), in evaluation mode."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    width, depth, heads, vocab_size = (
        shape[name] for name in ("width", "depth", "heads", "vocab_size")
    )
    if shape.get("mlp") != "gated":
        gpt2 = GPT2Config(
            vocab_size=vocab_size, n_positions=max_length, n_embd=width, n_layer=depth, n_head=heads
        )
        return GPT2LMHeadModel(gpt2).eval()
    llama = LlamaConfig(
        vocab_size=vocab_size,
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
    logp = (
        output.logits[0, :-1]
        .float()
        .log_softmax(-1)
        .gather(-1, ids[0, 1:, None])[-len(response) :, 0]
    )
    return logp, output.hidden_states[-1][0, len(prompt) - 1 : -1] if states else None


def _flat_gradient(model: Any, value: torch.Tensor, keep: bool = False) -> torch.Tensor:
    import torch

    gradient = torch.autograd.grad(value, list(model.parameters()), retain_graph=keep)
    return torch.cat([g.reshape(-1) for g in gradient])


def log_probs(model: Any, pair: Pair) -> tuple[float, float]:
    """Log π_w and log π_l."""
    import torch

    with torch.no_grad():
        chosen, rejected = (
            _response(model, pair.prompt, r)[0].sum().item() for r in (pair.chosen, pair.rejected)
        )
        return chosen, rejected


def forward_scores(model: Any, pair: Pair) -> tuple[float, float, float]:
    """Log π_w, log π_l and CHES."""
    import torch

    with torch.no_grad():
        chosen, states_w = _response(model, pair.prompt, pair.chosen, True)
        rejected, states_l = _response(model, pair.prompt, pair.rejected, True)
        w, l = states_w.sum(0), states_l.sum(0)  # noqa: E741
        return chosen.sum().item(), rejected.sum().item(), (w @ l - w @ w).item()


def gradient_scalars(model: Any, pair: Pair, wide: bool = False) -> tuple[float, float, float]:
    """‖g_w‖², ⟨g_w,g_l⟩, ‖g_l‖²; ``wide`` takes the dot products in float64 (as a reference)."""
    flat = [
        _flat_gradient(model, _response(model, pair.prompt, r)[0].sum())
        for r in (pair.chosen, pair.rejected)
    ]
    w, l = (g.double() for g in flat) if wide else flat  # noqa: E741
    return (w @ w).item(), (w @ l).item(), (l @ l).item()


def token_kernel(model: Any, pair: Pair, tokens: Sequence[int], wide: bool = False) -> np.ndarray:
    """Inner products of these chosen-response tokens' gradients: one backward pass a token."""
    import torch

    logp, _ = _response(model, pair.prompt, pair.chosen)
    rows = torch.stack([_flat_gradient(model, logp[i], keep=True) for i in tokens])
    return _products(rows, wide)


def dataset_kernel(model: Any, pairs: Sequence[Pair], wide: bool = False) -> np.ndarray:
    """Inner products of all responses' gradients, all kept: one backward pass a response."""
    import torch

    responses = [(p.prompt, r) for p in pairs for r in (p.chosen, p.rejected)]
    rows = torch.stack(
        [_flat_gradient(model, _response(model, x, r)[0].sum()) for x, r in responses]
    )
    return _products(rows, wide)


def _products(rows: torch.Tensor, wide: bool) -> np.ndarray:
    if not wide:
        return (rows @ rows.T).float().cpu().numpy()
    return np.array([[(a.double() @ b.double()).item() for b in rows] for a in rows])


def directional_changes(
    model: Any, pairs: Sequence[Pair], coefficient: float, wide: bool = False
) -> list[tuple[float, float]]:
    """⟨∇log π(y), D⟩ of every response, with D = coefficient · mean (g_w - g_l).

    This takes two rounds of backward passes.
    """
    direction = None
    for pair in pairs:
        chosen, rejected = (
            _response(model, pair.prompt, r)[0].sum() for r in (pair.chosen, pair.rejected)
        )
        step = _flat_gradient(model, (chosen - rejected) * (coefficient / len(pairs)))
        direction = step if direction is None else direction + step
    assert direction is not None
    direction = direction.double() if wide else direction

    def change(prompt: Sequence[int], response: Sequence[int]) -> float:
        gradient = _flat_gradient(model, _response(model, prompt, response)[0].sum())
        return (gradient.to(direction.dtype) @ direction).item()

    return [(change(p.prompt, p.chosen), change(p.prompt, p.rejected)) for p in pairs]
