"""What test_mesh.py runs in processes of its own: four devices in one process, and two processes
of one device.

    python mesh_runs.py devices FOLDER
    python mesh_runs.py process FOLDER PORT NUMBER

FOLDER holds the checkpoints, and gets the score tables and findings.
"""

import json
import os
import sys
from pathlib import Path

CHECKPOINTS = ("gqa", "tied", "gpt2")
MESHES = {"gqa": [(4, 1), (2, 2)], "tied": [(1, 4)], "gpt2": [(2, 2)]}
SPLIT = {  # of each leaf that is split on (2, 2): the axis
    "layers/attention/query/kernel": 2,
    "layers/attention/key/kernel": 2,
    "layers/attention/value/kernel": 2,
    "layers/attention/output/kernel": 1,
    "layers/mlp/gate/kernel": 2,
    "layers/mlp/up/kernel": 2,
    "layers/mlp/down/kernel": 1,
    "embedding/table": 1,  # 37 tokens are no multiple of 2
    "unembedding/table": 1,
}
MODE = sys.argv[1] if __name__ == "__main__" else None
if MODE == "devices":
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    )

import jax
import numpy as np
import pytest

import simgrad
from simgrad import tree
from simgrad.bridge import RunMismatchError, device_mesh, predict
from simgrad.bridge.checkpoints import weights
from simgrad.bridge.checkpoints.mesh import mesh_of
from simgrad.bridge.engine.score import score
from simgrad.dynamics import RunConfig
from simgrad.pairs import Pair

PAIRS = [  # two shapes, and counts that neither 2 nor 4 divides
    Pair([1, 5, 3], [7, 2, 7, 1], [8, 9, 2]),
    Pair([1], [7], [8, 5]),
    Pair([4, 4, 4, 4], [4, 4, 2], [4, 2]),
    Pair([2, 6], [3, 9, 10, 11, 12], [5, 9, 10, 11, 12]),
    Pair([9, 9, 1], [3, 2], [6, 6, 6, 2]),
    Pair([3] * 9, [5] * 8, [5, 6, 5]),
    Pair([3] * 12, [2] * 6, [5, 7]),
]


class Interrupted(Exception):
    """The run ends here."""


def observed(folder, mesh=None):
    """A policy, and the sizes of the parts that were read for it."""
    parts, read = [], weights._Tensor.read

    def noted(self, index, out):
        parts.append(out.nbytes)
        read(self, index, out)

    weights._Tensor.read = noted
    policy = simgrad.load(folder, "float64", mesh=mesh)
    weights._Tensor.read = read
    return policy, parts


def devices(folder):
    """Tables of every checkpoint on one device and on meshes; what was read and where it lies."""
    for name in CHECKPOINTS:
        whole, parts = observed(folder / name)
        size = sum(x.nbytes for x in jax.tree.leaves(whole.theta))
        assert sum(parts) == size
        score(whole, PAIRS, learning_rate=0.1, out=folder / f"{name}.parquet")
        for data, model in MESHES[name]:
            mesh = device_mesh(data, model)
            policy, parts = observed(folder / name, mesh)
            assert mesh_of(policy.theta) == mesh
            assert sum(parts) == size  # parts that are on several devices are read once
            for path, one, split in zip(
                tree.names(whole.theta),
                jax.tree.leaves(whole.theta),
                jax.tree.leaves(policy.theta),
                strict=True,
            ):
                np.testing.assert_array_equal(one, split)
                if (name, data) == ("gqa", 2):
                    shape = list(one.shape)
                    if path in SPLIT:
                        shape[SPLIT[path]] //= 2
                    assert {s.data.shape for s in split.addressable_shards} == {tuple(shape)}, path
            score(policy, PAIRS, learning_rate=0.1, out=folder / f"{name}-{data}-{model}.parquet")
    for mine, other in ((policy, "gpt2"), (whole, "gpt2-2-2")):  # what is there is of another mesh
        with pytest.raises(RunMismatchError, match="another run .mesh: .*data=2,model=2"):
            score(mine, PAIRS, learning_rate=0.1, out=folder / f"{other}.parquet")
    score(whole, PAIRS, gradients=False, out=folder / "forward.parquet")
    score(policy, PAIRS, gradients=False, out=folder / "forward-2-2.parquet")
    run = RunConfig(optimizer="adam", learning_rate=1e-3, steps=3, batch_size=3)
    predict(whole, PAIRS, run, out=folder / "predicted.parquet")
    predict(policy, PAIRS, run, out=folder / "predicted-2-2.parquet")


def process(folder, port, number):
    """An interrupted and continued run, an uninterrupted one, and failures that all processes must
    hear of."""
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    policy, parts = observed(folder / "gqa", device_mesh(model=2))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(policy.theta))
    found = {
        "read": sum(parts),
        "held": held,
        "size": sum(x.nbytes for x in jax.tree.leaves(policy.theta)),
    }

    def failure(*args, **kwargs):
        try:
            score(*args, **kwargs)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def interrupt(done, total):
        if done >= 3:
            raise Interrupted

    out = folder / "two.parquet"
    arguments = {"learning_rate": 0.1, "out": out, "batch_tokens": 1}
    found["interrupted"] = failure(policy, PAIRS, **arguments, progress=interrupt)
    seen = []
    table = score(policy, PAIRS, **arguments, progress=lambda done, total: seen.append(done))
    found["seen"] = seen
    table.save(folder / f"two-of-process-{number}.parquet")
    score(policy, PAIRS, **arguments).save(folder / f"again-of-process-{number}.parquet")
    found["arguments"] = failure(policy, PAIRS, learning_rate=0.1 + number)
    found["data"] = failure(policy, PAIRS if number == 0 else str(folder / "none.jsonl"))
    found["out"] = failure(policy, PAIRS, out=folder / "alien.parquet")
    (folder / f"found-{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if MODE == "devices":
        devices(Path(sys.argv[2]))
    else:
        process(Path(sys.argv[2]), *map(int, sys.argv[3:]))
