"""Tiny models of every family in the form that the hub has them, and their conversions.

Values come from a seed, biases and norms too: the library leaves them at 0 and 1, where a mix-up
would not show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from commands import hf_to_mm
from commands import layout as layout_flags
from tinymodels import CONVERTERS as QWEN
from tinymodels import TEXT, VOCAB, save, tiny_model

CONVERTERS = {**QWEN, "omni": "Qwen2_5_OmniConverter", "omni4": "Qwen2_5_OmniConverter"}
CONVERTERS |= dict.fromkeys(
    ("intern-qwen2", "intern-qwen3", "intern-llama", "intern-internlm2"), "InternVLConverter"
)
KINDS = tuple(CONVERTERS)
INTERN_TEXT = {
    "intern-qwen2": ("Qwen2ForCausalLM", "Qwen2Config"),
    "intern-qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),
    "intern-llama": ("LlamaForCausalLM", "LlamaConfig"),
    "intern-internlm2": ("InternLM2ForCausalLM", "LlamaConfig"),
}
IMAGE, VIDEO, START, END, AUDIO, AUDIO_START, AUDIO_END = 301, 302, 303, 304, 305, 306, 307


def randomise(model: Any, seed: int = 7) -> Any:
    """All parameters from a seed; norms around 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
            if "norm" in name or "ln_" in name or "lambda" in name:
                parameter += 1
    return model.eval()


def make(kind: str, folder: Path, *, tied: bool = False, **options: Any) -> Path:
    """A Hugging Face folder of a tiny model of `kind`."""
    if kind.startswith("omni"):
        return make_omni(folder, groups=4 if kind == "omni4" else 2)
    if kind.startswith("intern"):
        return make_intern(kind, folder, tied=tied, **options)
    return save(tiny_model(kind, tied=tied), folder)


def convert(kind: str, hf: Path, mm: Path, llm: str, vit: str, tp: int = 1, *more: str) -> Path:
    """The MM form of a folder at a layout; Omni's audio encoder lies like its vision encoder."""
    if kind.startswith("omni") and not any(word.startswith("audio_pp") for word in more):
        more = (*more, f"audio_pp_layers={vit}")
    hf_to_mm(hf, mm, *layout_flags(llm, vit, tp, *more), converter=CONVERTERS[kind])
    return mm


def convert_flags(
    kind: str, hf: Path, mm: Path, llm: str, vit: str, tp: int, flags: tuple[str, ...]
) -> Path:
    """As `convert`, with further ``key=value`` flags of ``--cfg``."""
    words = [w for flag in flags for w in (f"--cfg.{flag.split('=')[0]}", flag.split("=")[1])]
    hf_to_mm(hf, mm, *layout_flags(llm, vit, tp), *words, converter=CONVERTERS[kind])
    return mm


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A folder with one weight file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    plain = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ------------------------------------------------------------------------------------- Omni
def omni_thinker(groups: int = 2) -> Any:
    """The thinker of a tiny Qwen2.5-Omni; `groups` K/V heads in the text decoder."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    audio = {
        "d_model": 24,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
    }
    audio |= {"num_mel_bins": 8, "n_window": 16, "output_dim": TEXT["hidden_size"]}
    audio |= {"max_source_positions": 64, "dropout": 0.0}
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 44}
    vision |= {"out_hidden_size": TEXT["hidden_size"], "window_size": 56}
    vision |= {"fullatt_block_indexes": [1], "patch_size": 14, "spatial_merge_size": 2}
    made: Any = Qwen2_5OmniThinkerConfig  # its stubs leave out the ids
    config = made(
        audio_config=audio,
        vision_config=vision,
        text_config={**TEXT, "tie_word_embeddings": False, "num_key_value_heads": groups},
        tie_word_embeddings=False,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
    )
    return randomise(Qwen2_5OmniThinkerForConditionalGeneration(config))


def make_omni(folder: Path, groups: int = 2) -> Path:
    """A tiny Qwen2.5-Omni with the hub's names; of the speech parts one tensor stands for all."""
    model = omni_thinker(groups)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        hub = name.replace("model.language_model.", "model.", 1)
        for part in ("visual", "audio_tower"):
            hub = hub.replace(f"model.{part}.", f"{part}.", 1)
        tensors[f"thinker.{hub}"] = tensor
    tensors["talker.codec_head.weight"] = torch.ones(4, 4)
    thinker = json.loads(model.config.to_json_string(use_diff=False))
    config = {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "thinker_config": thinker,
        "enable_audio_output": False,
        "enable_talker": False,
    }
    return write(folder, config, tensors)


