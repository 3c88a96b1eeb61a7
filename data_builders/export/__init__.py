"""What a build writes: tables for training, a summary with a dataset card, a gallery."""
