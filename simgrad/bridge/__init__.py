"""Hugging Face checkpoints, preference data and the scoring engine."""

from simgrad.bridge.checkpoints.export import save
from simgrad.bridge.checkpoints.families import UnsupportedCheckpointError
from simgrad.bridge.checkpoints.mesh import device_mesh
from simgrad.bridge.checkpoints.policy import Policy, load
from simgrad.bridge.checkpoints.words import word_tokenizer
from simgrad.bridge.engine.predict import check, predict
from simgrad.bridge.engine.score import score
from simgrad.bridge.engine.table import ScoreTable
from simgrad.bridge.preferences.encoding import Encoded, Skipped, encode
from simgrad.bridge.preferences.rows import PreferenceDataError, read_rows
from simgrad.errors import InputError
from simgrad.store import RunMismatchError

__all__ = [
    "Encoded",
    "InputError",
    "Policy",
    "PreferenceDataError",
    "RunMismatchError",
    "ScoreTable",
    "Skipped",
    "UnsupportedCheckpointError",
    "check",
    "device_mesh",
    "encode",
    "load",
    "predict",
    "read_rows",
    "save",
    "score",
    "word_tokenizer",
]
