#!/usr/bin/env python3
"""The golden vectors of the assignment, by an implementation that shares no code with the crate.

    scripts/oracles/run             verifies tests/vectors/assignment-v1.json, here and by the code in docs/assignment.md
    scripts/oracles/run --write     makes the file; it is frozen, so only with --force over one that is there
"""
import argparse
import collections
import functools
import json
import math
import pathlib
import re
import sys
import uuid
from fractions import Fraction
from types import SimpleNamespace

import xxhash

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = ROOT / "tests/vectors/assignment-v1.json"
DOCUMENT = ROOT / "docs/assignment.md"
LINE = 2**64
MAX_BYTES = 600_000


# The algorithm: definitions, not speed. docs/assignment.md has the same, written in another way.

def unit(id):
    return xxhash.xxh3_64(id.encode(), seed=0).intdigest()


def seed(purpose, salt):
    return xxhash.xxh3_64(b"/".join([b"lastprice", b"v1", purpose.encode(), salt.encode()]), seed=0).intdigest()


def bucket(unit, seed):
    z = unit ^ seed
    for shift, factor in [(30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)]:
        z = (z ^ z >> shift) * factor % LINE
    return z


def bound(millionths):
    return math.floor(LINE * Fraction(millionths, 1_000_000))


def inside(start, end, bucket):
    return bucket in range(bound(start), bound(end))


def thresholds(weights):
    return list(thresholds_of(tuple(weights)))


@functools.cache
def thresholds_of(weights):
    last = max(i for i, w in enumerate(weights) if w)
    return [math.floor(LINE * Fraction(sum(weights[:i + 1]), sum(weights))) for i in range(last)]


def variant(weights, bucket):
    bounds = thresholds(weights)
    return next((i for i, t in enumerate(bounds) if bucket < t), len(bounds))


def place(tenant_salt, holdout, layer, traffic, salt, weights, id):
    u = unit(id)
    if inside(0, holdout, bucket(u, seed("holdout", tenant_salt))):
        return "held_out"
    if layer is not None:
        salt_of_layer = tenant_salt + "/" + layer["name"]
        if not inside(layer["start"], layer["end"], bucket(u, seed("layer", salt_of_layer))):
            return "outside_layer"
    if not inside(0, traffic, bucket(u, seed("traffic", salt))):
        return "outside_traffic"
    return variant(weights, bucket(u, seed("variant", salt)))


# What is in the file.

def some_uuid(name):
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, name + ".example"))


def ids(count, domain):
    """As services have them, in turn."""
    kinds = [lambda n: f"user-{n}", lambda n: some_uuid(f"{domain}-{n}"), lambda n: f"someone.{n}@{domain}.example",
             lambda n: str(1_000_003 * n + 7), lambda n: f"ユーザー{n}"]
    return [kinds[n % len(kinds)](n) for n in range(count)]


LENGTHS = [1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 512]
TEXT = "The quick brown fox jumps over the lazy dog; 0123456789. "
EXTREMES = [c * n for n in LENGTHS for c in "a\xff\u65e5" if len(c.encode()) * n <= 512]
UNITS = ([(TEXT * 10)[n:2 * n] if n < 240 else (TEXT * 10)[:n] for n in LENGTHS] + EXTREMES
         + [some_uuid(f"unit-{n}") for n in range(8)] + [some_uuid("unit-0").upper()]
         + ["0192f1c4-7a3e-7c1e-8a53-0123456789ab", "00000000-0000-0000-0000-000000000000"]
         + ["someone@example.com", "Someone@example.com", "some.one+tag@mail.example.org", "ä@example.de"]
         + ["0", "1", "2", "10", "42", "007", "-1", "12345678", "4294967296", "18446744073709551615"]
         + ["Müller", "Straße", "äöüß", "日本語のユーザー", "👩‍💻", "🙂", "caf\u00e9", "cafe\u0301", "\u00e9", "e\u0301"]
         # As given: case, blanks and signs that a careless layer would touch.
         + ["user-1", "User-1", " user-1", "user-1 ", "user-1\n", "a b\tc", "a\"b\\c/d", "\ufeffuser-1", "null", " "])
SALTS = (["", "0", "a", "-", " ", "salt", "Salt", "salt/", "a/b", "Grüße", "実験", "🧪", "e\u0301", "\u00e9"]
         + [some_uuid(f"salt-{n}") for n in range(6)] + ["x" * 128, (TEXT * 3)[:128]]
         + [some_uuid("tenant") + "/checkout", some_uuid("tenant") + "/Preis/Übersicht"])
