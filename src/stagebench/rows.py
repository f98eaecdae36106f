"""A timing row: its columns, its statuses and its verdict codes. What timing jobs write and the merge reads.

A row is one sample (of a batch), one repeat, one length mode. Times are milliseconds; a stage that did not run is null, never 0.
"""

from __future__ import annotations

from enum import StrEnum

import pyarrow as pa

from stagebench.stages import STAGES

FORMAT_VERSION = 3


class Status(StrEnum):
    """How a run of a sample ended."""

    OK = "ok"
    CAPPED = "capped"
    """The natural length reached its cap, in this row or another of its batch (its times are one): timed, but in no natural-length mean."""
    NAN = "nan"
    OOM = "oom"
    ERROR = "error"
    TIMEOUT = "timeout"
    SKIPPED = "skipped"
    """The shard holds no pixels for this clip; `codes` and `reason` say why."""


class Code(StrEnum):
    """Why a row, a job or a study is not simply good. Documented in docs/methodology.md; INVALID_* make the study INVALID."""

    INVALID_ENCODER_CALLS = "invalid_encoder_calls"
    """The vision encoder ran another number of times than once, or outside `encode`."""
    INVALID_TOKEN_COUNT = "invalid_token_count"  # noqa: S105  (a verdict code, no password)
    """A fixed length was not met, or EOS stands elsewhere than at the end."""
    INVALID_PLAIN_DIFFERS = "invalid_plain_differs"
    """The run without instrumentation gave other output, or another total, beyond what repeats of the same run differ by."""
    INVALID_NO_ACCEPTED = "invalid_no_accepted"
    """No accepted sample is left."""
    INVALID_TOO_MANY_FAILED = "invalid_too_many_failed"
    INVALID_NOT_VERIFIED = "invalid_not_verified"
    """The decoupling proof of this model failed or is missing."""
    INVALID_NAN = "invalid_nan"
    SUSPECT_RESIDUAL = "suspect_residual"
    """|total - sum(stages)| over 1 % + 0.2 ms."""
    SUSPECT_CLOCKS = "suspect_clocks"
    """The host's and the device's clock disagree about the total by over 1 % + 0.2 ms."""
    DISCARDED_THROTTLED = "discarded_throttled"
    """The GPU reported a throttle reason at this sample's borders."""
    DISCARDED_CLOCK = "discarded_clock"
    DISCARDED_CAPTURE = "discarded_capture"
    """A graph was captured, or a program compiled, inside the timed window: a shape came up that preparation had not seen."""
    WARN_FIRST_SLOW = "warn_first_slow"
    """The first measured sample is an outlier against the rest: raise timing.warmup."""
    WARN_DRIFT = "warn_drift"
    """Time changes with the order of samples."""
    WARN_ANCHOR_DRIFT = "warn_anchor_drift"
    """The fixed workload took another time after the job than before."""
    WARN_NOISY = "warn_noisy"
    """repeats.target_cv was not reached."""
    WARN_NEIGHBOURS = "warn_neighbours"
    """Other processes were on the device."""
    WARN_UNSEEN = "warn_unseen"
    """The device does not show what a rule looks at (throttle reasons, other processes): the rule saw nothing, for it could not."""
    WARN_UNJUDGED = "warn_unjudged"
    """A plain run said something else, and asking the model whether rounding explains it failed."""
    WARN_SIDE_BY_SIDE = "warn_side_by_side"
    """timing.exclusive was false: other timing jobs may have run on this machine."""
    WARN_HARNESS = "warn_harness"
    """The harness itself costs over 1 % of a typical total: the null workload says what of the short stages is its own."""
    WARN_CPU_WAIT = "warn_cpu_wait"
    """A thread of the job stood ready for over 5 % of this run without a CPU, which none of the job's own threads can have had."""
    WARN_LOAD_AVERAGE = "warn_load_average"
    """The host was busy when the job began."""
    RESUMED = "resumed"
    """The job went on from its journal after it was killed."""
    REUSED = "reused"
    """The row was taken over from an earlier job of the same fingerprint."""

    @property
    def invalid(self) -> bool:
        return self.value.startswith("invalid_")

    @property
    def discards(self) -> bool:
        """Rows with such a code do not enter any mean."""
        return self.value.startswith(("discarded_", "suspect_", "invalid_"))


