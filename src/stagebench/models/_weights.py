"""Where weights come from: a checkpoint folder that runs no code, or a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from stagebench.errors import ModelError
from stagebench.models._text import read_json
from stagebench.models.base import ModelSpec

__all__ = ["checkpoint_folder", "content_digest", "from_folder", "random_model"]

_READ = 1 << 22
_RELEVANT = (".safetensors", ".bin", ".pt", ".json", ".model", ".txt", ".jinja")


def checkpoint_folder(weights: str) -> Path:
    """The local folder that `weights` names; a hub id is fetched into the hub's own cache.

    Raises ModelError when there is no such folder or id, and for a checkpoint that wants to bring its own code.
    """
    folder = Path(weights).expanduser()
    if not folder.is_dir():
        folder = _from_hub(weights)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json, so this is no checkpoint. Point models.<name>.weights at the folder that holds it.")
    for path in sorted(folder.glob("*config.json")):
        if "auto_map" in read_json(path):
            raise ModelError(
                f"{path}: has auto_map, which asks for Python code from the checkpoint to be run; stagebench never runs it. "
                "Use a conversion of this model to transformers' own classes (often published as <name>-hf), remove the auto_map key where "
                "transformers has the class, or write an adapter (docs/adding-a-model.md)."
            )
    return folder


def _from_hub(weights: str) -> Path:
    if weights.startswith((".", "/", "~")) or weights.count("/") != 1:
        raise ModelError(
            f'weights {weights!r}: no such folder. Give a local folder, a hub id (owner/name), or "dummy:<seed>" with a preset.'
        )
    try:
        from huggingface_hub import list_repo_files, snapshot_download

        files = list_repo_files(weights)
        binary = "*.safetensors" if any(name.endswith(".safetensors") for name in files) else "*.bin"
        return Path(snapshot_download(weights, allow_patterns=[binary, "*.json", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # offline, unknown, gated: the hub's own exceptions differ between versions
        raise ModelError(
            f"weights {weights!r}: no such folder, and not to be had from the hub ({type(error).__name__}: {error}). "
            "Download it where there is a network and give the folder, or use dummy:<seed> with a preset."
        ) from error


def content_digest(folder: Path, threads: int = 8) -> str:
    """blake2b over names and bytes of the weight, config and tokenizer files; files are read in parallel.

    Folders below count too: `mm_visual_tower` may name one.
    """
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and p.suffix in _RELEVANT and not any(q.startswith(".") for q in p.relative_to(folder).parts)
    )
    total = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for path, digest in zip(files, pool.map(_file_digest, files), strict=True):
            total.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            digest.update(chunk)
    return digest.hexdigest()


def from_folder(auto: Any, folder: Path, spec: ModelSpec, device: torch.device, **kwargs: Any) -> Any:
    """`auto.from_pretrained(folder)` on the device, in the spec's dtype and attention.

    Reads safetensors, or pickles with `weights_only=True`.

    Raises ModelError when a weight is missing, does not fit, or a file holds more than tensors.
    """
    try:
        model, info = auto.from_pretrained(
            folder,
            dtype=spec.dtype,
            attn_implementation=spec.attention,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **kwargs,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{folder}: the weights cannot be loaded ({type(error).__name__}: {error}). Only safetensors, and pickles that hold "
            "nothing but tensors, are read: convert other files to safetensors on a machine that may run them."
        ) from error
    wrong = {key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "mismatched_keys")}
    for key, names in wrong.items():
        if names:
            raise ModelError(
                f"{folder}: {len(names)} {key.replace('_', ' ')}, the first: {', '.join(names[:3])}. "
                "transformers would fill them with random numbers: fetch the whole checkpoint, or check that its config.json "
                "belongs to these weights."
            )
    return model.to(device).eval()


def check_attention(attention: str) -> None:
    """Raises ModelError for a flash kernel that is not installed: transformers would fetch one from the hub in the middle of a job."""
    if attention.startswith("flash_attention") and find_spec("flash_attn") is None:
        raise ModelError(f"attention {attention!r} needs the flash-attn package, which is not installed. Install it, or use sdpa.")


def random_model(auto: Any, config: Any, spec: ModelSpec, device: torch.device) -> Any:
    """Random weights of the config's shape, made on the device in the spec's dtype.

    The same seed gives the same weights on the same device.

    The model is built in its dtype: casting it afterwards would round RoPE's `inv_freq`, which has to stay float32.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device), _default_dtype(spec.dtype):
        torch.manual_seed(spec.dummy_seed or 0)
        model = auto.from_config(config, dtype=spec.dtype, attn_implementation=spec.attention)
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