U32 = 2**32 - 1
WEIGHTS = [[1], [7, 0], [1, 1], [1, 1, 0], [0, 1], [0, 0, 5, 0, 0], [1, 0, 1], [1, 2], [1, 1, 1], [1, 2, 3, 4], [50, 30, 20], [1, 99],
           [U32, 1], [1, U32], [U32, U32], [U32, U32, 1], [U32] * 10, [1] * 10, [1] * 50, [0, 3] * 8 + [0],
           [1 + 7_919 * n % 1_000 for n in range(1_000)]]
MILLIONTHS = [0, 1, 10_000, 50_000, 333_333, 500_000, 999_999, 1_000_000]
RANGES = [(0, 0), (0, 1), (1, 2), (0, 10_000), (10_000, 333_333), (333_333, 333_333), (333_333, 500_000), (0, 500_000),
          (500_000, 1_000_000), (999_999, 1_000_000), (0, 999_999), (0, 1_000_000), (1_000_000, 1_000_000)]


def setup(tenant, holdout, layer, traffic, salt, weights):
    layer = layer and dict(zip(["name", "start", "end"], layer))
    return dict(tenant_salt=some_uuid(tenant), holdout=holdout, layer=layer, traffic=traffic, salt=salt, weights=weights)


ONE, ALL = some_uuid("experiment"), 1_000_000
PLACEMENTS = [
    setup("tenant", 0, None, ALL, ONE, [1, 1]),
    setup("tenant", 100_000, ("checkout", 200_000, 700_000), 500_000, ONE, [1, 1, 0]),
    setup("tenant", 300_000, ("checkout", 0, 700_000), 700_000, ONE, [1, 2, 3, 4]),
    setup("tenant", 50_000, None, ALL, ONE, [1, 1, 1]),
    # Two parts of one layer, and another layer.
    setup("tenant", 0, ("checkout", 0, 333_333), ALL, ONE, [1, 1]),
    setup("tenant", 0, ("checkout", 333_333, ALL), ALL, ONE, [1, 1]),
    setup("tenant", 0, ("search", 333_333, ALL), ALL, ONE, [1, 1]),
    setup("tenant", 0, None, 10_000, ONE, [1, 1]),
    setup("tenant", 0, None, 900_000, ONE, [0, 1, 0, 9, 0]),
    setup("tenant", 0, None, 0, ONE, [1]),
    setup("tenant", ALL, ("checkout", 0, ALL), ALL, ONE, [1]),
    setup("tenant", 0, ("checkout", 0, ALL), ALL, ONE, [0, 1]),
    # One salt for everything: the purposes keep the decisions apart.
    setup("tenant", 200_000, ("tenant", 100_000, 900_000), 600_000, some_uuid("tenant"), [1] * 10),
    dict(setup("", 123_456, ("Preis/Übersicht", 111_111, 888_888), 654_321, "実験-é", [U32, 1, U32]), tenant_salt="Mieter-ß"),
]


def hexed(n):
    return None if n == LINE else f"0x{n:016x}"


def around(bounds):
    """Both ends of the line and of every bound."""
    buckets = {0, LINE - 1} | {b for t in bounds for b in (t - 1, t) if 0 <= b < LINE}
    return sorted(buckets)


def outcome(placed):
    return {"outcome": placed} if isinstance(placed, str) else {"outcome": "variant", "variant": placed}


def answers(impl, section, v):
    """One vector, answered by an implementation: what the file says, or should say."""
    cases = v.get("cases")
    if section == "units":
        return dict(v, hash=hexed(impl.unit(v["id"])))
    if section == "seeds":
        return dict(v, seed=hexed(impl.seed(v["purpose"], v["salt"])))
    if section == "weights":
        of = lambda c: dict(c, variant=impl.variant(v["weights"], int(c["bucket"], 16)))
        return dict(v, thresholds=[hexed(t) for t in impl.thresholds(v["weights"])], cases=[of(c) for c in cases])
    if section == "shares":
        of = lambda c: dict(c, inside=impl.inside(0, v["millionths"], int(c["bucket"], 16)))
        return dict(v, bound=hexed(impl.bound(v["millionths"])), cases=[of(c) for c in cases])
    if section == "ranges":
        of = lambda c: dict(c, inside=impl.inside(v["start"], v["end"], int(c["bucket"], 16)))
        first, end = impl.bound(v["start"]), impl.bound(v["end"])
        return dict(v, first=hexed(first), bound=hexed(end), cases=[of(c) for c in cases])
    if section == "assignments":
        s = impl.seed("variant", v["salt"])
        at = [(c, impl.bucket(impl.unit(c["id"]), s)) for c in cases]
        return dict(v, cases=[dict(c, bucket=hexed(b), variant=impl.variant(v["weights"], b)) for c, b in at])
    if section == "placements":
        setup = {key: v[key] for key in v if key != "cases"}
        return dict(v, cases=[dict({"id": c["id"]}, **outcome(impl.place(**setup, id=c["id"]))) for c in cases])
    raise SystemExit(f"what is the section {section}?")


