"""Paper figures, one module each with ``Config``, ``compute`` and ``plot`` (:mod:`simgrad.figures.gallery`); pages."""
