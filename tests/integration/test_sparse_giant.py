"""InternVL2-76B in its true sizes: 152 GB of weights, of which only the headers are real.

The data are holes in sparse files. The documented command for 16 pipeline stages is planned
and proven with ``--dry-run`` in a process whose memory is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
from safetensors import safe_open

from nights import night

LLM = "[[0,0,0,1,5,6,7,7,7,7,7,7,7,7,6,6]]"
VIT = "[[11,12,12,10,0,0,0,0,0,0,0,0,0,0,0,0]]"
HIDDEN, LAYERS, KV, FFN, VOCAB = 8192, 80, 1024, 28672, 128265
WIDTH, VIT_LAYERS, VIT_FFN = 3200, 45, 12800
FILES = 31
MIB = 1 << 20

Shape = tuple[int, ...]


def tensors() -> Iterator[tuple[str, Shape]]:
    """The tensors of OpenGVLab/InternVL2-Llama3-76B."""
    e = "vision_model.embeddings."
    yield f"{e}class_embedding", (1, 1, WIDTH)
    yield f"{e}patch_embedding.bias", (WIDTH,)
    yield f"{e}patch_embedding.weight", (WIDTH, 3, 14, 14)
    yield f"{e}position_embedding", (1, 1025, WIDTH)
    for layer in range(VIT_LAYERS):
        v = f"vision_model.encoder.layers.{layer}."
        for name in ("ls1", "ls2", "norm1.weight", "norm2.weight"):
            yield v + name, (WIDTH,)
        for name in ("q_norm", "k_norm"):
            yield f"{v}attn.{name}.weight", (WIDTH,)
        yield f"{v}attn.qkv.weight", (3 * WIDTH, WIDTH)
        yield f"{v}attn.proj.weight", (WIDTH, WIDTH)
        yield f"{v}attn.proj.bias", (WIDTH,)
        yield f"{v}mlp.fc1.weight", (VIT_FFN, WIDTH)
        yield f"{v}mlp.fc1.bias", (VIT_FFN,)
        yield f"{v}mlp.fc2.weight", (WIDTH, VIT_FFN)
        yield f"{v}mlp.fc2.bias", (WIDTH,)
    yield "mlp1.0.weight", (4 * WIDTH,)
    yield "mlp1.0.bias", (4 * WIDTH,)
    yield "mlp1.1.weight", (HIDDEN, 4 * WIDTH)
    yield "mlp1.1.bias", (HIDDEN,)
    yield "mlp1.3.weight", (HIDDEN, HIDDEN)
    yield "mlp1.3.bias", (HIDDEN,)
    yield "language_model.model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        t = f"language_model.model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{t}{name}.weight", (HIDDEN,)
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV), ("o", HIDDEN)):
            yield f"{t}self_attn.{name}_proj.weight", (rows, HIDDEN)
        yield f"{t}mlp.gate_proj.weight", (FFN, HIDDEN)
        yield f"{t}mlp.up_proj.weight", (FFN, HIDDEN)
        yield f"{t}mlp.down_proj.weight", (HIDDEN, FFN)
    yield "language_model.model.norm.weight", (HIDDEN,)
    yield "language_model.lm_head.weight", (VOCAB, HIDDEN)


CONFIG = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "llm_config": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": 64,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    },
    "vision_config": {
        "hidden_size": WIDTH,
        "intermediate_size": VIT_FFN,
        "norm_type": "rms_norm",
        "num_attention_heads": 25,
        "num_hidden_layers": VIT_LAYERS,
        "qk_normalization": True,
        "qkv_bias": False,
    },
}


def write_sparse(folder: Path) -> tuple[int, int]:
    """The checkpoint with holes for data; the number of tensors and their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    listed = list(tensors())
    total = sum(2 * prod(shape) for _, shape in listed)
    runs: list[list[tuple[str, Shape]]] = [[]]
    done = 0
    for name, shape in listed:
        if done * FILES >= total * len(runs):
            runs.append([])
        runs[-1].append((name, shape))
        done += 2 * prod(shape)
    weight_map: dict[str, str] = {}
    for number, run in enumerate(runs, 1):
        file = f"model-{number:05d}-of-{len(runs):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in run:
            begin, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(listed), total


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """The folder, its number of tensors and of bytes."""
    parent = tmp_path_factory.mktemp("giant")
    try:
        (parent / "probe").touch()
        os.truncate(parent / "probe", 6 << 30)
    except OSError as error:
        pytest.skip(f"no large sparse files here: {error}")
    (parent / "probe").unlink()
    count, total = write_sparse(parent / "hf")
    used = sum(p.stat().st_blocks * 512 for p in (parent / "hf").iterdir())
    if used > 64 * MIB:
        pytest.skip("this file system does not keep holes")
    return parent / "hf", count, total


