"""Pages about a scored data set: numbers, words, charts, page."""
