"""Errors that a user can cause and mend.

Every message says what was asked, what was found and what to do. The command line prints any `CM3Error`
as one line and leaves with exit code 2; broken invariants inside the code are `assert`s instead.
"""


class CM3Error(ValueError):
    """Parent of every error that is meant for the user."""


class ConfigError(CM3Error):
    """A setting has a wrong value, or contradicts another one."""


class DataError(CM3Error):
    """A data set, document or picture cannot be used as it is."""


class ModelFilesError(CM3Error):
    """A model folder or checkpoint is missing, incomplete, damaged or of another model."""


class RequestError(CM3Error):
    """A request to a model (prompt, picture, box, count) cannot be served."""


class MissingDependencyError(CM3Error, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""
