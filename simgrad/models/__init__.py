"""Models behind one call: ``apply(theta, tokens, ...) -> Output(logits, hidden)``."""

from simgrad.models.binding import Bound, bind, only
from simgrad.models.cache import Cache, Rereading, cached
from simgrad.models.config import InitScales, ModelConfig, Rope
from simgrad.models.context import ContextApply, contexts_of, linear_softmax, unconstrained_features
from simgrad.models.likelihood import Responses, prediction_error, responses, sequence_logp
from simgrad.models.lora import LoraApply, add_lora, merge_lora
from simgrad.models.output import Apply, CachedApply, Inputs, Memory, Output, TappedApply, Use
from simgrad.models.transformer import Transformer, TransformerApply, init_transformer
from simgrad.typing import Theta

__all__ = [
    "Apply",
    "Bound",
    "Cache",
    "CachedApply",
    "ContextApply",
    "InitScales",
    "Inputs",
    "LoraApply",
    "Memory",
    "ModelConfig",
    "Output",
    "Rereading",
    "Responses",
    "Rope",
    "TappedApply",
    "Transformer",
    "TransformerApply",
    "Use",
    "add_lora",
    "bind",
    "cached",
    "contexts_of",
    "create",
    "init_transformer",
    "linear_softmax",
    "merge_lora",
    "only",
    "prediction_error",
    "responses",
    "sequence_logp",
    "unconstrained_features",
]


def create(config: ModelConfig, seed: int = 0) -> tuple[TransformerApply, Theta]:
    """A random transformer as ``(apply, theta)``.

    >>> apply, theta = create(ModelConfig(vocab_size=11, width=8, depth=2, heads=2))
    >>> theta["layers"]["attention"]["query"]["kernel"].shape
    (2, 8, 8)
    """
    return TransformerApply(config), init_transformer(config, seed)
