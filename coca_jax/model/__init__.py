"""What is computed: the CoCa model. Knows nothing of data, optimisers or files."""
