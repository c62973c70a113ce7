#!/usr/bin/env python3
"""Writes src/bucketing/vectors.in: assignments by an independent implementation (PyPI: xxhash==4.1.0).

    pip install xxhash==4.1.0 && python3 scripts/oracles/assignment.py
"""
import json
import pathlib

import xxhash

M = (1 << 64) - 1


def mix13(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M
    return z ^ (z >> 31)


def variant(salt, user, weights):
    u = xxhash.xxh3_64_intdigest(user.encode(), seed=0)
    s = xxhash.xxh3_64_intdigest(f"lastprice/v1/variant/{salt}".encode(), seed=0)
    bucket = mix13(u ^ s)
    total, acc = sum(weights), 0
    for i, w in enumerate(weights):
        acc += w
        if bucket < (acc << 64) // total:
            return i
    raise AssertionError("the last positive weight is open")


users = ["a", "user-1", "user-2", "12345678", "123456789", "ß", "日本語のユーザー", "a" * 16, "b" * 17, "c" * 128, "d" * 129,
         "e" * 240, "f" * 241, "g" * 512, "someone@example.com", "0192f1c4-7a3e-7c1e-8a53-0123456789ab"]
weights = [[1, 1], [1, 1, 0], [0, 1], [1, 2, 3, 4], [4294967295, 1], [1] * 50]
lines = [f"    ({json.dumps(s)}, {json.dumps(u, ensure_ascii=False)}, &{w}, {variant(s, u, w)}),"
         for s in ["salt", "0192f1c4-7a3e-4c1e-8a53-0123456789ab"] for u in users for w in weights]
pathlib.Path(__file__).resolve().parents[2].joinpath("src/bucketing/vectors.in").write_text(
    "&[\n" + "\n".join(lines) + "\n]\n")
