"""TRL's loss types against TRL's own code: value and gradient for every token's log-prob."""

import contextlib
import itertools
import math
import warnings
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax.numpy as jnp
import numpy as np
import pytest

from simgrad.objectives import TRL_LOSS_TYPES, from_trl, get

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo import ORPOConfig
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

PAIRS, PROMPT, LONGEST = 7, 2, 9
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(2, LONGEST + 1, (2, PAIRS))
LENGTHS[0, 0] = LONGEST
MASK = np.arange(LONGEST) < LENGTHS.reshape(-1, 1)
LOG_PROBS = np.where(MASK, -2 * RNG.random((2 * PAIRS, LONGEST)), 0.0)
REFERENCE = LOG_PROBS.sum(1) + RNG.normal(size=2 * PAIRS)


def ours(objective, dtype="float64"):
    """Mean loss, and minus its gradient with respect to the 2n log-probs (chosen first)."""
    logp, reference = (
        jnp.asarray(np.stack([total[:PAIRS], total[PAIRS:]], -1), dtype)
        for total in (LOG_PROBS.sum(1), REFERENCE)
    )
    lengths = jnp.asarray(LENGTHS.T)
    force = objective.force(logp, reference, lengths)
    force = np.concatenate([force[:, 0], force[:, 1]]) / PAIRS
    return float(objective.loss(logp, reference, lengths).mean()), force


def per_token(dtype):
    return torch.tensor(LOG_PROBS, dtype=dtype, requires_grad=True)


def completion_mask():
    return torch.tensor(np.pad(MASK, ((0, 0), (PROMPT, 0))).astype(int))


def fake_model(log_probs):
    """What a model returns to TRL's trainers, a token ahead of the mask; the prompt's are 0."""
    whole = torch.nn.functional.pad(log_probs, (PROMPT - 1, 0))
    zeros = torch.zeros_like(whole)
    outputs = SimpleNamespace(
        log_probs=whole, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    return lambda **_: outputs


def defaults(config, *fields):
    """Of TRL's own dataclass, without constructing it (that would look for a GPU)."""
    made = {f.name: f for f in config.__dataclass_fields__.values()}
    return {name: made[name].default for name in fields}


def trainer(**attributes):
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=MagicMock(),
        _total_train_tokens=0,
        **attributes,
    )


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trl_dpo(loss_types, dtype, **config):
    fields = (
        "beta",
        "label_smoothing",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "use_weighting",
        "ld_alpha",
    )
    options = defaults(DPOConfig, *fields, "loss_weights", "discopop_tau") | config
    self = trainer(
        loss_types=loss_types,
        args=SimpleNamespace(discopop_tau=options.pop("discopop_tau")),
        **options | {"loss_weights": options["loss_weights"] or [1.0] * len(loss_types)},
    )
    log_probs, mask = per_token(dtype), completion_mask()
    reference = torch.tensor(REFERENCE, dtype=dtype)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:PAIRS],
        "ref_rejected_logps": reference[PAIRS:],
    }
    with default_dtype(dtype):  # TRL takes the logarithm of label_smoothing in the default dtype
        loss = DPOTrainer._compute_loss(self, fake_model(log_probs), inputs, return_outputs=False)
    return value_and_force(loss, log_probs)


def value_and_force(loss, log_probs):
    """A sequence's log-prob is the sum of its tokens': each token must feel the same force."""
    (gradient,) = torch.autograd.grad(loss, log_probs)
    gradient = -gradient.numpy()
    np.testing.assert_allclose(
        np.where(MASK, gradient, gradient[:, :1]), np.repeat(gradient[:, :1], LONGEST, 1)
    )
    return loss.item(), gradient[:, 0]


def same(got, expected, rtol=1e-10):
    np.testing.assert_allclose(got[0], expected[0], rtol=rtol)
    np.testing.assert_allclose(
        got[1], expected[1], rtol=rtol, atol=rtol * np.abs(expected[1]).max()
    )


DPO_CASES = [
    *itertools.product(
        [[name] for name in TRL_LOSS_TYPES["dpo"]], [{"label_smoothing": 0.13, "beta": 0.7}]
    ),
    *([[name], {}] for name in TRL_LOSS_TYPES["dpo"] if name != "exo_pair"),
    (["discopop"], {"discopop_tau": 0.6}),
    (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
    (["ipo", "sft", "aot"], {"label_smoothing": 0.2}),
    (["robust"], {"loss_weights": [0.3], "label_smoothing": 0.1}),
]


@pytest.mark.parametrize(("loss_types", "config"), DPO_CASES, ids=str)
def test_dpo_trainer(loss_types, config):
    same(ours(from_trl(loss_types, **config)), trl_dpo(loss_types, torch.float64, **config))


DIVERGENCES = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
SCORED = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm"]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", SCORED)
def test_divergences_of_the_dpo_trainer(loss_type, divergence):
    config = {
        "f_divergence_type": divergence,
        "label_smoothing": 0.1,
        "f_alpha_divergence_coef": 0.3,
    }
    objective = from_trl(loss_type, **config)
    if divergence == "alpha_divergence":  # TRL knows it in single precision only
        same(ours(objective, "float32"), trl_dpo([loss_type], torch.float32, **config), 2e-5)
    else:
        same(ours(objective), trl_dpo([loss_type], torch.float64, **config))
    plain = ours(from_trl(loss_type, **config | {"f_divergence_type": "reverse_kl"}))[0]
    assert (ours(objective)[0] == plain) == (divergence == "reverse_kl" or loss_type == "sft")


