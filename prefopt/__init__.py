"""Preferences for text-to-image and vision-language models: making them, and training on them."""

import logging

# It warns at every import that a 4-bit kernel for CPUs is not installed, used or not.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
