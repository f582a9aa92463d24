"""The errors a user can cause. Each message names the file, the tensor where there is one, and the way out."""

__all__ = ["CheckpointError", "ConfigError", "DeltalensError", "PatchError"]


class DeltalensError(ValueError):
    """Base of every error that a user can cause; the command line prints it as one line and exits with 1."""


class CheckpointError(DeltalensError):
    """A checkpoint cannot be read, or two checkpoints cannot be compared."""


class PatchError(DeltalensError):
    """A patch is damaged, or does not fit the source it is applied to."""


class ConfigError(DeltalensError):
    """A training configuration, a task or a dataset cannot be used."""
