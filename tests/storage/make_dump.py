"""A database as one small file, so that tests can open what an older al-loop wrote.

``schema-1.bson.xz`` was made by al-loop as it was with schema 1, on an embedded server of its own::

    al-loop run config/quickstart.yaml --no-server
    al-loop run config/quickstart.yaml --no-server --set name=stopped --set stop.max_generations=3 \
        --set model.strategy=zero-shot --set model.committee=1
    al-loop label config/structures/au_al100/initial.extxyz --calculator ase --set factory=fails:calculator \
        --set path=FOLDER          # a calculator that raises: a failed label that no run refers to
    python tests/storage/make_dump.py mongodb://127.0.0.1:PORT tests/storage/data/schema-1.bson.xz
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path
from typing import Any

from bson import decode_file_iter, encode
from pymongo import MongoClient
from pymongo.database import Database

DATA = Path(__file__).parent / "data"


def write_dump(database: Database[Any], file: Path) -> None:
    """Every document of every collection, with GridFS and its chunks, and the indexes."""
    with lzma.open(file, "wb", preset=9) as out:
        for name in sorted(database.list_collection_names()):
            if not name.startswith("system."):
                indexes = list(database[name].list_indexes())
                out.write(encode({"collection": name, "indexes": [dict(index) for index in indexes]}))
                for document in database[name].find().sort("_id", 1):
                    out.write(encode({"collection": name, "document": document}))


def read_dump(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The documents of each collection."""
    found: dict[str, list[dict[str, Any]]] = {}
    with lzma.open(file, "rb") as given:
        for entry in decode_file_iter(given):
            documents = found.setdefault(entry["collection"], [])
            if "document" in entry:
                documents.append(entry["document"])
    return found


def restore_dump(file: Path, database: Database[Any]) -> None:
    """Documents and indexes as they were; the database has to be empty."""
    for name, documents in read_dump(file).items():
        if documents:
            database[name].insert_many(documents)
    with lzma.open(file, "rb") as given:
        for entry in decode_file_iter(given):
            if "document" in entry:
                continue
            for index in entry["indexes"]:
                if index["name"] != "_id_":
                    options = {key: value for key, value in index.items() if key not in ("key", "v", "ns")}
                    database[entry["collection"]].create_index(list(index["key"].items()), **options)


if __name__ == "__main__":
    with MongoClient[Any](sys.argv[1]) as client:
        write_dump(client["al_loop"], Path(sys.argv[2]))
