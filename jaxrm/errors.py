"""The one error that a person is meant to read: where, what was found, what is required, what to type."""


class UserError(ValueError):
    """A mistake in what the user gave: shown as one line, without a traceback, with exit status 2.

    The message says where it is, what was found there, what is required, and what to type instead, e.g.
    ``config.data.batch_size is 30, but the data axis has 8 devices; use a multiple of 8, e.g.
    --config.data.batch_size=32``. It is raised before any device work and before anything is written.
    """
