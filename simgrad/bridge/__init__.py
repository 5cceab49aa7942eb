"""Hugging Face checkpoints, preference data and the scoring engine."""

from simgrad.bridge.checkpoint import Policy, load
from simgrad.bridge.engine import score
from simgrad.bridge.export import save
from simgrad.bridge.families import UnsupportedCheckpointError
from simgrad.bridge.journal import RunMismatchError
from simgrad.bridge.mesh import device_mesh
from simgrad.bridge.preferences import Encoded, PreferenceDataError, Skipped, encode, read_rows
from simgrad.bridge.table import ScoreTable
from simgrad.bridge.words import word_tokenizer

__all__ = [
    "Encoded",
    "Policy",
    "PreferenceDataError",
    "RunMismatchError",
    "ScoreTable",
    "Skipped",
    "UnsupportedCheckpointError",
    "device_mesh",
    "encode",
    "load",
    "read_rows",
    "save",
    "score",
    "word_tokenizer",
]
