"""Which model files may be loaded: those that need not run what is in them, or whose bytes a person vouches for."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from alcore.errors import ModelError
from alcore.identity import sha256_hex
from alcore.mace.inert import NotPlainError, rebuild

SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a person vouches for.

    Attributes:
        sha256: of the file this key of the settings names, or None. A file that has another is refused.
        key: that key.
        listed: a file of further hashes, ``sha256 comment`` a line, or None; it need not exist.
    """

    sha256: str | None = None
    key: str = "model.foundation_sha256"
    listed: Path | None = None

    def covers(self, sha256: str) -> bool:
        """Whether somebody vouches for these bytes."""
        return sha256 == (self.sha256 or "").lower() or sha256 in read_list(self.listed)


def read_list(file: Path | None) -> set[str]:
    """The hashes in a list of trusted models; empty if there is none. ``#`` starts a comment.

    Raises:
        ModelError: it cannot be read, or a line does not start with a sha256.
    """
    if file is None:
        return set()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return set()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError("cannot be read", where=str(file), mend="one sha256 and a comment a line") from error
    found = set()
    for number, line in enumerate(lines, start=1):
        word = line.partition("#")[0].split(maxsplit=1)[:1]
        if not word:
            continue
        if not SHA256.fullmatch(word[0]):
            mend = "64 hexadecimal digits, then a comment"
            raise ModelError("is no sha256", where=f"{file}: line {number}", mend=mend)
        found.add(word[0].lower())
    return found


def read_model(data: bytes, name: str, trust: Trust, where: str) -> torch.nn.Module:
    """The model in ``data``, on the CPU.

    Nothing in it is run, unless it cannot be read in that way and somebody vouches for exactly these bytes: then it is
    unpickled, with a warning.

    Args:
        data: content of a ``.model`` file.
        name: of the file, for messages.
        trust: what a person vouches for.
        where: the key that names the file, for messages.

    Raises:
        ModelError: nobody vouches for a file that needs it, it is not the file ``trust`` means, or it is damaged.
    """
    sha256 = sha256_hex(data)
    if trust.sha256 is not None and trust.sha256.lower() != sha256:
        raise ModelError(
            f"{name} has sha256 {sha256}, not the one given", where=trust.key, mend="give the right file, or its sha256"
        )
    try:
        return rebuild(data)
    except NotPlainError as error:
        reason = str(error)
    if not data.startswith((b"PK\x03\x04", b"\x80")):
        raise ModelError(
            f"{name} cannot be read as a MACE model: it is no file of torch.save",
            where=where,
            mend="give a file mace-torch has written",
        )
    if not trust.covers(sha256):
        lists = f" or add it as a line to {trust.listed}" if trust.listed else ""
        raise ModelError(
            f"{name} is refused: it can be loaded only by running the code inside it, which may do all that you may do "
            f"({reason}); its sha256 is {sha256}",
            where=where,
            mend=f"if you trust who made this file, set {trust.key} to that{lists}",
        )
    warnings.warn(
        f"{name} is loaded by running the code inside it, because its sha256 {sha256} is vouched for", stacklevel=3
    )
    return _unpickle(data, name, where)


def _unpickle(data: bytes, name: str, where: str) -> torch.nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: torch.nn.Module = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ModelError(
            f"{name} cannot be read as a MACE model: {lines[0]}", where=where, mend="give a file mace-torch has written"
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{name} is not a MACE energy model", where=where, mend="give a MACE .model file")
    return model
