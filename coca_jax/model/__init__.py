"""The CoCa model: modules and parameters. Independent of data, optimizers and files."""
