"""Hugging Face checkpoints, preference data and the scoring engine."""

from simgrad.bridge.checkpoints.export import save
from simgrad.bridge.checkpoints.families import UnsupportedCheckpointError
from simgrad.bridge.checkpoints.mesh import device_mesh
from simgrad.bridge.checkpoints.policy import Policy, load
from simgrad.bridge.checkpoints.words import word_tokenizer
from simgrad.bridge.engine.journal import RunMismatchError
from simgrad.bridge.engine.score import score
from simgrad.bridge.engine.table import ScoreTable
from simgrad.bridge.preferences.rows import Encoded, PreferenceDataError, Skipped, encode, read_rows

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