_TEXT = pa.string()
_MS = pa.float64()

SCHEMA = pa.schema(
    [
        *((name, _TEXT) for name in ("study", "dataset", "model", "variant", "engine", "quantization")),
        ("batch", pa.int32()),
        ("frames", pa.int32()),
        *((name, _TEXT) for name in ("input", "source", "dtype", "attention", "preprocess", "preset", "weights")),
        ("keep_visual", pa.float64()),
        *((name, _TEXT) for name in ("sample", "clip", "clip_digest", "sequence", "query", "id", "block")),
        ("repeat", pa.int32()),
        ("order", pa.int32()),
        ("length", _TEXT),
        ("status", _TEXT),
        ("reason", _TEXT),
        *((f"{stage}_ms", _MS) for stage in STAGES),
        *((name, _MS) for name in ("total_ms", "residual_ms", "ttft_ms")),
        *((f"{stage}_gpu_ms", _MS) for stage in STAGES),
        *((name, _MS) for name in ("total_gpu_ms", "plain_total_ms")),
        *((name, pa.int32()) for name in ("prompt_tokens", "visual_tokens", "new_tokens", "steps")),
        *((name, pa.int32()) for name in ("drafted_tokens", "accepted_tokens")),
        ("token_ids", pa.list_(pa.int32())),
        ("token_ms", pa.list_(pa.float32())),
        ("text", _TEXT),
        ("finish_reason", _TEXT),
        ("encoder_calls", pa.int32()),
        ("feature_hash", _TEXT),
        ("plain_token_ids", pa.list_(pa.int32())),
        ("plain_feature_hash", _TEXT),
        *((f"{stage}_peak_bytes", pa.int64()) for stage in STAGES),
        ("kv_bytes", pa.int64()),
        ("weights_bytes", pa.int64()),
        *((name, _MS) for name in ("limit_ms", "share_of_limit")),
        *((name, pa.float64()) for name in ("sm_clock_mhz", "temperature_c", "power_w", "energy_j", "harness_ms", "cpu_wait_ms")),
        *((f"{stage}_energy_j", pa.float64()) for stage in STAGES),
        ("job", _TEXT),
        ("codes", pa.list_(_TEXT)),
    ]
)
"""Per-batch times stand in every row of the batch; per-sample figures are derived (time / batch).

`steps`: decode steps of the whole batch, the longest answer's new_tokens - 1; samples that only fill the batch have no row but count here,
so that a time a token is decode_ms / steps, never decode_ms over a row's own tokens.
`clip_digest`: content digest of the clip's source files, by which rows of unchanged samples are taken over.
`keep_visual`: share of the visual tokens that the language model was given. `drafted_tokens`, `accepted_tokens`: what an engine that
guesses ahead proposed, and how much of it the model chose itself; null for other engines.
`plain_*`: total and output of a run of the same sample and repeat without instrumentation, where one was made.
`weights_bytes`: parameters and buffers of the whole model. `limit_ms`: bytes that one decode step reads (language model
without its embedding table, and KV cache) over the bandwidth measured in the same job; `share_of_limit`: limit_ms / (ms per token).
`<stage>_energy_j`: only in fixed lengths, of stages that are far longer than the period at which the device's energy counter moves.
`cpu_wait_ms`: for how long the thread that waited longest stood ready without a CPU inside the total, and no longer than others can have
had the job's CPUs (CPUs x wall - own CPU time), so that waits for its own threads are not in it; null where the
kernel does not tell. `harness_ms`: the harness's own cost of one sample, from the null workload.
File metadata of a timing file: b"stagebench.job", b"stagebench.study", b"stagebench.machine", each JSON."""
