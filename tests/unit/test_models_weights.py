"""Real weights from a folder: what loads, what is refused, what the digests say."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stagebench.errors import ModelError
from stagebench.models import _weights, presets, registry
from stagebench.models.base import Decoding, ModelSpec

FRAMES = [np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8) for i in range(3)]
QUERY = "What is moving?"
DECODING = Decoding(8, 8)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def loaded(weights, architecture, preset=None, **kwargs):
    adapter = registry.create("eventgpt" if architecture == "eventgpt" else "hf")
    adapter.load(ModelSpec(str(weights), architecture, preset, **kwargs), "cpu")
    return adapter


def save(adapter, folder: Path, chat: str | None = None) -> Path:
    adapter.language_model().save_pretrained(folder)
    route = getattr(adapter, "route", None) or adapter.processor
    if hasattr(route, "processor"):
        route.processor.tokenizer.chat_template = chat
        route.processor.chat_template = chat
        route.processor.save_pretrained(folder)
    else:
        adapter.codec.tokenizer.save_pretrained(folder)
        route.image_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save(loaded("dummy:1", "llava", "tiny"), tmp_path_factory.mktemp("checkpoints") / "llava")


@pytest.mark.parametrize("architecture", presets.ARCHITECTURES)
def test_a_saved_folder_gives_the_same_model(architecture, tmp_path):
    chat = {
        "qwen2_5_vl": CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        "llava_onevision": CHAT.replace("IMAGE", "<image>"),
    }
    dummy = loaded("dummy:1", architecture, "tiny")
    folder = save(dummy, tmp_path, chat.get(architecture))
    real = loaded(folder, architecture)
    for name, tensor in dummy.language_model().state_dict().items():
        assert torch.equal(tensor, real.language_model().state_dict()[name]), name
    assert real.tokenizer_digest() == dummy.tokenizer_digest()
    inputs = real.preprocess(FRAMES, QUERY)
    if architecture not in chat:  # those have another prompt: the checkpoint's chat template
        assert torch.equal(inputs.input_ids, dummy.preprocess(FRAMES, QUERY).input_ids)
    for key, pixels in dummy.preprocess(FRAMES, QUERY).pixels.items():
        assert torch.equal(pixels, inputs.pixels[key])
    assert real.monolithic(inputs, DECODING).ids == dummy.monolithic(inputs, DECODING).ids
    assert real.spec.architecture == dummy.language_model().config.model_type or architecture == "eventgpt"
    assert real.eos_token_ids() == dummy.eos_token_ids()


def test_llava_next_needs_a_config_stanza_only(tmp_path):
    """A family that nothing here knows by name: through its own processor and chat template."""
    import transformers

    preset = presets.build("llava", "tiny")
    vision, text = preset.config.vision_config, preset.config.text_config
    config = transformers.LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=32000, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]]
    )
    torch.manual_seed(0)
    transformers.LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path)
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=config.image_grid_pinpoints
    )
    transformers.LlavaNextProcessor(
        images, preset.codec.tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(tmp_path)
    adapter = loaded(tmp_path, "llava_next", prompt="USER: {images}\n{query} ASSISTANT:")
    samples = [adapter.preprocess(frames, QUERY) for frames in (FRAMES, FRAMES[:1], [f[:30] for f in FRAMES[:2]])]
    for inputs in (*samples, adapter.collate(samples)):
        prompt = adapter.merge(inputs, adapter.encode(inputs))
        with torch.inference_mode():
            ids = adapter.language_model().generate(
                inputs_embeds=prompt.embeds,
                attention_mask=prompt.attention_mask,
                position_ids=prompt.position_ids,
                max_new_tokens=8,
                min_new_tokens=8,
            )
        assert tuple(map(tuple, ids.tolist())) == adapter.monolithic(inputs, DECODING).ids


def test_pickled_weights_of_tensors_load(llava, tmp_path):
    weights = load_file(llava / "model.safetensors")
    copy(llava, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    adapter = loaded(tmp_path, "llava")
    assert torch.equal(
        adapter.language_model().lm_head.weight, weights["language_model.lm_head.weight"]
    )  # 5.x writes the published key layout


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_pickled_code_is_refused_and_not_run(llava, tmp_path):
    copy(llava, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name, write in (("torch", torch.save), ("pickle", lambda value, path: path.write_bytes(pickle.dumps(value)))):
        write({"lm_head.weight": torch.zeros(1), "x": Evil(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ModelError, match="convert other files to safetensors"):
            loaded(tmp_path, "llava")
        assert not (tmp_path / "ran").exists(), name


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_auto_map_is_refused(llava, tmp_path, file):
    copy(llava, tmp_path)
    path = tmp_path / file
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, "auto_map": {"AutoModel": "evil.Evil"}}))
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    with pytest.raises(ModelError, match=r"auto_map.*remove the auto_map key"):
        loaded(tmp_path, "llava")
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_shape_are_refused(llava, tmp_path):
    copy(llava, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 200
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json|weights cannot be loaded"):
        loaded(tmp_path, "llava")


def test_a_missing_weight_is_refused(llava, tmp_path):
    """transformers would fill it with random numbers, and only warn."""
    copy(llava, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "mlp.down_proj" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys, the first: .*mlp\.down_proj"):
        loaded(tmp_path, "llava")


def test_a_cut_off_file_is_refused(llava, tmp_path):
    copy(llava, tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        loaded(tmp_path, "llava")


def test_unknown_model_type(llava, tmp_path):
    copy(llava, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(ModelError, match="unheard_of"):
        loaded(tmp_path, "llava")


@pytest.mark.parametrize("weights", ["/no/such/folder", "./nowhere", "nothing"])
def test_no_such_folder(weights):
    with pytest.raises(ModelError, match="no such folder"):
        loaded(weights, "llava")


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        loaded(tmp_path, "llava")


def test_revision_follows_the_bytes(llava, tmp_path):
    copy(llava, tmp_path)
    before = loaded(tmp_path, "llava").revision()
    assert before == _weights.content_digest(llava) == _weights.content_digest(tmp_path, threads=1)
    (tmp_path / "notes.md").write_text("not a model file")
    assert _weights.content_digest(tmp_path) == before
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert _weights.content_digest(tmp_path) != before


def copy(folder: Path, to: Path) -> None:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
