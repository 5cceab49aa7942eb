"""Preference data: rows, and their token ids with every guard."""
