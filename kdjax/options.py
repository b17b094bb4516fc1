"""What a config chooses between by name, apart from the libraries that the choices take: a typo is answered at once."""

SCHEDULES = ("step", "cosine", "constant")
"""Of the learning rate, see :func:`kdjax.optim.make_schedule`."""

OPTIMIZERS = ("sgd", "adam", "adamw")
"""See :func:`kdjax.optim.make_optimizer`."""
