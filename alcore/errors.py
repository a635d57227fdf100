"""Every error al-loop raises on purpose.

::

    AlLoopError
    ├── InputError            the user can mend it: a file, a key, a value          exit 2
    │   ├── EndpointError     the two end states do not belong together
    │   ├── CalculatorError   unknown calculator, bad setting, program missing
    │   ├── ModelError        a foundation model cannot be loaded or lacks an element
    │   ├── RunBusyError      another process works on the run now
    │   └── StoreError        the database refuses us, or is of a newer schema
    │       └── StoreUnreachableError   it does not answer now; it may later
    ├── RunawayError          a relaxation left the region where its potential means anything
    └── TrainingError         a training did not reach what was asked of it

Physics that goes wrong in the reference calculator is *not* an error: it is the ``status`` of a ``Label``.
"""

from __future__ import annotations


class AlLoopError(Exception):
    """Base of all errors raised on purpose; its text is one line that a user can act on."""


class InputError(AlLoopError):
    """Bad input, found before anything expensive started.

    Args:
        message: what is wrong.
        where: the place to look, e.g. ``"run.yaml: paths.0.initial"``.
        mend: what the user can do about it.
    """

    def __init__(self, message: str, *, where: str = "", mend: str = "") -> None:
        self.message, self.where, self.mend = message, where, mend
        text = f"{where}: {message}" if where else message
        super().__init__(f"{text} ({mend})" if mend else text)


class EndpointError(InputError):
    """The two end states differ in what must be the same, or are the same in what must differ."""


class CalculatorError(InputError):
    """The reference calculator is unknown, wrongly set up, or cannot run here."""


class ModelError(InputError):
    """A model cannot be loaded, or does not know an element of the structures."""


class RunBusyError(InputError):
    """Another process works on the run now: two would do everything twice."""


class StoreError(InputError):
    """The database refuses us, holds damaged data, or was written by a newer al-loop."""


class StoreUnreachableError(StoreError):
    """The database does not answer, or not yet, or cannot take writes now. The same may well work later."""


class RunawayError(AlLoopError):
    """A relaxation exploded; carries the reason, never a structure to be labelled."""


class TrainingError(AlLoopError):
    """A training ended without a usable model."""
