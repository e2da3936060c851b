"""Parameters to and from other implementations. Knows the model's parameters and no files."""
