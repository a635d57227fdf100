"""No credential is ever shown."""

from __future__ import annotations

import pytest

from storage.uris import address, redact_tree, redact_uri


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("mongodb://localhost:27017/db", "mongodb://localhost:27017/db"),
        ("mongodb://ann:secret@h1:1,h2:2/db?tls=true", "mongodb://***@h1:1,h2:2/db?tls=true"),
        ("mongodb+srv://ann:secret@cluster.example/", "mongodb+srv://***@cluster.example/"),
        ("mongodb://ann:se@c/ret@h:1", "mongodb://***@h:1"),
        ("mongo://ann:secret@h:1", "mongo://***@h:1"),
        ("ann:secret@h:1", "***@h:1"),
        ("cannot use mongodb://ann:secret@h:1 now", "cannot use mongodb://***@h:1 now"),
        ("mongodb://h/?tlsCertificateKeyFilePassword=secret&w=1", "mongodb://h/?tlsCertificateKeyFilePassword=***&w=1"),
        ("mongodb://h/?authMechanismProperties=AWS_SESSION_TOKEN:secret", "mongodb://h/?authMechanismProperties=***"),
    ],
)
def test_credentials_are_struck_out(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        ("mongodb://ann:secret@db.example/x", "db.example:27017"),
        ("mongodb://h1:1,h2/?replicaSet=r", "h1:1,h2:27017"),
        ("mongodb+srv://ann:secret@cluster.example/", "cluster.example"),
        ("mongodb://[::1]:5/", "[::1]:5"),
    ],
)
def test_the_host_and_port_are_named(uri: str, host: str) -> None:
    assert address(uri) == host


def test_other_strings_of_a_tree_stay() -> None:
    tree = {"mail": "ann@example.org", "n": 1, "deep": [{"uri": "mongodb://a:b@h"}]}
    assert redact_tree(tree) == {"mail": "ann@example.org", "n": 1, "deep": [{"uri": "mongodb://***@h"}]}
