"""Complete a configuration with what a run reads from elsewhere, e.g. the model of its initial checkpoint."""

from __future__ import annotations

from coca_jax import config


def resolve(c: config.Config) -> config.Config:
    """The configuration with its model read from the initial checkpoint, if init.model says so.

    Raises:
      ConfigError: The checkpoint cannot be read, or the number of classes is left to the data, which are not opened.
    """
    config.check(c)
    if c.init.model == "checkpoint":
        from coca_jax import stored  # imports JAX, which takes seconds
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
            "config.model.head.classes=0 takes the number of classes from the data, which are not opened here: set it, "
            "e.g. --config.model.head.classes=1000"
        )
    return c
