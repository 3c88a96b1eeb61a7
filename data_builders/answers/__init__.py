"""What makes answers of a vision-language model, and preferences between them."""
