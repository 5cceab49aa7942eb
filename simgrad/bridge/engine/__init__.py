"""From rows to numbers: planned by length, resumable, on any mesh."""
