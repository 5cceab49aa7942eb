"""Strict JAX: 64 bits there, no silent dtype or rank promotion."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tests compile much and compute little: the older, quicker emitter of loops, one module, no
# optimised machine code
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

import jax
import matplotlib as mpl

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
mpl.use("agg")
# tracing makes objects by the thousand, few of which are garbage in cycles
gc.set_threshold(100_000)

import pytest
from helpers import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a tiny llama with a word tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _release_compiled_programs():
    """Thousands of compiled programs in one process exhaust the memory maps that Linux allows
    it."""
    yield
    jax.clear_caches()
