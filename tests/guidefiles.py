"""The files that MindSpeed-MM's guides have a user edit, for the tiny models of the tests.

Keys are those of the guides' own examples; sizes are the tiny models'.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The four quoted strings of finetune_qwen2vl_2b.sh and its siblings, numbers left open.
GPT_ARGS = """
    --use-mcore-models
    --tensor-model-parallel-size {tp}
    --pipeline-model-parallel-size {pp}
    --micro-batch-size {mbs}
    --global-batch-size {gbs}
    --tokenizer-type NullTokenizer
    --vocab-size 152064
    --seq-length 1024
    --make-vocab-size-divisible-by 1
    --normalization RMSNorm
    --use-fused-rmsnorm
    --swiglu
    --use-fused-swiglu
    --no-masked-softmax-fusion
    --lr 1.0e-5
    --lr-decay-style cosine
    --weight-decay 0
    --train-iters {iters}
    --lr-warmup-fraction 0.1
    --clip-grad 0.0
    --adam-beta1 0.9
    --adam-beta2 0.999
    --no-gradient-accumulation-fusion
    --no-load-optim
    --no-load-rng
    --no-save-optim
    --no-save-rng
    --seed 42
    --bf16
    --load {load}
    --use-flash-attn
    --variable-seq-lengths
    --use-distributed-optimizer
    --num-workers 4
"""
MM_ARGS = "--mm-data {data} --mm-model {model} --mm-tool tools.json"
OUTPUT_ARGS = """
    --log-interval 1
    --save-interval 50
    --eval-interval 50
    --eval-iters 25
    --save {save}
    --ckpt-format torch
"""
ATTR = {
    "system": None, "images": "images", "videos": None, "messages": "messages", "role_tag": "role",
    "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": None,
    "observation_tag": None, "function_tag": None,
}  # fmt: skip


def script(*more: str, **numbers: object) -> list[str]:
    """What stands behind ``torchrun ... pretrain_vlm.py``."""
    given = {"tp": 1, "pp": 1, "mbs": 1, "gbs": 2, "iters": 2, "load": "mm", "save": "save_dir"}
    given |= {"data": "data_2b.json", "model": "model_2b.json"} | numbers
    text = (GPT_ARGS + MM_ARGS + OUTPUT_ARGS).format(**given)
    return [*text.split(), *more, "--distributed-backend", "nccl"]


def data_json(
    folder: Path, dataset: str, name: str = "data_2b.json", **attr: Any
) -> dict[str, Any]:
    """Writes the data.json of a Qwen model in `folder/hf`, whose files lie below `folder`."""
    content: dict[str, Any] = {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {
                "model_name_or_path": str(folder / "hf"), "use_fast_tokenizer": True,
                "split_special_tokens": False, "image_max_pixels": 262144, "image_min_pixels": 0,
                "video_max_pixels": 16384, "video_min_pixels": 0, "video_fps": 2.0,
                "video_maxlen": 64,
            },
            "basic_parameters": {
                "template": "qwen2vl", "dataset_dir": str(folder), "dataset": dataset,
                "cache_dir": "./data/cache_dir", "train_on_prompt": False, "mask_history": False,
                "preprocessing_batch_size": 1000, "preprocessing_num_workers": 16,
                "max_samples": None, "tool_format": None,
            },
            "attr": ATTR | attr,
        },
        "dataloader_param": {
            "dataloader_mode": "sampler", "drop_last": True, "pin_memory": True,
            "sampler_type": "BaseRandomBatchSampler",
            "collate_param": {"model_name": "qwen2vl", "ignore_pad_token_for_loss": True},
        },
    }  # fmt: skip
    (folder / name).write_text(json.dumps(content))
    return content


def intern_data_json(folder: Path, name: str = "data_8B.json") -> dict[str, Any]:
    """Writes the data.json of InternVL2, as its guide edits it."""
    content: dict[str, Any] = {
        "dataset_param": {
            "dataset_type": "multimodal",
            "basic_parameters": {
                "data_path": "opensource/ai2d_train_12k.jsonl", "data_folder": "data/ai2d",
            },
            "preprocess_parameters": {
                "image_reader_type": "torchvision",
                "train_pipeline": {
                    "image": [
                        {"trans_type": "Pad2Square", "param": {"mean": [0.485, 0.456, 0.406]}},
                        {"trans_type": "ToTensor"},
                    ]
                },
            },
            "tokenizer_config": {
                "hub_backend": "hf", "autotokenizer_name": "AutoTokenizer",
                "from_pretrained": str(folder / "hf"), "use_fast": False,
            },
            "use_text_processer": True, "template_name": "internlm2-chat", "image_size": 448,
            "patch_size": 14, "down_sample_ratio": 0.5, "dynamic_image_size": True,
            "use_thumbnail": True, "min_dynamic_patch": 1, "max_dynamic_patch": 6,
            "group_by_length": True, "min_num_frame": 4, "max_num_frame": 12,
        },
        "dataloader_param": {"dataloader_mode": "sampler", "pin_memory": True},
    }  # fmt: skip
    (folder / name).write_text(json.dumps(content))
    return content


def model_json(
    folder: Path, vit: object, llm: object, audio: object = None, name: str = "model_2b.json",
    tp: dict[str, int] | None = None, projector: bool | None = True, token: int = 301,
) -> dict[str, Any]:  # fmt: skip
    """Writes a model.json with the lists of a tiny Qwen model, and hetero tp sizes if given."""
    sums = {"vit": 3, "audio": 3, "llm": 4}
    content: dict[str, Any] = {
        "model_id": "qwen2vl", "img_context_token_id": token, "vision_start_token_id": 303,
        "text_encoder": None, "video_encoder": None,
        "image_encoder": {
            "vision_encoder": {
                "model_id": "qwen2vit", "num_layers": sums["vit"], "pipeline_num_layers": vit,
                "freeze": True,
            },
            "vision_projector": {"model_id": "lnmlp", "num_layers": 1, "freeze": projector},
        },
        "text_decoder": {
            "model_id": "qwen2lm", "num_layers": sums["llm"], "pipeline_num_layers": llm,
        },
    }  # fmt: skip
    if projector is None:
        del content["image_encoder"]["vision_projector"]["freeze"]
    if audio is not None:
        content["audio_encoder"] = {
            "audio_encoder": {
                "model_id": "qwen_omni", "num_layers": sums["audio"],
                "pipeline_num_layers": audio, "freeze": True,
            }
        }  # fmt: skip
    outer = {"vit": "image_encoder", "audio": "audio_encoder", "llm": "text_decoder"}
    for key, size in (tp or {}).items():
        content[outer[key]] |= {"tp": size, "pp": 1, "cp": 1}
    (folder / name).write_text(json.dumps(content))
    return content
