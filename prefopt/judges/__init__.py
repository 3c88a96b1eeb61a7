"""Judges: what gives an image, beside its prompt, a number."""
