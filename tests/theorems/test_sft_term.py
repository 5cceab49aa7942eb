"""An added loss -λ log π(y⁺) adds λ ‖∇ log π(y⁺)‖² ≥ 0 to d/dt log π(y⁺), in any model.

Counter-example: it is the chosen response itself that must be added; -λ log π of another one may
push y⁺ down.
"""

import jax
import numpy as np
from helpers import close
from oracles import ALL, OTHER_PROMPT, dot, gradient, minus_dpo_gradient, parameters, states

from simgrad.theory.closed_forms.unconstrained import sft_rate, state_kernel

jitted_kernel = jax.jit(state_kernel)


def test_sft_term_only_helps():
    """-λ log π⁺ beside the preference loss adds λ ‖∇ log π⁺‖² to the flow of log π⁺."""
    for seed, (chosen, rejected) in enumerate(ALL):
        theta = parameters(seed)
        g = gradient(theta, *chosen)
        direction, _ = minus_dpo_gradient(theta, chosen, rejected)
        both = jax.tree.map(lambda d, x: d + 0.25 * x, direction, g)
        kernel = jitted_kernel(theta["w"], states(theta, *chosen), states(theta, *rejected))
        close(sft_rate(kernel, 0.25), dot(g, both) - dot(g, direction))
        assert sft_rate(kernel, 0.25) > 0


def test_sft_on_another_response_may_push_the_chosen_down():
    """Another answer to the same prompt, or an answer to another prompt: the sign is that of ⟨g_w,
    g_other⟩."""
    for same_prompt in (True, False):
        signs = set()
        for seed in range(20):
            for chosen, rejected in ALL[:3]:
                theta = parameters(seed)
                other = (chosen[0][:1], (0,)) if same_prompt else OTHER_PROMPT[0]
                g = gradient(theta, *chosen)
                added = 0.25 * dot(g, gradient(theta, *other))
                kernel = jitted_kernel(theta["w"], states(theta, *chosen), states(theta, *rejected))
                assert not np.isclose(added, sft_rate(kernel, 0.25), rtol=1e-3)
                signs.add(added > 0)
        assert signs == {True, False}