@pytest.mark.parametrize("alpha", [1.0, 1.0 + 1e-7, 0.0, 2.5])
def test_alpha_divergence_at_its_limits(alpha):
    config = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    same(
        ours(from_trl("sigmoid", **config), "float32"),
        trl_dpo(["sigmoid"], torch.float32, **config),
        2e-5,
    )


def trl_cpo(loss_type, **config):
    names = ("beta", "label_smoothing", "cpo_alpha", "simpo_gamma", "alpha")
    options = defaults(CPOConfig, *names) | config
    stub = SimpleNamespace(loss_type=loss_type, **options)
    if loss_type == "alphapo":
        stub.loss_type, stub.cpo_alpha = "simpo", 0.0
    self = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x), **vars(stub)
    )
    self.aux_loss_enabled = False
    log_probs = per_token(torch.float64)
    totals = log_probs.sum(1)
    if self.loss_type in ("ipo", "simpo"):
        totals = totals / torch.tensor(LENGTHS.reshape(-1))
    nll = -log_probs[:PAIRS].sum() / LENGTHS[0].sum()
    logits = torch.zeros(1)
    self.cpo_loss = lambda *x: CPOTrainer.cpo_loss(self, *x)
    self.concatenated_forward = lambda *_: (totals[:PAIRS], totals[PAIRS:], logits, logits, nll)
    loss, _ = CPOTrainer.get_batch_loss_metrics(self, None, {})
    return value_and_force(loss, log_probs)


@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES["cpo"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"label_smoothing": 0.2, "beta": 0.8, "simpo_gamma": 0.9},
        {"alpha": 0.25, "beta": 0.4, "label_smoothing": 0.1, "cpo_alpha": 0.5},
        {"cpo_alpha": 0.0, "alpha": -0.2},
    ],
    ids=str,
)
def test_cpo_trainer(loss_type, config):
    same(ours(from_trl(loss_type, trainer="cpo", **config)), trl_cpo(loss_type, **config))


def test_cpo_and_orpo_take_their_log_probs_as_assumed():
    """Means for ipo and simpo (CPO) and for ORPO; NLL per token, in ORPO over the prompt too."""
    vocabulary, batch, size = 5, 3, 6
    logits = torch.tensor(RNG.normal(size=(2 * batch, size, vocabulary)))
    ids = torch.tensor(RNG.integers(0, vocabulary, (2 * batch, size)))
    labels = ids.clone()
    labels[:, :2] = -100
    shared = {
        "concatenated_input_ids": ids,
        "concatenated_attention_mask": torch.ones_like(ids),
        "concatenated_labels": labels,
    }
    log_probs = torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    response = log_probs[:, 1:]
    for kind, loss_type in (
        (CPOTrainer, "sigmoid"),
        (CPOTrainer, "simpo"),
        (CPOTrainer, "ipo"),
        (ORPOTrainer, ""),
    ):
        self = SimpleNamespace(
            concatenated_inputs=lambda *_, **__: {k: v.clone() for k, v in shared.items()},
            accelerator=SimpleNamespace(device="cpu"),
            is_encoder_decoder=False,
            pad_token_id=0,
            padding_value=0,
            aux_loss_enabled=False,
            cpo_alpha=1.0,
            loss_type=loss_type,
            get_batch_logps=kind.get_batch_logps,
        )
        model = lambda *_, **__: SimpleNamespace(logits=logits)  # noqa: E731
        chosen, rejected, _, _, nll = kind.concatenated_forward(
            self, model, {"chosen_labels": labels[:batch]}
        )
        total = response.mean(1) if loss_type != "sigmoid" else response.sum(1)
        np.testing.assert_allclose(torch.cat([chosen, rejected]), total)
        trained = response[:batch] if kind is CPOTrainer else log_probs[:batch]
        np.testing.assert_allclose(nll, -trained.mean())


def trl_orpo(beta):
    metrics = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    self = SimpleNamespace(beta=beta, accelerator=metrics, aux_loss_enabled=False)
    log_probs = per_token(torch.float32)  # odds_ratio_loss casts to it anyway
    totals = log_probs.sum(1) / torch.tensor(LENGTHS.reshape(-1), dtype=torch.float32)
    nll = -log_probs[:PAIRS].sum() / LENGTHS[0].sum()
    self.odds_ratio_loss = lambda *x: ORPOTrainer.odds_ratio_loss(self, *x)
    logits = torch.zeros(1)
    self.concatenated_forward = lambda *_: (totals[:PAIRS], totals[PAIRS:], logits, logits, nll)
    loss, _ = ORPOTrainer.get_batch_loss_metrics(self, None, {})
    return value_and_force(loss, log_probs)


