"""Every error that dtrain raises on purpose, and the exit code that a command ends with.

* DtrainError                 1
  x UsageError               64   an argument, a flag, a variable or a call that cannot be meant
  x DataError                65   a file or a data set that cannot be read, a damaged checkpoint
  x CommError                69   another process is gone, late or silent; the job can be started again
    + ConnectError           69   nobody was found at the start
    + StateLost              69   a server was started anew and knows nothing of this job
    + Rewound                69   the job goes back to its last commit; a Trainer does so by itself
    + Finished                0   the job has ended well without this process
  x ProtocolError            76   the other side speaks another language, or another version of this one
    + LayoutError            76   workers hold different tensors
    + Fenced                 76   another process has taken this one's place
    + KeyRefused             77   a key that the other side does not accept
  x Preempted                75   asked to stop; state saved

The codes are those of sysexits.h, so that Slurm, Kubernetes and shell scripts can act on them.
"""

from __future__ import annotations


class DtrainError(Exception):
    """Base of all errors here. `exit_code` is what a command ends with when it is not caught."""

    exit_code = 1


class UsageError(DtrainError, ValueError):
    """An argument, a flag, a variable or an order of calls that cannot be meant."""

    exit_code = 64


class DataError(DtrainError):
    """A file or a data set that cannot be read, or a checkpoint that is damaged."""

    exit_code = 65


class CommError(DtrainError):
    """Another process of the job is gone, late or silent. Names who, where, and in which transfer."""

    exit_code = 69


class ConnectError(CommError):
    """The other processes of the job were not found within the time given."""


class StateLost(CommError):
    """A server that this worker was connected to is new, and has nothing of what the job had told it."""


class Rewound(CommError):
    """A process was lost and is replaced: the job goes back to its last commit, in a new epoch.

    `Trainer.fit` does so by itself where it was told to; in a loop of one's own, connect again and load the commit.
    """

    def __init__(self, text: str, epoch: int = 0) -> None:
        super().__init__(text)
        self.epoch = epoch


class Finished(CommError):
    """The job has ended well before this process, a replacement, came."""

    exit_code = 0


class Preempted(DtrainError):
    """The job was asked to stop and saved its state; start it again to go on."""

    exit_code = 75


class ProtocolError(DtrainError):
    """The other side does not speak dtrain's protocol, or not this version of it."""

    exit_code = 76


class LayoutError(ProtocolError):
    """Workers hold tensors of different names, shapes or types; names the first that differs."""


class Fenced(ProtocolError):
    """Another process has taken this one's place in the job; what it sends is not counted."""


class KeyRefused(ProtocolError):
    """A CURVE key that the other side does not accept."""

    exit_code = 77
