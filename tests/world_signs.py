"""Small experiments of the transformer worlds, for a process of its own (lightly optimised code,
two devices)."""

import json
import os
import sys

if (
    __name__ == "__main__"
):  # collecting doctests imports this file, and must leave the suite's flags alone
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=2 --xla_cpu_use_fusion_emitters=false "
        "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_optimization_level=1"
    )

import numpy as np

from simgrad import experiments, worlds
from simgrad.experiments.comparison import compare
from simgrad.experiments.refusals import measured, unfiltered
from simgrad.experiments.verdicts import displaced

SEEDS = [101, 102]


def verdicts():
    world = worlds.get("verdicts")
    strong, mild = (displaced(world, SEEDS, a, "Never") for a in ("No", "Yes"))
    return {
        "moved": [row["moved to opposite"] for row in strong],
        "agrees": [row["top agrees"] for row in strong],
        "mild": [row["moved to opposite"] for row in mild],
    }


def suffix():
    found = experiments.run(worlds.get("suffix", lengths=(0, 8), n_pairs=16), SEEDS)
    short, long = (found["lengths"].where(L=n) for n in (0, 8))
    right = found["predictions"].where(L=8)
    return {
        "cosine": [float(x["cosine"].mean()) for x in (short, long)],
        "change": [float(x["Δ chosen"].mean()) for x in (short, long)],
        "word": float(long["Δ word"].min()),
        "batch right": float(right["batch right"].mean()),
        "own right": float(right["own right"].mean()),
    }


def refusals():
    world = worlds.get("refusals")
    arms = ("DPO", "random preferences", "SFT term 0.1")

    def few(*given):
        return [arm for arm in unfiltered(*given) if arm.name in arms]

    rows = measured(world, SEEDS, few)
    rates = {
        arm: [r["refuses harmful"] for r in rows if r["arm"] == arm] for arm in ("start", *arms)
    }
    rolled = world.with_knobs(rollouts=True, n_pairs=40)
    pairs = rolled.pairs(SEEDS[0])
    openings = range(world.first_answer, world.first_answer + 12)
    return {**rates, "rolled openings": [p.chosen[0] in openings for p in pairs]}


def percentiles():
    world = worlds.get("percentiles", n_pairs=32)
    ((apply, theta),) = world.each_policy(SEEDS[:1])
    setting = world.settings(apply, theta, SEEDS[0])["together, Adam"]
    found = compare(setting, ["CHES", "directional", "kernel flow, ray"])
    return {row["predictor"]: row["spearman"] for row in found.rows("Adam")}


if __name__ == "__main__":
    runs = {f.__name__: f for f in (verdicts, suffix, refusals, percentiles)}
    found = runs[sys.argv[1]]()
    print(json.dumps(found, default=lambda x: x.item() if isinstance(x, np.generic) else str(x)))
