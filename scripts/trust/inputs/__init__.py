"""Tables of bad inputs, each a file with `trials(world)`."""
