"""The errors of the project, all of one base class.

A message reads *where: what was found; what to do*, on one line. The command line prints it to stderr and exits with
`exit_code`; no other package prints. A broken invariant is an `assert`.
"""


class EarTeachError(Exception):
    """The user's data or files cannot be used (exit code 1)."""

    exit_code = 1
    raised_by_all_ranks = False  # whether every process of the run raises it, so that the first one prints it

    @classmethod
    def on_all_ranks(cls, message: str) -> "EarTeachError":
        """Return an error that every process of a run raises."""
        error = cls(message)
        error.raised_by_all_ranks = True
        return error


class UsageError(EarTeachError):
    """The arguments of the command cannot be used (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """An option or a line of a configuration file has an impossible value."""

    def __init__(self, field: str, found: str, remedy: str):
        super().__init__(f"{field}: {found}; {remedy}")
        self.field, self.found, self.remedy = field, found, remedy


class ManifestError(EarTeachError):
    """A list of images cannot be read."""


class WeightsError(EarTeachError):
    """A weights file or checkpoint is missing, damaged, unsafe, or made for another model."""


class ForeignWeightsError(WeightsError):
    """A weights file is intact, but earteach did not write it: it does not name its model."""


class ImageError(EarTeachError):
    """One image, or the box on it, cannot be used. `reason` is a code from data/crop.py."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):  # to pickle it in a worker process
        return (type(self), (self.reason, self.detail))


class Stopped(KeyboardInterrupt):
    """Ctrl-C (`exit_code` 130) or SIGTERM (143): save what is finished, then end."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number
