"""Which raw files a study reads: what must be fetched before it can be planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stagebench.config import Config
from stagebench.errors import ConfigError
from stagebench.plan.specs import expand_variants, origin

if TYPE_CHECKING:
    from stagebench.dataset import Dataset

__all__ = ["raw_files"]


def raw_files(config: Config, dataset: Dataset) -> list[str]:
    """Paths below the dataset's root of every file that extraction, proofs and live sources of this study read, sorted.

    Raises ConfigError for a clip that is a folder of images: what a folder holds cannot be asked over HTTP.
    """
    uses = {(v.settings["input"], v.settings["source"]) for m in config.models.values() for v in expand_variants(config, m.input)}
    found: set[str] = set()
    for clip in dataset.clips.values():
        for kind, source in uses:
            entry = origin(clip, kind, source)
            files = () if entry is None else clip.files[entry]
            if entry == "frames" or (entry == "images" and isinstance(files, str)):
                raise ConfigError(
                    f"{dataset.name}: clip {clip.key} is a folder of images ({files}), which cannot be listed from here. Copy the dataset "
                    "with a tool that lists folders (rclone, aws s3 sync), or give the clips MP4s."
                )
            found.update((files,) if isinstance(files, str) else files)
    return sorted(found)
