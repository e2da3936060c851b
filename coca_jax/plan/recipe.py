"""What a recipe leaves to its run: the model of the checkpoint that it begins with, and the number of classes."""

from __future__ import annotations

from coca_jax import config


def as_it_will_run(c: config.Config) -> config.Config:
    """The configuration with what a run takes from elsewhere: the model of the checkpoint that it begins with.

    Raises:
      ConfigError: that cannot be read, or the number of classes is left to data, which are not opened here.
    """
    config.check(c)
    if c.init.model == "checkpoint":
        from coca_jax import stored  # loads JAX, which takes seconds
        from coca_jax.data.records import DataError
        from coca_jax.interop import matching
        from coca_jax.interop.weights import ConversionError
        from coca_jax.train.checkpoint import CheckpointError

        try:
            found = stored.read_config(c.init.checkpoint)
            c = matching.adopt(c, found.model, found.data)
        except (CheckpointError, ConversionError, DataError, config.ConfigError) as error:
            raise config.ConfigError(f"config.init.checkpoint={c.init.checkpoint!r}: {error}") from error
    if c.loss.lambda_cls and not c.model.head.classes:
        raise config.ConfigError(
            "config.model.head.classes=0 stands for as many as the data have labels, and the data are not opened here: "
            "set it to their number, e.g. --config.model.head.classes=1000"
        )
    return c
