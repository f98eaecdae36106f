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

YAML_ATTACKS: dict[str, bytes] = {
    "aliases that unfold to 2^22 values": b"a0: &a0 [x, x]\n"
    + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 22)),
    "the same, where an integer should be": b"study: s\ndatasets: {d: {root: r}}\nmodels: {}\nframes:\n  count: &a0 [x, x]\n"
    + b"".join(b"  k%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 22))
    + b"timing: {seed: *a21}\n",
    "a list that holds itself": b"study: s\ndatasets: &a [*a]\nmodels: {}\n",
    "an object of Python's": b"!!python/object/apply:os.system ['touch canary']",
    "a day that no month has": b"study: 2001-99-99",
    "an integer without digits": b"study: !!int ''",
    "no boolean": b"study: !!bool x",
    "no time": b"study: !!timestamp x",
    "10^6 sexagesimal digits": b"study: " + b"1:" * 500_000 + b"1",
    "10^6 brackets": b"[" * 1_000_000,
    "tabs": b"study:\t- a\n\t- b",
    "bytes that are not UTF-8": b"study: \xff\xfe\x00",
}
