"""Preferences for text-to-image and vision-language models: making them, and training on them."""
