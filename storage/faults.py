"""What an error of the MongoDB driver means: the database is away (the same may work later), or it refuses us."""

from __future__ import annotations

from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError, WTimeoutError

from alcore.errors import StoreError, StoreUnreachableError
from storage.uris import redact_uri

ACCESS_CODES = {13, 18, 8000}  # unauthorized, authentication failed, the same at Atlas
DOUBTFUL_CODES = {1, 8, 96}
"""Internal error, unknown error, operation failed: most pass, some never do."""
AWAY_CODES = {
    *DOUBTFUL_CODES,
    *(6, 7, 89, 9001),  # its own network
    *(24, 43, 46, 50, 64, 202, 237, 262, 290),  # too slow just now: locks, cursors and time limits
    *(91, 11600, 11601, 11602),  # shutting down, or a member of the replica set changed its state
    *(100, 133, 134, 189, 10058, 10107, 13435, 13436),  # no primary, or not enough members
    *(112, 225, 246, 251),  # a transaction that met another, or was forgotten in between
    *(371, 14031),  # writes are blocked, or its disk is full
}
AWAY_WORDS = ("no space left", "out of disk space", "disk quota", "read-only file system")
AWAY_LABELS = ("RetryableWriteError", "TransientTransactionError", "SystemOverloadedError")


def store_error(error: PyMongoError, where: str) -> StoreError:
    """Ours for the driver's, one line and without credentials.

    Args:
        error: of the driver.
        where: the server's address as it may be shown.

    Returns:
        A ``StoreUnreachableError`` where the same may work later.
    """
    if isinstance(error, OperationFailure) and error.code in ACCESS_CODES:
        return StoreError("MongoDB refuses this user", where=where, mend="check user, password and authSource")
    said = redact_uri(str(error))
    if isinstance(error, ConnectionFailure):
        cause = said.split(" (configured")[0].split(", Timeout")[0]
        mend = "is it running, and is store.mongodb_uri right? null means the embedded one"
        return StoreUnreachableError(f"MongoDB cannot be reached: {cause}", where=where, mend=mend)
    text = said.split(", full error")[0].splitlines()[0]
    if _passes(error):
        return StoreUnreachableError(f"MongoDB cannot do it now: {text}", where=where)
    return StoreError(f"MongoDB says: {text}", where=where)


def refuses_content(error: StoreError) -> bool:
    """Whether it is about what was to be written, so that trying again is in vain."""
    cause = error.__cause__
    if isinstance(error, StoreUnreachableError):
        return False
    return not isinstance(cause, PyMongoError) or (
        isinstance(cause, OperationFailure) and cause.code not in ACCESS_CODES
    )


def may_last(error: StoreError) -> bool:
    """Whether what was taken for an outage may be for ever, and of this one command."""
    cause = error
    while isinstance(cause, StoreUnreachableError) and cause.__cause__ is not None:
        cause = cause.__cause__  # type: ignore[assignment]
    return (
        isinstance(cause, OperationFailure)
        and cause.code in DOUBTFUL_CODES
        and not any(word in str(cause).lower() for word in AWAY_WORDS)
        and not any(cause.has_error_label(label) for label in AWAY_LABELS)
    )


def _passes(error: PyMongoError) -> bool:
    if isinstance(error, WTimeoutError) or any(error.has_error_label(label) for label in AWAY_LABELS):
        return True
    if error.timeout:
        return True
    code = error.code if isinstance(error, OperationFailure) else None
    return code in AWAY_CODES or any(word in str(error).lower() for word in AWAY_WORDS)
