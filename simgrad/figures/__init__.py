"""Paper figures, one module each, and their pages.

Each module has ``Config``, ``compute`` and ``plot`` (:mod:`simgrad.figures.gallery`).
"""
