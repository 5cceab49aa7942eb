"""What is trained, chosen in one place: a model at θ, with the trained parameters told apart."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TypeVar

import jax

from simgrad import tree
from simgrad.models.likelihood import responses
from simgrad.models.output import Apply
from simgrad.pairs import Batch
from simgrad.typing import Array, Float, Theta

_A = TypeVar("_A", bound=Apply)


def only(apply: _A, *patterns: str) -> _A:
    """The model with only the named parameters trained, of those that it trains at all.

    Every function of ``(apply, theta, …)`` then means these parameters: kernels, steps, runs.

    Args:
        apply: any model.
        *patterns: ``fnmatch`` patterns of paths, ``!`` before one excludes: ``"layers/*"``,
            ``"!layers/mlp/*"``. Names replace those of an earlier choice; exclusions add up, the
            model's own among them (fixed features, the parameters below adapters).

    Raises:
        ValueError: something other than texts.

    >>> from simgrad.models import ModelConfig, create
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> tree.names(bind(only(apply, "*norm/scale"), theta).trained)
    ['final_norm/scale', 'layers/attention_norm/scale', 'layers/mlp_norm/scale']
    """
    if wrong := [p for p in patterns if not isinstance(p, str)]:
        raise ValueError(
            f"patterns are texts such as 'layers/*', one argument each: got {wrong[0]!r}"
        )
    kept = tuple(p for p in apply.trainable if p.startswith("!"))
    return dataclasses.replace(apply, trainable=(*kept, *patterns))  # type: ignore[type-var]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["trained", "rest"], meta_fields=["apply"]
)
@dataclass(frozen=True)
class Bound:
    """A model at θ. In either tree the other's leaves are None.

    Attributes:
        apply: the model.
        trained: the parameters that are trained.
        rest: the others.
    """

    apply: Apply
    trained: Theta
    rest: Theta

    def whole(self, trained: Theta) -> Theta:
        """All parameters, with these trained ones."""
        return tree.combine(trained, self.rest)

    def logp(self, trained: Theta, batch: Batch) -> Float[Array, "B 2"]:
        """Log π of both responses of every pair as a function of the trained parameters, in nats.

        It can be differentiated in any mode.
        """
        return responses(self.apply, self.whole(trained), batch).logp

    def token_logp(self, trained: Theta, batch: Batch) -> Float[Array, "B 2 R"]:
        """The same token by token."""
        return responses(self.apply, self.whole(trained), batch).token_logp

    def require_step(self, step: Theta) -> None:
        """Refuse a step in other parameters than those that are trained."""
        if jax.tree.structure(step) != jax.tree.structure(self.trained):
            raise ValueError(
                "step is no tree of the trained parameters: give the model (simgrad.models.only) "
                "that it was made with"
            )


def bind(apply: Apply, theta: Theta) -> Bound:
    """Tell the trained parameters from the rest, as ``apply.trainable`` says.

    >>> from simgrad.models import linear_softmax
    >>> from simgrad.pairs import Pair, padded
    >>> pairs = [Pair([1, 2], [3], [4, 5])]
    >>> model = bind(*linear_softmax(pairs, 9, 4))
    >>> tree.names(model.trained), model.logp(model.trained, padded(pairs)).shape
    (['unembedding/table'], (1, 2))

    Raises:
        ValueError: a pattern that matches nothing; nothing that is trained.
    """
    return Bound(apply, *tree.partition(theta, apply.trainable))
