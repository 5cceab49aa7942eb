"""Paper figures (one module each with ``Config``, ``compute`` and ``plot``; see :mod:`simgrad.figures.gallery`) and pages."""
