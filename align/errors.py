"""The typed errors that a user can meet, each one message: what was wrong, the value seen, where, the remedy.

`exit_code` is what `align` exits with: 2 for a mistake in the call, the config or the data that the user names,
1 for a run that failed. All are picklable, since they travel from a Ray worker to the driver: their only state is
the message.
"""

DIVERGED = "the training has diverged: lower its learning rate, and start the stage anew with --fresh"


class AlignError(Exception):
    """A run failed in a way that we can name."""

    exit_code = 1


class UsageError(AlignError):
    """The call itself is wrong: a flag, a stage asked for before its inputs, a run folder in use."""

    exit_code = 2


class ConfigError(UsageError):
    """The config file or an override is wrong; the message names the key."""


class DataError(UsageError):
    """A data source is missing, unreadable, empty, or has too many rows that do not fit; names file and line."""


class ModelError(UsageError):
    """A base model cannot be found, loaded or used; names the model and what was looked for."""


class ArtifactError(UsageError):
    """An artifact or checkpoint is missing, damaged, or was made on another base."""


class StorageError(ArtifactError):
    """Something cannot be written: the disk is full, read-only or gone; names the file and what stays."""

    exit_code = 1


class InstallationError(AlignError):
    """`align`, `stages` and `data` come from different places on this machine; names both paths."""


class PlacementError(AlignError):
    """Ray cannot place the worker: what was asked for, what there is, what to change."""


class WorkerError(AlignError):
    """The worker died or raised something that is not one of ours; holds its cause."""


class WorkerDiedError(WorkerError):
    """The worker's process is gone; holds what is known of why. It can be started anew."""


class OutOfMemoryError(WorkerError):
    """Memory ran out, of torch's allocator or of the worker's machine. Smaller micro-batches may do."""


class RewardFunctionError(AlignError):
    """A user's reward function raised, was too slow, or gave back no number; names it and the response."""


class InvariantError(AlignError):
    """A run-time invariant does not hold; holds the values seen."""


class StoppedError(AlignError):
    """The user stopped the run (Ctrl-C); says how to continue it."""

    exit_code = 130


class TerminatedError(StoppedError):
    """The run was asked to end (SIGTERM); says how to continue it."""

    exit_code = 143
