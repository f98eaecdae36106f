"""VisionTimingHooks and EncoderCounter."""

import time

import pytest
import torch
from torch import nn

from stagebench.errors import EncoderNotFoundError
from stagebench.models.hooks import EncoderCounter, VisionTimingHooks, find_vision_modules


class Slow(nn.Module):
    def __init__(self, ms: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.ms = ms

    def forward(self, x):
        time.sleep(self.ms / 1e3)
        return x


class Model(nn.Module):
    def __init__(self, *towers: str, ms: float = 0.0):
        super().__init__()
        self.inner = nn.Module()
        for tower in towers:
            setattr(self.inner, tower, Slow(ms))
        self.head = Slow(20)

    def forward(self, x):
        for tower in self.inner.children():
            x = tower(x)
        return self.head(x)


@pytest.mark.parametrize("name", ["vision_tower", "video_tower", "image_tower", "visual", "visual_tower"])
def test_finds_the_usual_names(name):
    assert list(find_vision_modules(Model(name))) == [f"inner.{name}"]


def test_only_the_outermost_of_nested_towers():
    model = Model("visual_tower")
    model.inner.visual_tower.visual_tower = Slow()
    assert list(find_vision_modules(model)) == ["inner.visual_tower"]


def test_none_found_names_what_is_there():
    with pytest.raises(EncoderNotFoundError, match=r"inner, head.*module="):
        VisionTimingHooks(Model())


def test_sums_calls_of_all_towers_and_nothing_else():
    model = Model("video_tower", "image_tower", ms=15)
    hooks = VisionTimingHooks(model)
    hooks.register_hooks()
    hooks.register_hooks()  # a second registration must not count twice
    for _ in range(2):
        model(torch.zeros(1))
    seconds = hooks.get_vision_time()
    assert hooks.calls == 4
    assert 0.060 <= seconds < 0.099  # 4 x 15 ms; the head's 40 ms stay out
    hooks.reset()
    assert hooks.get_vision_time() == 0.0 and hooks.calls == 0
    hooks.unregister_hooks()
    model(torch.zeros(1))
    assert hooks.calls == 0


def test_time_stays_readable_after_unregistering_and_model_is_left_clean():
    model = Model("visual", ms=5)
    with VisionTimingHooks(model) as hooks:
        model(torch.zeros(1))
    assert hooks.get_vision_time() >= 0.005
    assert not model.inner.visual._forward_hooks and not model.inner.visual._forward_pre_hooks


def test_given_module():
    model = Model()
    with VisionTimingHooks(model, module=model.head) as hooks:
        model(torch.zeros(1))
    assert hooks.calls == 1 and hooks.get_vision_time() >= 0.02


def test_a_call_that_fails_leaves_no_open_span():
    model = Model("visual")
    model.inner.visual.forward = lambda x: 1 / 0
    with VisionTimingHooks(model) as hooks:
        with pytest.raises(ZeroDivisionError):
            model(torch.zeros(1))
        model.inner.visual.forward = lambda x: x
        model(torch.zeros(1))
    assert not any(hooks._open.values())


def test_counter_by_stage():
    model = Model("visual")
    with EncoderCounter(model.inner.visual) as counter:
        counter.enter("encode")
        model(torch.zeros(1))
        counter.enter("decode")
        assert (counter.count("encode"), counter.outside_encode) == (1, 0)
        model(torch.zeros(1))
        counter.add(2)  # replays of a graph
        assert (counter.count("decode"), counter.outside_encode, counter.total) == (3, 3, 4)
        counter.reset()
        assert counter.total == 0
    model(torch.zeros(1))
    assert counter.total == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: times by CUDA events")
def test_cuda_events_time_the_device():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4096, 4096))

        def forward(self, x):
            for _ in range(50):
                x = x @ self.weight
            return x

    model = nn.Module()
    model.visual = Tower()
    model.cuda()
    x = torch.randn(4096, 4096, device="cuda")
    with torch.inference_mode(), VisionTimingHooks(model) as hooks:
        model.visual(x)
        torch.cuda.synchronize()
        hooks.reset()
        begin = time.perf_counter()
        model.visual(x)
        launched = time.perf_counter() - begin
        assert hooks.get_vision_time() > 2 * launched  # the work, not its launch
