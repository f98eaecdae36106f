"""Fuzzing of every reader of files from strangers: `make fuzz` for long runs, tests/reliability/test_fuzz.py for short ones."""
