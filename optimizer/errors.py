"""The errors a caller of `optimizer` can act on.

MergefrontError
├── StudyFileError     a study file (or other YAML) breaks a rule: fix the file
├── CheckpointError    a model folder is torn, unsafe or does not fit the others: fix the folder
├── MergeError         the arithmetic gave no usable tensor: fix the recipe or the expert
├── RunError           a run folder was made from another study, or something it is asked for is not in it
│   ├── UnavailableError   not now: another search writes to it, the disk is full, a database server does not answer
│   ├── DamagedError       its study is damaged, missing, or another program's
│   └── NoPointError       it has no point such as was asked for
├── SearchError        the search cannot go on: mend the cause and start it again
└── WorkerError        a worker died or cannot start

`search_spaces.SpaceError` and `evals.TaskError` are ValueErrors of their own packages.
"""


class MergefrontError(Exception):
    """Base of every error this package raises on purpose; its message is written for a person."""


class StudyFileError(MergefrontError):
    """A study file or another YAML document breaks a rule."""


class CheckpointError(MergefrontError):
    """A checkpoint cannot be read safely and whole, or does not fit the base."""


class MergeError(MergefrontError):
    """A merge gave a tensor that is not finite, or a recipe and its sources do not fit."""


class RunError(MergefrontError):
    """A run folder was made from another study, or something it is asked for is not in it."""


class UnavailableError(RunError):
    """A run cannot be worked on now; whatever stands in the way lies outside it."""


class DamagedError(RunError):
    """A run's study is damaged, missing, or another program's; it is left as it is."""


class NoPointError(RunError):
    """A run has no point such as was asked for."""


class SearchError(MergefrontError):
    """The search cannot go on; what it has found so far is kept."""


class WorkerError(MergefrontError):
    """A worker died, or could not start."""
