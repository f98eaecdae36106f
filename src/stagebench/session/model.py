"""A job's model: loaded once, weighed, and identified."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from stagebench.config import Config
from stagebench.errors import ModelError
from stagebench.models import registry
from stagebench.models.base import Adapter, ModelSpec
from stagebench.plan.adapters import adapter_packages
from stagebench.rows import FORMAT_VERSION

if TYPE_CHECKING:
    from stagebench.plan import TimingJob

__all__ = ["load_adapter", "model_spec", "step_bytes", "study_fingerprint", "weights_bytes"]

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_spec(config: Config, job: TimingJob, device: str) -> ModelSpec:
    """The weights, shape and precision that a job's settings ask for on this device."""
    model, settings = config.models[job.model], job.variant.settings
    dtype = settings["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return ModelSpec(
        weights=model.weights,
        architecture=model.architecture or job.model,
        preset=model.preset,
        dtype=_DTYPES[dtype],
        attention=settings["attention"],
        frames_as=model.frames_as,
        quantization=settings["quantization"],
        prompt=model.prompt,
        preprocess=settings.get("preprocess", "pil"),
        keep_visual=settings.get("keep_visual", 1.0),
    )


def load_adapter(config: Config, job: TimingJob, *, device: str | None = None) -> Adapter:
    """Build the job's model on the device (null: CUDA where there is one). Raises ModelError with the remedy."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapter = registry.create(config.models[job.model].adapter)
    begin = time.perf_counter()
    with torch.inference_mode():
        adapter.load(model_spec(config, job, device), device)
        if job.variant.settings["engine"] == "speculative":
            cast(Any, adapter).draft = _load_draft(config, job, adapter.spec, device)
    log.info("%s: loaded on %s in %.1f s", job.model, device, time.perf_counter() - begin)
    return adapter


def _load_draft(config: Config, job: TimingJob, spec: ModelSpec, device: str) -> Adapter:
    """The model that guesses for engine speculative, in the same dtype, never quantised."""
    model = config.models[job.model]
    if model.draft is None:
        raise ModelError(f"{job.model}: engine speculative needs models.{job.model}.draft: {{weights: ..., preset: ...}}.")
    draft = registry.create(model.draft.adapter or model.adapter)
    architecture = model.draft.architecture or model.architecture or job.model
    draft.load(ModelSpec(model.draft.weights, architecture, model.draft.preset, dtype=spec.dtype, attention=spec.attention), device)
    return draft


def weights_bytes(adapter: Adapter) -> int:
    """Bytes of the model's parameters and buffers, each counted once: language model, vision module, what else the adapter holds."""
    modules = [adapter.language_model(), adapter.vision_module()]
    modules += [value for value in vars(adapter).values() if isinstance(value, nn.Module)]
    return _bytes(t for module in modules for t in (*module.parameters(), *module.buffers()))


def step_bytes(adapter: Adapter) -> int:
    """Bytes of weights that one decode step reads: the text decoder and the output head.

    The embedding table is left out (a step reads one row of it) unless it is the output head too.
    """
    model: Any = adapter.language_model()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    decoder = getattr(decoder, "language_model", decoder)  # a multimodal trunk holds the vision tower as well
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    table = decoder.get_input_embeddings() if hasattr(decoder, "get_input_embeddings") else None
    parts = [part for name in ("layers", "norm") if isinstance(part := getattr(decoder, name, None), nn.Module)]
    if len(parts) == 2:  # LLaMA's shape: leaves out a projector or adaptor that lives in the trunk
        decoder = nn.ModuleList(parts)
    vision = {id(p) for p in adapter.vision_module().parameters()}
    left_out = vision | ({id(p) for p in table.parameters()} if table is not None else set())
    read = [p for p in decoder.parameters() if id(p) not in left_out]
    if head is not None:
        read += list(head.parameters())
    return _bytes(read)


def study_fingerprint(config: Config, job: TimingJob, spec: ModelSpec, adapter: Adapter, reading: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as applied: rows are pooled, taken over and resumed only where these agree.

    reading: the extraction spec of the job's clips. How samples divide into shards and blocks is no part of it.
    """
    timing = config.timing.model_dump(mode="json", exclude={"max_samples", "reuse"})
    # as installed where the job runs, which need not be where it was planned; nothing for adapters that are built in
    packages = adapter_packages(config)[job.model]
    if getattr(adapter, "draft", None) is None:
        packages.pop("draft_adapter", None)
    return {
        "format": FORMAT_VERSION,
        "study": config.study,
        "dataset": job.dataset,
        "model": {
            "name": job.model,
            "adapter": config.models[job.model].adapter,
            "architecture": spec.architecture,
            "preset": spec.preset,
            "weights": spec.weights,
            "revision": adapter.revision(),
            "tokenizer": adapter.tokenizer_digest(),
            "frames_as": spec.frames_as,
            "prompt": spec.prompt,
            **({"package": packages["adapter"]} if "adapter" in packages else {}),
        },
        **({"draft_package": packages["draft_adapter"]} if "draft_adapter" in packages else {}),
        "draft": _draft_identity(adapter),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "variant": dict(job.variant.settings),
        "reading": dict(reading),
        "timing": timing,
    }


def _draft_identity(adapter: Adapter) -> str | None:
    draft: Adapter | None = getattr(adapter, "draft", None)
    return None if draft is None else f"{draft.spec.architecture} {draft.revision()}"


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Storage bytes, tied tensors once."""
    return sum(_storage(t) for t in {id(t): t for t in tensors}.values())


def _storage(tensor: Any) -> int:
    """A quantised tensor shows the shape and dtype of what it stands for; its bytes are those of the tensors inside."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_storage(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.numel() * tensor.element_size())
