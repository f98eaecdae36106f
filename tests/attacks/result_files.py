"""Hostile JSON where a reader of results, plans, checkpoints or settings expects its own. `ATTACKS` maps a name to bytes."""

DEPTH = 100_000

ATTACKS: dict[str, bytes] = {
    "lists 10^5 deep": b"[" * DEPTH + b"]" * DEPTH,
    "objects 10^5 deep": b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
    "a right key with something 10^5 deep": b'{"config":' + b"[" * DEPTH + b"]" * DEPTH + b"}",
    "not UTF-8": b'{"study": "\xff\xfe"}',
    "cut short": b'{"config": {"study": "s"',
    "a list where an object should be": b"[1, 2, 3]",
    "a number": b"3",
    "nothing": b"",
    "a number of 10^6 digits": b'{"format": ' + b"9" * 1_000_000 + b"}",
}
