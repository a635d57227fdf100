"""Bytes of any size in GridFS, found by their sha256, and documents that never come near MongoDB's limit of 16 MB.

What is stored once is never stored twice. An entry's ``used`` says when somebody last stored what it holds: whatever
removes what nothing refers to (``storage.garbage``) leaves alone what somebody may be about to refer to.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

from bson import Binary, ObjectId, decode, encode
from gridfs import GridFSBucket
from gridfs.errors import NoFile
from pymongo import ReturnDocument
from pymongo.database import Database

from alcore.errors import StoreError
from alcore.identity import sha256_hex

DOCUMENT_BYTES = 6 * 1024 * 1024
LARGE_BYTES, SMALL_BYTES = 128 * 1024, 4 * 1024
"""Arrays above go to GridFS: always, and where a document would otherwise exceed ``DOCUMENT_BYTES``."""
BULKY = ("residuals", "result", "details", "doubts", "kinds", "label_keys")
"""Lists and mappings that grow, and that such a document gives away, too; the last three only if all else is not
enough, because queries look into them."""
USED_MS = 15 * 60 * 1000
"""``used`` is brought up to date so often."""

Put = Callable[[bytes], str]


class FileShelf:
    """One collection of entries ``{_id: sha256, file, size_bytes, used, ...}`` and the GridFS bucket of the same name.

    An entry is written only once its file is whole: an upload that was cut off leaves nothing that could be found.
    """

    def __init__(self, database: Database[Any], name: str) -> None:
        self.name = name
        self._entries = database[name]
        self._bucket = GridFSBucket(database, bucket_name=name)

    def put(self, data: bytes, entry: Mapping[str, Any]) -> str:
        """Stores ``data`` with the fields of ``entry``, unless it is there already; returns its sha256."""
        sha256 = sha256_hex(data)
        fresh = {"$gt": ["$used", {"$subtract": ["$$NOW", USED_MS]}]}
        used = [{"$set": {"used": {"$cond": [fresh, "$used", "$$NOW"]}}}]
        if self._entries.find_one_and_update({"_id": sha256}, used, {"_id": 1}) is None:
            file: ObjectId = self._bucket.upload_from_stream(sha256, data)
            new = {**entry, "file": file, "size_bytes": len(data)}
            kept = {name: {"$ifNull": [f"${name}", {"$literal": value}]} for name, value in new.items()}
            after = ReturnDocument.AFTER
            found: Any = self._entries.find_one_and_update(
                {"_id": sha256}, [{"$set": kept}, *used], upsert=True, return_document=after
            )
            if found["file"] != file:
                self._bucket.delete(file)  # another process was faster
        return sha256

    def get(self, sha256: str) -> bytes:
        """Raises:
        StoreError: there is no such file, or it is damaged.
        """
        entry = self._entries.find_one({"_id": sha256})
        if entry is None:
            raise StoreError(f"nothing with sha256 {sha256!r} is stored", where=self.name)
        try:
            data: bytes = self._bucket.open_download_stream(entry["file"]).read()
        except NoFile:
            data = b""
        if sha256_hex(data) != sha256:
            raise StoreError(f"the file with sha256 {sha256} is damaged", where=self.name)
        return data


def outlined(son: Any, put: Put) -> Any:
    """``son`` with what is large in it stored by ``put`` and its sha256 in place, under ``%blob`` (an array) or
    ``%bson`` (a list or mapping). No user's key starts with ``%`` (see ``storage.fields.encode_plain``)."""
    stages: list[tuple[int, tuple[str, ...]]] = [(LARGE_BYTES, ()), (SMALL_BYTES, ()), (SMALL_BYTES, BULKY[:3])]
    for limit, bulky in stages:
        if len(encode({"": _lean(son, limit, bulky, lambda data: "")})) < DOCUMENT_BYTES:
            return _lean(son, limit, bulky, put)
    return _lean(son, SMALL_BYTES, BULKY, put)


def inlined(son: Any, get: Callable[[str], bytes]) -> Any:
    """Undoes ``outlined``."""
    if isinstance(son, Mapping):
        if "%blob" in son:
            return Binary(get(son["%blob"]))
        if "%bson" in son:
            return decode(zlib.decompress(get(son["%bson"])))[""]
        return {key: inlined(item, get) for key, item in son.items()}
    if isinstance(son, list):
        if len(son) == 1 and isinstance(son[0], Mapping) and "%bson" in son[0]:
            return inlined(son[0], get)
        return [inlined(item, get) for item in son]
    return son


def _lean(value: Any, limit: int, bulky: tuple[str, ...], put: Put) -> Any:
    """``value`` without bytes above ``limit``, and without what is called as one of ``bulky`` and takes more."""
    if isinstance(value, bytes) and len(value) > limit:
        return {"%blob": put(value)}
    if isinstance(value, list):
        return [_lean(item, limit, bulky, put) for item in value]
    if not isinstance(value, Mapping):
        return value
    lean = {}
    for key, item in value.items():
        whole = encode({"": item}) if key in bulky and isinstance(item, list | Mapping) else b""
        if len(whole) <= limit:
            lean[key] = _lean(item, limit, bulky, put)
        else:  # whole, so that no blob refers to others; a list stays a list, for mongoengine
            away = {"%bson": put(zlib.compress(whole))}
            lean[key] = [away] if isinstance(item, list) else away
    return lean
