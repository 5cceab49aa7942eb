"""The same checkpoints in transformers, evaluated in true float64. Needs torch."""

import types

import numpy as np
import torch
import transformers

from golden.cases import CASES, TOKENS, weight


def _exact_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _exact_rotary(rotary, config):
    """Angles in float64: transformers rounds them to float32 whatever the model's dtype."""
    parameters = config.rope_parameters
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept, factor = torch.float, rotary.attention_scaling
    if parameters["rope_type"] in ("default", "dynamic"):
        inverse = parameters["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    else:
        torch.float = torch.float64  # the frequency formulas of transformers, in float64
        torch.Tensor.float, single = torch.Tensor.double, torch.Tensor.float
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
            inverse, factor = compute(config, "cpu")
        finally:
            torch.float, torch.Tensor.float = kept, single
            torch.set_default_dtype(default)
    assert inverse.dtype == torch.float64

    def forward(self, x, position_ids, **_):
        angle = position_ids[..., None].double() * inverse
        angle = torch.cat([angle, angle], -1)
        return angle.cos() * factor, angle.sin() * factor

    rotary.forward = types.MethodType(forward, rotary)


def build(case):
    """Model of a case with its weights, in float64."""
    fields = dict(CASES[case])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        .double()
        .eval()
    )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.tensor(weight(name, tuple(tensor.shape))))
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_exact_norm, module)
    if hasattr(model, "model") and hasattr(model.model, "rotary_emb"):
        _exact_rotary(model.model.rotary_emb, config)
    return model


def evaluate(model):
    """Logits and final hidden states of :data:`TOKENS`."""
    with torch.no_grad():
        output = model(torch.tensor(TOKENS), output_hidden_states=True)
    return output.logits.numpy(), output.hidden_states[-1].numpy()


def shapes(model):
    """Parameter names and shapes, tied ones once."""
    return {name: list(tensor.shape) for name, tensor in model.named_parameters()}


def main():
    """Write the golden files (run as ``python tests/golden/make.py``)."""
    import json
    from pathlib import Path

    for case in CASES:
        model = build(case)
        logits, hidden = evaluate(model)
        target = Path(__file__).parent / f"{case}.npz"
        np.savez_compressed(target, logits=logits, hidden=hidden, shapes=json.dumps(shapes(model)))
        print(target, f"{np.abs(logits).max():.3g}")