# ----------------------------------------------------------------------------------- InternVL
def native_intern(
    kind: str, *, tied: bool = False, heads: int = 4, vocab: int = VOCAB, six_b: bool = False
) -> Any:
    """Transformers' native InternVL; `six_b` has the norms of InternViT-6B."""
    import transformers

    vision = {"hidden_size": 8 * heads, "num_hidden_layers": 3, "num_attention_heads": heads}
    vision |= {"intermediate_size": 48, "image_size": [56, 56], "patch_size": [14, 14]}
    vision |= {"attention_bias": not six_b, "use_qk_norm": bool(six_b)}
    vision |= {"norm_type": "rms_norm" if six_b else "layer_norm"}
    text = {k: v for k, v in TEXT.items() if k != "rope_parameters"}
    text |= {"vocab_size": vocab, "tie_word_embeddings": tied}
    text |= {"head_dim": 12} if kind == "intern-qwen3" else {}
    made = getattr(transformers, INTERN_TEXT[kind][1])
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=made(**text),
        image_token_id=IMAGE,
        tie_word_embeddings=tied,
    )
    return randomise(transformers.InternVLForConditionalGeneration(config))


def make_intern(kind: str, folder: Path, *, tied: bool = False, **options: Any) -> Path:
    """A tiny InternVL with the names and the config of the original code."""
    model = native_intern(kind, tied=tied, **options)
    vision, text = model.config.vision_config, model.config.text_config
    llm = {k: v for k, v in TEXT.items() if k != "rope_parameters"}
    llm |= {"architectures": [INTERN_TEXT[kind][0]], "vocab_size": text.vocab_size}
    llm |= {"head_dim": text.head_dim} if kind == "intern-qwen3" else {}
    llm |= {"tie_word_embeddings": tied, "rope_theta": 10000.0, "rms_norm_eps": text.rms_norm_eps}
    config = {
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "force_image_size": 56,
        "img_context_token_id": IMAGE,
        "llm_config": llm,
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": 56,
            "patch_size": 14,
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
            "norm_type": vision.norm_type,
        },
    }
    return write(folder, config, original_names(model, kind))


def original_names(model: Any, kind: str) -> dict[str, torch.Tensor]:
    """The native model's tensors as the original code stores them."""
    found: dict[str, torch.Tensor] = {}
    state = dict(model.state_dict())
    if model.config.text_config.tie_word_embeddings:
        del state["lm_head.weight"]
    vision = {"embeddings.cls_token": "embeddings.class_embedding"}
    vision |= {"embeddings.position_embeddings": "embeddings.position_embedding"}
    vision |= {"embeddings.patch_embeddings.projection": "embeddings.patch_embedding"}
    vision |= {"encoder.layer.": "encoder.layers.", "attention.projection_layer": "attn.proj"}
    vision |= {"attention.": "attn.", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    vision |= {"lambda_1": "ls1", "lambda_2": "ls2"}
    projector = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
    for name in list(state):
        if ".q_proj." not in name:
            continue
        q, k, v = (state.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv")
        if "vision_tower" in name:
            state[name.replace(".q_proj.", ".qkv.")] = torch.cat([q, k, v])
        elif kind == "intern-internlm2":
            groups, size = 2, 8
            rows = [t.view(groups, -1, size, t.shape[-1]) for t in (q, k, v)]
            packed = torch.cat(rows, dim=1).flatten(0, 2)
            state[name.replace(".self_attn.q_proj.", ".attention.wqkv.")] = packed
        else:
            state |= {
                name.replace(".q_proj.", f".{x}_proj."): t
                for x, t in zip("qkv", (q, k, v), strict=True)
            }
    words = {"embed_tokens": "tok_embeddings", "self_attn.o_proj": "attention.wo"}
    words |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "mlp.": "feed_forward."}
    words |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in state.items():
        if name.startswith("model.vision_tower."):
            new = name.replace("model.vision_tower.", "vision_model.")
            for old, word in vision.items():
                new = new.replace(old, word)
        elif name.startswith("model.multi_modal_projector."):
            part, leaf = name.removeprefix("model.multi_modal_projector.").split(".")
            new = f"mlp1.{projector[part]}.{leaf}"
        else:
            new = name.replace("model.language_model.", "model.")
            if kind == "intern-internlm2":
                new = new.replace("lm_head", "output")
                for old, word in words.items():
                    new = new.replace(old, word)
            new = f"language_model.{new}"
        found[new] = tensor
    return found
