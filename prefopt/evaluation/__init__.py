"""Comparison of models on the same prompts and seeds, and its report."""
