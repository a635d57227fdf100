"""Bytes of any size in GridFS, found by their sha256. What is stored once is never stored twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bson import ObjectId
from gridfs import GridFSBucket
from gridfs.errors import NoFile
from pymongo.database import Database
from pymongo.errors import DuplicateKeyError

from alcore.errors import StoreError
from alcore.identity import sha256_hex


class FileShelf:
    """One collection of entries ``{_id: sha256, file, size_bytes, ...}`` and the GridFS bucket of the same name.

    An entry is written only once its file is whole: an upload that was cut off leaves nothing that could be found.
    """

    def __init__(self, database: Database[Any], name: str) -> None:
        self.name = name
        self._entries = database[name]
        self._bucket = GridFSBucket(database, bucket_name=name)

    def put(self, data: bytes, entry: Mapping[str, Any]) -> str:
        """Stores ``data`` with the fields of ``entry``, unless it is there already; returns its sha256."""
        sha256 = sha256_hex(data)
        if self._entries.find_one({"_id": sha256}, {"_id": 1}) is None:
            file: ObjectId = self._bucket.upload_from_stream(sha256, data)
            try:
                self._entries.insert_one({**entry, "_id": sha256, "file": file, "size_bytes": len(data)})
            except DuplicateKeyError:
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
