"""Paper figures, one module each with ``Config``, ``compute`` and ``plot``.

The list of them, and how they are drawn and saved: :mod:`simgrad.figures.gallery`.
"""
