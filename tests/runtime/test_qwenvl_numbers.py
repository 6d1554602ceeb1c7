"""Qwen-VL computes what MindFormers and the hub's code recorded, and a fault would show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own pages use

import qwenvlgolden as golden
from mmconvert.errors import CheckpointError, MMConvertError, ReplicaError
from mmconvert.runtime.qwenvl import model as text
from mmconvert.runtime.qwenvl import vision
from mmconvert.runtime.qwenvl.model import Cache, Places, QwenVLModel
from qwenvl import devices, hf_to_ms, resplit_ms
from qwenvlgolden import LOGITS, VISION, away, recorded


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.make(tmp_path_factory.mktemp("qwenvl") / "hf")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def test_the_hubs_numbers_are_the_default(hf: Path) -> None:
    model = golden.load(hf)
    pixels, pos = recorded("pixels"), recorded("one_pos")[0]
    seen = model.transformer.visual(pixels)
    assert away(seen, "hub_vis_out_every8", 8) <= VISION
    assert away(seen[:1], "hfpos_vis_out_every8", 8) <= VISION
    logits = model(recorded("one_ids"), pixels[:1], pos)
    assert away(logits, "hub_one_logits_every8", 8) <= LOGITS
    assert away(logits, "hfpos_one_logits_every8", 8) <= LOGITS
    assert away(model(recorded("text_ids")), "hub_text_logits") <= LOGITS


def test_mindformers_numbers_behind_its_flag(hf: Path) -> None:
    model = golden.load(hf, "mindformers")
    assert max(golden.mindformers(model).values()) <= 1
    for side in (224, 140):
        seen = model.transformer.visual(recorded(f"pixels_{side}"))
        assert away(seen, f"vis_out_{side}_every8", 8) <= VISION
    pixels = recorded("pixels")
    two = model(recorded("two_ids"), pixels, recorded("two_pos")[0])
    assert away(two, "two_logits_every16", 16) <= LOGITS
    ids, slots = recorded("batch_ids"), recorded("batch_pos").flatten(0, 1)
    slots[1, :, 0] = 1  # recorded before MindFormers adds the row's number
    batch = model(ids, pixels, slots, ids != golden.PAD)
    assert away(batch[:, -8:], "batch_logits_last8") <= LOGITS


def test_beyond_the_training_length_angles_and_queries_are_scaled(hf: Path) -> None:
    model = golden.short(golden.load(hf), int(recorded("long_seq_length")))
    ids, cache, found = recorded("long_ids"), Cache(), list[int]()
    assert away(model(ids), "long_logits_every8", 8) <= LOGITS
    for _ in range(8):
        ids = model(ids, cache=cache, last=True).argmax(-1)
        found.append(int(ids))
    assert found == recorded("long_new").tolist()


def test_mindspore_files_and_rank_folders_hold_the_same_model(hf: Path, tmp_path: Path) -> None:
    hf_to_ms(hf, tmp_path / "x.ckpt", "--cfg.dtype", "fp32")
    sliced = devices(model_parallel=2, pipeline_stage=3)
    resplit_ms(tmp_path / "x.ckpt", tmp_path / "sliced", *sliced)
    resplit_ms(tmp_path / "x.ckpt", tmp_path / "copied", *devices(data_parallel=2))
    expected = golden.load(hf).state_dict()
    for path in (tmp_path / name for name in ("x.ckpt", "sliced", "copied")):
        found = golden.load(path, config=hf).state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_copies_that_differ_are_refused(hf: Path, tmp_path: Path) -> None:
    hf_to_ms(hf, tmp_path / "x.ckpt")
    resplit_ms(tmp_path / "x.ckpt", tmp_path / "ranks", *devices(data_parallel=2))
    path = tmp_path / "ranks" / "rank_1" / "checkpoint_1.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    with pytest.raises(ReplicaError) as error:
        golden.load(tmp_path / "ranks", config=hf)
    assert "differ" in error.value.what


@pytest.mark.parametrize("name", ["none.ckpt", "notes.txt", "."])
def test_what_is_no_checkpoint_is_said(name: str, hf: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(CheckpointError) as error:
        golden.load(tmp_path / name, config=hf)
    assert str(tmp_path) in error.value.what


def test_a_checkpoint_of_other_sizes_is_refused(hf: Path, tmp_path: Path) -> None:
    other = golden.make(tmp_path / "other", intermediate_size=350)
    with pytest.raises(MMConvertError):
        golden.load(hf, config=other)


# ------------------------------------------------------------------------------- one fact changed


def gate_on_w1(self: text.GatedMLP, x: Tensor) -> Tensor:
    return self.c_proj(F.silu(self.w1(x)) * self.w2(x))


def interleaved(x: Tensor, places: Places) -> Tensor:
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2))
    cos, sin = places.cos[:, :half], places.sin[:, :half]
    one, two = pairs.unbind(-1)
    return torch.stack((one * cos - two * sin, two * cos + one * sin), -1).flatten(-2)


def tanh_gelu(self: vision.VisionMLP, x: Tensor) -> Tensor:
    return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


def contiguous(self: vision.VisionAttention, x: Tensor) -> Tensor:
    q, k, v = (vision.heads_of(part, self.heads) for part in self.in_proj(x).chunk(3, -1))
    out = F.scaled_dot_product_attention(q, k, v)
    return self.out_proj(out.transpose(1, 2).flatten(2))


def _resampled(self: vision.Resampler, x: Tensor, query: float, value: float) -> Tensor:
    x = self.ln_kv(self.kv_proj(x))
    q = (self.ln_q(self.query) + query * self.pos_embed).expand(len(x), -1, -1)
    at = vision.stretch(self.pos_embed, x.shape[1], self.positions)
    return self.attn(q, x + at, x + value * at)


def positions_on_values(self: vision.Resampler, x: Tensor) -> Tensor:
    return _resampled(self, x, 1, 1)


def no_positions_on_queries(self: vision.Resampler, x: Tensor) -> Tensor:
    return _resampled(self, x, 0, 0)


def one_slot_later(
    self: QwenVLModel, ids: Tensor, pixels: Tensor | None, slots: Tensor | None
) -> Tensor:
    moved = None if slots is None else slots + torch.tensor([0, 1])
    return EMBED(self, ids, pixels, moved)


def pads_seen(self: QwenVLModel, x: Tensor, keep: Tensor | None, cache: Cache | None) -> Places:
    return PLACES(self, x, None, cache)


EMBED, PLACES = QwenVLModel.embed, QwenVLModel.places
Patch = Callable[[pytest.MonkeyPatch, QwenVLModel], object]


def norms(patch: pytest.MonkeyPatch, model: QwenVLModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            patch.setattr(module, "eps", 1e-5)


def transposed(patch: pytest.MonkeyPatch, model: QwenVLModel) -> None:
    visual = model.transformer.visual
    patch.setattr(visual, "proj", nn.Parameter(visual.proj.T.contiguous()))


def of_the_hub(patch: pytest.MonkeyPatch, model: QwenVLModel) -> None:
    patch.setattr(model.transformer.visual, "positions", "hub")
    patch.setattr(model.transformer.visual.attn_pool, "positions", "hub")


def base(patch: pytest.MonkeyPatch, model: QwenVLModel) -> None:
    sizes = text.Sizes(**{**vars(model.sizes), "base": 1e6})
    patch.setattr(model, "sizes", sizes)


MUTATIONS: dict[str, tuple[Patch, str]] = {
    "half pixel centres": (of_the_hub, "vision"),
    "bicubic a -0.5": (lambda p, m: p.setattr(vision, "A", -0.5), "vision"),
    "gate on w1": (lambda p, m: p.setattr(text.GatedMLP, "forward", gate_on_w1), "text"),
    "rope interleaved": (lambda p, m: p.setattr(text, "rotate", interleaved), "text"),
    "rope base 1e6": (base, "text"),
    "rms eps 1e-5": (lambda p, m: p.setattr(text, "EPS", 1e-5), "text"),
    "layer norm eps 1e-5": (norms, "vision"),
    "tanh gelu": (lambda p, m: p.setattr(vision.VisionMLP, "forward", tanh_gelu), "vision"),
    "vision qkv not interleaved": (
        lambda p, m: p.setattr(vision.VisionAttention, "forward", contiguous),
        "vision",
    ),
    "positions on values too": (
        lambda p, m: p.setattr(vision.Resampler, "forward", positions_on_values),
        "vision",
    ),
    "no positions on queries": (
        lambda p, m: p.setattr(vision.Resampler, "forward", no_positions_on_queries),
        "vision",
    ),
    "proj transposed": (transposed, "vision"),
    "picture one slot later": (
        lambda p, m: p.setattr(QwenVLModel, "embed", one_slot_later),
        "picture",
    ),
    "padding not masked": (lambda p, m: p.setattr(QwenVLModel, "places", pads_seen), "pad"),
    "masked by -inf": (lambda p, m: p.setattr(text, "MASKED", -1e30), "leftpad"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_fact_would_be_seen(name: str, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden.load(hf, "mindformers")
    change, where = MUTATIONS[name]
    change(monkeypatch, model)
    assert not golden.mindformers(model)[where] <= 1  # NaN is seen too
