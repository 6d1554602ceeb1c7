"""The names of InternVL's vision encoder and projector, in the two forms that the hub has."""

from __future__ import annotations

from dataclasses import dataclass

# transformers' own class in memory, and on the hub.
SPELLINGS = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


@dataclass(frozen=True)
class VisionNames:
    """Names of the vision encoder and the projector in one of the two forms.

    Attributes:
        embeddings: their prefix; ``token``, ``patches``, ``positions`` are below it.
        layer: the prefix of a layer; the others but ``projector`` are below it.
        qkv: one packed projection, or three.
        scales: of the two residuals.
        projector: its norm and its two linears.
    """

    embeddings: str
    token: str
    patches: str
    positions: str
    layer: str
    attention: str
    qkv: tuple[str, ...]
    output: str
    norms: tuple[str, str]
    scales: tuple[str, str]
    projector: tuple[str, str, str]


CHAT_NAMES = VisionNames(
    "vision_model.embeddings",
    "class_embedding",
    "patch_embedding",
    "position_embedding",
    "vision_model.encoder.layers.{}",
    "attn",
    ("qkv",),
    "proj",
    ("norm1", "norm2"),
    ("ls1", "ls2"),
    ("mlp1.0", "mlp1.1", "mlp1.3"),
)
NATIVE_NAMES = VisionNames(
    "vision_tower.embeddings",
    "cls_token",
    "patch_embeddings.projection",
    "position_embeddings",
    "vision_tower.encoder.layer.{}",
    "attention",
    ("q_proj", "k_proj", "v_proj"),
    "projection_layer",
    ("layernorm_before", "layernorm_after"),
    ("lambda_1", "lambda_2"),
    (
        "multi_modal_projector.layer_norm",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
    ),
)
