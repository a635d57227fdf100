"""Addresses of MongoDB, as they may be shown: never with credentials."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECRET_OPTIONS = re.compile(r"((?:password|authMechanismProperties)=)[^&\s]*", re.IGNORECASE)
CREDENTIALS = re.compile(r"(\w[\w+.-]*://|\b)\S*@")  # whatever the scheme: it may be the typing error


def redact_uri(text: str) -> str:
    """``text`` (an address, or words around one) without user, password or other secrets of a MongoDB address.

    Everything up to the last ``@`` goes, because a password that was not escaped may itself hold one.
    """
    return SECRET_OPTIONS.sub(r"\1***", CREDENTIALS.sub(r"\1***@", text))


def redact_tree(value: Any) -> Any:
    """The same for every string in nested plain values; what holds no address is unchanged."""
    if isinstance(value, str):
        return redact_uri(value) if "mongodb" in value.lower() else value
    if isinstance(value, Mapping):
        return {key: redact_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(item) for item in value]
    return value


def address(uri: str) -> str:
    """``host:port`` (several with commas) of an address, without asking a name server."""
    match = re.match(r"mongodb(\+srv)?://(?:\S*@)?([^/?\s]*)", uri, re.IGNORECASE)
    if match is None:
        return redact_uri(uri)
    hosts = [host for host in match[2].split(",") if host]
    return ",".join(host if match[1] or re.search(r":\d+$", host) else f"{host}:27017" for host in hosts)