# The peak that the kernel reports for a child begins at that of the process which started it, so
# a small one starts it, not this one.
LAUNCHER = """
import json, os, sys, time
began = time.monotonic()
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[2:]], os.environ)
_, status, usage = os.wait4(pid, 0)
unit = 1 if sys.platform == "darwin" else 1024
seconds = time.monotonic() - began
with open(sys.argv[1], "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit, seconds], file)
"""


def measured(note: Path, *words: str | Path) -> tuple[int, str, str, int, float]:
    """Exit code, stdout, stderr, peak resident bytes and seconds of one command."""
    launcher = [sys.executable, "-c", LAUNCHER, str(note)]
    command = [*launcher, "-m", "mmconvert", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    code, peak, seconds = json.loads(note.read_text())
    note.unlink()
    return code, done.stdout, done.stderr, peak, seconds


def flags(llm: str, vit: str, tp: int) -> list[str]:
    prefix = "--cfg.parallel_config."
    given = {"llm_pp_layers": llm, "vit_pp_layers": vit, "tp_size": str(tp)}
    return [word for key, value in given.items() for word in (prefix + key, value)]


def test_the_stand_in_is_the_real_thing(giant: tuple[Path, int, int]) -> None:
    """152.5 GB in 1318 tensors that the public library sees too."""
    folder, count, total = giant
    assert 152e9 < total < 153e9
    found = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            found += len(file.keys())
    assert found == count
    assert len(list(folder.glob("*.safetensors"))) == FILES


@pytest.mark.parametrize(
    ("name", "layout"),
    [("PP 16, as documented", flags(LLM, VIT, 1)), night("TP 8", flags("[80]", "[45]", 8))],
)
def test_a_dry_run(
    name: str,
    layout: list[str],
    giant: tuple[Path, int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Everything is proven in less than 500 MiB; nothing is written."""
    folder, _, total = giant
    words = ["--cfg.hf_config.hf_dir", folder, "--cfg.mm_dir", tmp_path / "mm", *layout]
    words += ["--cfg.trust_remote_code", "True", "--dry-run", "--json"]
    code, out, err, peak, seconds = measured(
        tmp_path / "note", "InternVLConverter", "hf_to_mm", *words
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["written"] is False and not (tmp_path / "mm").exists()
    assert list(tmp_path.iterdir()) == []
    assert result["bytes"] >= total
    if result["layout"]["pp_size"] == 16:
        assert result["bytes"] == total, "with TP 1 nothing is stored twice"
        assert result["layout"]["llm_pp_layers"] == json.loads(LLM)
        # q, k, v and gate, up of each text layer are one tensor each
        assert result["tensors"] == sum(1 for _ in tensors()) - LAYERS * 3
    assert peak < 500 * MIB, f"{peak / MIB:.0f} MiB"
    with capsys.disabled():
        print(f"\n{name}: {total / 1e9:.1f} GB planned in {seconds:.1f} s, {peak / MIB:.0f} MiB")
