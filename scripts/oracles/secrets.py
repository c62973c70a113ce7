"""Sealed secrets by another implementation of AES-256-GCM (python's cryptography), in the format of src/secrets/seal.rs.

secrets.py           checks the stored texts: opens each
secrets.py --write   seals them anew; they are frozen, so this is for another version of the format
secrets.py --open <key in hex> <tenant> <column> <stored text>   opens one that the crate has sealed
"""

import base64
import json
import os
import pathlib
import sys

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FILE = pathlib.Path(__file__).parents[2] / "src/secrets/vectors.json"
CASES = [
    ("07" * 32, "2026-11", "00000000-0000-7000-8000-000000000001", "paid_api_key", "pk-4711"),
    ("07" * 32, "2026-11", "00000000-0000-7000-8000-000000000002", "webhook_secret", "new é ✓\nold"),
    ("00ff" * 16, "k_1.x", "ffffffff-ffff-ffff-ffff-ffffffffffff", "paid_api_key", "x" * 8192),
]


def b64(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def associated(version, tenant, column, key_id):
    return "\n".join([version, tenant, column, key_id]).encode()


def seal(key, key_id, tenant, column, secret):
    data_key, n1, n2 = os.urandom(32), os.urandom(12), os.urandom(12)
    wrapped = n1 + AESGCM(key).encrypt(n1, data_key, associated("lp1-key", tenant, column, key_id))
    sealed = n2 + AESGCM(data_key).encrypt(n2, secret.encode(), associated("lp1", tenant, column, key_id))
    return f"lp1:{key_id}:{b64(wrapped)}:{b64(sealed)}"


def unseal(key, tenant, column, stored):
    version, key_id, wrapped, sealed = stored.split(":")
    assert version == "lp1"
    wrapped, sealed = unb64(wrapped), unb64(sealed)
    data_key = AESGCM(key).decrypt(wrapped[:12], wrapped[12:], associated("lp1-key", tenant, column, key_id))
    return AESGCM(data_key).decrypt(sealed[:12], sealed[12:], associated("lp1", tenant, column, key_id)).decode()


if sys.argv[1:2] == ["--open"]:
    key, tenant, column, stored = sys.argv[2:]
    print(unseal(bytes.fromhex(key), tenant, column, stored))
elif sys.argv[1:] == ["--write"]:
    names = ["key", "key_id", "tenant", "column", "secret"]
    stored = [dict(zip(names, c)) | {"stored": seal(bytes.fromhex(c[0]), *c[1:])} for c in CASES]
    FILE.write_text(json.dumps(stored, indent=1) + "\n")
else:
    for case in json.loads(FILE.read_text()):
        opened = unseal(bytes.fromhex(case["key"]), case["tenant"], case["column"], case["stored"])
        assert opened == case["secret"], case
    print("secrets: ok")
