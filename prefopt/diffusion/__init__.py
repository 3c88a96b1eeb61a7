"""Text-to-image diffusion models: loading, encoding, noising, scoring, sampling."""
