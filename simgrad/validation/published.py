"""The published procedure for scoring a pair, written plainly in PyTorch: what the benchmark compares with.

Forward: one full-logit forward a response, one response at a time (as the CHES scripts do). Gradients:
one full backward a response, gradients flattened to a vector, three dot products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from simgrad.pairs import Pair

__all__ = ["forward_scores", "gradient_scalars", "random_gpt2"]


def random_gpt2(width: int, depth: int, heads: int, vocab_size: int, max_length: int, seed: int = 0) -> Any:
    """A GPT-2 of transformers with random weights, in evaluation mode."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    shape = GPT2Config(vocab_size=vocab_size, n_positions=max_length, n_embd=width, n_layer=depth, n_head=heads)
    return GPT2LMHeadModel(shape).eval()


def _response(model: Any, prompt: Sequence[int], response: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of a response and the states that predict its tokens."""
    import torch

    ids = torch.tensor([[*prompt, *response]])
    output = model(ids, output_hidden_states=True)
    logp = output.logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-len(response) :].sum()
    return logp, output.hidden_states[-1][0, len(prompt) - 1 : -1]


def forward_scores(model: Any, pair: Pair) -> tuple[float, float, float]:
    """Log π_w, log π_l and CHES."""
    import torch

    with torch.no_grad():
        chosen, states_w = _response(model, pair.prompt, pair.chosen)
        rejected, states_l = _response(model, pair.prompt, pair.rejected)
        w, l = states_w.sum(0), states_l.sum(0)  # noqa: E741
        return chosen.item(), rejected.item(), (w @ l - w @ w).item()


def gradient_scalars(model: Any, pair: Pair, wide: bool = False) -> tuple[float, float, float]:
    """‖g_w‖², ⟨g_w,g_l⟩, ‖g_l‖²; ``wide`` takes the dot products in float64 (as a reference)."""
    import torch

    parameters = list(model.parameters())
    flat = []
    for response in (pair.chosen, pair.rejected):
        logp, _ = _response(model, pair.prompt, response)
        flat.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(logp, parameters)]))
    w, l = (g.double() for g in flat) if wide else flat  # noqa: E741
    return (w @ w).item(), (w @ l).item(), (l @ l).item()
