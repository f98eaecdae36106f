"""Columns, statuses and codes that other modules and older files rely on."""

import pyarrow as pa
import pytest

from stagebench.rows import SCHEMA, Code, Status
from stagebench.stages import STAGES


def test_names_are_unique_and_every_stage_has_its_columns():
    assert len(set(SCHEMA.names)) == len(SCHEMA.names)
    for stage in STAGES:
        assert {f"{stage}_ms", f"{stage}_gpu_ms", f"{stage}_peak_bytes"} <= set(SCHEMA.names)


def test_times_are_doubles():
    for field in SCHEMA:
        if field.name.endswith("_ms") and field.name != "token_ms":
            assert field.type == pa.float64(), field.name


def test_statuses_are_those_of_the_documentation(repo):
    assert {s.value for s in Status} == {"ok", "capped", "nan", "oom", "error", "timeout", "skipped"}


@pytest.mark.parametrize("code", Code)
def test_every_code_is_documented(code, repo):
    assert f"`{code.value}`" in (repo / "docs" / "methodology.md").read_text(encoding="utf-8")


def test_consequences_follow_from_names():
    assert Code.INVALID_TOKEN_COUNT.invalid and Code.INVALID_TOKEN_COUNT.discards
    assert Code.DISCARDED_THROTTLED.discards and not Code.DISCARDED_THROTTLED.invalid
    assert not any(c.discards for c in Code if c.value.startswith(("warn_", "resumed", "reused")))