@pytest.mark.parametrize("config", [{}, {"beta": 2.0}], ids=str)
def test_orpo_trainer(config):
    expected = trl_orpo(**defaults(ORPOConfig, "beta") | config)
    same(ours(from_trl("orpo", trainer="orpo", **config), "float32"), expected, 2e-5)
    assert expected[0] > 0


def trl_kto(loss_type, kl_logps, ref_kl, **config):
    """All pairs in one batch of 2n labelled responses, in mixed order."""
    options = defaults(KTOConfig, "beta", "desirable_weight", "undesirable_weight") | config
    order = RNG.permutation(2 * PAIRS)
    log_probs = per_token(torch.float64)
    self = trainer(loss_type=loss_type, calculate_KL=loss_type == "kto", **options)
    self._compute_kl_logps = lambda *_: kl_logps if self.calculate_KL else None
    mask = completion_mask()[order]
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor(order < PAIRS),
        "ref_logps": torch.tensor(REFERENCE)[order],
        "ref_KL_logps": ref_kl,
    }
    loss = KTOTrainer._compute_loss(
        self, fake_model(log_probs[order]), inputs, return_outputs=False
    )
    return value_and_force(loss, log_probs)


@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES["kto"])
@pytest.mark.parametrize("shift", [0.8, -0.8])
@pytest.mark.parametrize(
    "config", [{}, {"beta": 0.6, "desirable_weight": 1.4, "undesirable_weight": 0.3}], ids=str
)
def test_kto_trainer(loss_type, shift, config):
    ref_kl = torch.tensor(RNG.normal(size=2 * PAIRS))
    expected = trl_kto(loss_type, ref_kl + shift, ref_kl, **config)
    same(ours(from_trl(loss_type, trainer="kto", kl=max(shift, 0.0), **config)), expected)


@pytest.mark.parametrize(
    ("trainer", "config"),
    [("dpo", DPOConfig), ("cpo", CPOConfig), ("orpo", ORPOConfig), ("kto", KTOConfig)],
)
def test_defaults_and_loss_types_are_those_of_trl(trainer, config):
    from simgrad.objectives.trl import _DEFAULTS

    fields = {k: v for k, v in _DEFAULTS[trainer].items() if k != "kl"}
    assert fields == defaults(config, *fields)
    choices = config.__dataclass_fields__.get("loss_type")
    if choices is None:
        assert trainer == "orpo"
    elif "choices" in choices.metadata:
        assert set(choices.metadata["choices"]) == set(TRL_LOSS_TYPES[trainer])
    else:
        documented = choices.metadata["help"]
        assert all(f"`'{name}'`" in documented for name in TRL_LOSS_TYPES[trainer])
        assert documented.count("`'") == len(TRL_LOSS_TYPES[trainer])


def test_names_with_a_prefix_are_trls():
    assert get("trl:ipo", beta=0.3) == from_trl("ipo", beta=0.3)
    assert get("trl:cpo/simpo") == from_trl("simpo", trainer="cpo")
    assert math.isclose(ours(get("trl:kto/apo_zero_unpaired"))[0], ours(get("apo_zero"))[0] / 2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: from_trl("sigmoid", trainer="ppo"), "trainer"),
        (
            lambda: from_trl("simpo"),
            "unknown loss type 'simpo' of TRL's dpo trainer; did you mean 'trl:cpo/simpo'\\?",
        ),
        (
            lambda: from_trl("sigmoid", lr=1.0),
            "TRL's dpo loss has no option lr; it takes: beta, label_smoothing",
        ),
        (lambda: from_trl("sigmoid", cpo_alpha=1.0), "no option cpo_alpha"),
        (
            lambda: from_trl("sigmoid", use_weighting=True),
            "use_weighting .WPO. needs whole next-token distributions",
        ),
        (lambda: from_trl("sigmoid", ld_alpha=0.5), "ld_alpha .LD-DPO. splits responses"),
        (
            lambda: from_trl("sigmoid", f_divergence_type="js"),
            "unknown f_divergence_type 'js'; there are: reverse_kl",
        ),
        (
            lambda: from_trl("nca_pair", f_divergence_type="forward_kl"),
            "f_divergence_type is only for",
        ),
        (
            lambda: from_trl(["sigmoid", "sft"], loss_weights=[1.0]),
            "loss_weights: 1 for 2 loss types",
        ),
        (lambda: from_trl(["sigmoid", "ipo"], trainer="cpo"), "takes one loss type, got 2"),
        (lambda: from_trl([]), "no loss type"),
        (lambda: from_trl("exo_pair"), "epsilon must lie in"),
        (lambda: get("trl:sigmod"), "unknown loss type 'sigmod'"),
        (lambda: get("trl:xpo/sigmoid"), "trainer"),
    ],
)
def test_mistakes_are_named(call, text):
    with pytest.raises(Exception, match=text):
        call()
