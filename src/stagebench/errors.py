"""Every error that stagebench raises on purpose.

    StagebenchError
    ├── ConfigError            a key, type or combination in the configuration
    ├── DatasetError           the index or a path in it
    │   └── UnsafePathError    a path that leaves the dataset's root
    ├── SourceError            one clip cannot be read; the sample is set aside, the job goes on
    │   ├── UnsafeFileError    a file that would run code or claims more than it holds
    │   │   └── TooLargeError  a file that would decode to far more than a clip may
    │   ├── ShortClipError     fewer frames than asked for
    │   ├── NoVideoError       nothing in it that could be a frame
    │   ├── RefusedClipError   a property that would give wrong or arguable frames
    │   └── CorruptClipError   bytes that do not decode to what they promise
    │       └── TruncatedClipError   the end of the file is missing
    ├── StoreError             a shard that cannot be trusted
    │   └── ChecksumError      bytes that changed since they were written
    ├── PlanError              the plan does not fit what is on disk
    ├── BusyError              another run works in the same results folder
    ├── ModelError             weights, preset, adapter or engine
    │   └── EncoderNotFoundError   no vision module to count and hook
    ├── TimingError            a timing job that cannot give valid numbers
    │   └── SampleTimeoutError one sample ran too long; it becomes a row, the job goes on
    ├── VerifyError            decoupled and monolithic disagree
    └── MergeError             rows that must not be pooled

A message says what was found, what was expected, where, and what to do.
"""


class StagebenchError(Exception):
    """Base of all errors raised on purpose; its message is meant to be read by a person."""


class ConfigError(StagebenchError):
    """A key, type or combination in the configuration is wrong."""


class DatasetError(StagebenchError):
    """The dataset's index, or a path in it, is wrong."""


class UnsafePathError(DatasetError):
    """A path in the index leaves the dataset's root."""


class SourceError(StagebenchError):
    """One clip cannot be read. The clip becomes a failed row; the job goes on."""


class UnsafeFileError(SourceError):
    """A file would run code, or claims more than it holds."""


class TooLargeError(UnsafeFileError):
    """A file would decode to far more than a clip may; it is refused before decoding."""


class NoVideoError(SourceError):
    """A file or folder has nothing in it that could be a frame: empty, audio only, no samples."""


class RefusedClipError(SourceError):
    """A clip has a property that would give wrong or arguable frames: its size changes, its rotation is not allowed."""


class ShortClipError(SourceError):
    """A clip has fewer frames or events than asked for."""


class CorruptClipError(SourceError):
    """A clip's bytes do not decode to what they promise."""


class TruncatedClipError(CorruptClipError):
    """The end of a clip's file is missing."""


class StoreError(StagebenchError):
    """A shard is missing something or holds something else than its name says."""


class ChecksumError(StoreError):
    """A shard's bytes changed since they were written."""


class PlanError(StagebenchError):
    """The plan does not fit what is on disk."""


class BusyError(StagebenchError):
    """Another run works in the same results folder."""


class ModelError(StagebenchError):
    """A model's weights, preset, adapter or engine cannot be used."""


class EncoderNotFoundError(ModelError):
    """No vision module was found to count and hook."""


class TimingError(StagebenchError):
    """A timing job cannot give valid numbers."""


class SampleTimeoutError(TimingError):
    """One run of a sample took longer than timing.sample_timeout_s. The sample becomes a row; the job goes on."""


class VerifyError(StagebenchError):
    """Decoupled and monolithic runs of a model disagree."""


class MergeError(StagebenchError):
    """Rows that must not be pooled were about to be."""
