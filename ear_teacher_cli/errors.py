"""The one error class of the project, and its few children.

A message reads *where: what was found; what to do*, on one line. `cli.main` prints it to stderr and
exits with `exit_code`; the core raises it and never prints. Broken invariants are `assert`, not these.
"""


class EarTeachError(Exception):
    """Something in the user's data or files is not as it must be (exit code 1)."""

    exit_code = 1
    raised_by_all_ranks = False  # every process of the run raises it, so that one is enough to say it

    @classmethod
    def on_all_ranks(cls, message: str) -> "EarTeachError":
        """One that every process of a run raises."""
        error = cls(message)
        error.raised_by_all_ranks = True
        return error


class UsageError(EarTeachError):
    """The command itself cannot be carried out as typed (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """An option or a line of a configuration file has a value that cannot be."""

    def __init__(self, field: str, found: str, mend: str):
        super().__init__(f"{field}: {found}; {mend}")
        self.field = field


class ManifestError(EarTeachError):
    """A list of images cannot be read as one."""


class WeightsError(EarTeachError):
    """A weights file or checkpoint is missing, damaged, hostile, or made for another model."""


class ForeignWeightsError(WeightsError):
    """A whole weights file, but not one that earteach wrote: it does not say what model it is of."""


class ImageError(EarTeachError):
    """One image (or the box on it) is of no use. `reason` is a code from data/crop.py."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):  # crosses process borders from the decoding workers
        return (type(self), (self.reason, self.detail))


class Stopped(KeyboardInterrupt):
    """Ctrl-C (`exit_code` 130) or SIGTERM (143): whoever catches it saves what is done, and ends."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number