def questions():
    """The file without its answers."""
    buckets = lambda bounds: [{"bucket": hexed(b)} for b in around(bounds)]
    users = lambda count, domain: [{"id": id} for id in ids(count, domain)]
    short = [{"id": id} for id in UNITS if len(id) <= 40]
    yield "units", [{"id": id} for id in dict.fromkeys(UNITS)]
    yield "seeds", [{"purpose": p, "salt": s} for s in SALTS for p in ["traffic", "variant", "layer", "holdout"]]
    yield "weights", [{"weights": w, "thresholds": [], "cases": buckets(thresholds(w))} for w in WEIGHTS]
    yield "shares", [{"millionths": n, "bound": 0, "cases": buckets([bound(n)])} for n in MILLIONTHS]
    yield "ranges", [{"start": s, "end": e, "first": 0, "bound": 0, "cases": buckets([bound(s), bound(e)])} for s, e in RANGES]
    yield "assignments", [{"salt": s, "weights": w, "cases": short if n == 0 else users(40, f"a{n}")}
                          for n, (s, w) in enumerate([(ONE, [1, 1]), (ONE, [1, 2, 3, 4]), ("", [1, 1, 1]), ("実験", [1, 1, 0]),
                                                      ("x" * 128, [U32, U32, 1]), (some_uuid("b"), [1] * 50),
                                                      (some_uuid("c"), WEIGHTS[-1]), (some_uuid("d"), [0, 0, 5, 0, 0])])]
    yield "placements", [dict(s, cases=users(120, f"p{n % 3}")) for n, s in enumerate(PLACEMENTS)]


SECTIONS = [name for name, _ in questions()]


def text(value, indent=0):
    """JSON, a member per line where it would be too long for one."""
    line = json.dumps(value, ensure_ascii=True)
    if indent and len(line) <= 140:
        return line
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        inner = [f"{pad}{json.dumps(key)}: {text(v, indent + 1)}" for key, v in value.items()]
        return "{\n" + ",\n".join(inner) + "\n" + " " * indent + "}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(pad + text(v, indent + 1) for v in value) + "\n" + " " * indent + "]"
    return line


def write(force):
    if FILE.exists() and not force:
        raise SystemExit(f"{FILE.name} is frozen: another answer is a new version of the algorithm (--force to overwrite)")
    own = SimpleNamespace(**globals())
    made = {"algorithm": "v1"} | {name: [answers(own, name, v) for v in asked] for name, asked in questions()}
    out = text(made) + "\n"
    if len(out) > MAX_BYTES:
        raise SystemExit(f"{len(out)} bytes are too many")
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(out, encoding="ascii")
    print(f"wrote {FILE.name}: {len(out)} bytes")


def documented():
    """The code of the document, run as it stands there."""
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
    if len(blocks) != 1 or blocks[0].count("\n") > 40:
        raise SystemExit(f"{DOCUMENT.name} has not exactly one Python block, of at most 40 lines")
    namespace = {}
    exec(compile(blocks[0], str(DOCUMENT), "exec"), namespace)
    return SimpleNamespace(**namespace)


def verify(name, impl, file):
    """The number of differences."""
    wrong, counts = [], collections.Counter()
    for section in SECTIONS:
        for index, vector in enumerate(file[section]):
            counts[section] += len(vector.get("cases", [0]))
            answer = answers(impl, section, vector)
            if answer != vector:
                at = [n for n, (a, b) in enumerate(zip(answer.get("cases", []), vector.get("cases", []))) if a != b]
                wrong.append(f"{name}: {section}[{index}] differs" + (f", first at cases[{at[0]}]" if at else ""))
    print("\n".join(wrong[:20]), file=sys.stderr, end="\n" if wrong else "")
    print(f"{name}: {sum(counts.values())} checked, {len(wrong)} vectors differ; {dict(counts)}")
    return len(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    if args.write:
        write(args.force)
    file = json.loads(FILE.read_text(encoding="ascii"))
    if list(file) != ["algorithm", *SECTIONS] or file["algorithm"] != "v1" or not all(file[s] for s in SECTIONS):
        raise SystemExit(f"{FILE.name} lacks a section, or has one too many")
    outcomes = collections.Counter(c["outcome"] for v in file["placements"] for c in v["cases"])
    if len(outcomes) != 4 or min(outcomes.values()) < 50:
        raise SystemExit(f"too few of an outcome: {outcomes}")
    differ = verify("oracle", SimpleNamespace(**globals()), file) + verify("document", documented(), file)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
