"""The flags of MindSpeed-MM's scripts under their own names: GPT_ARGS, MM_ARGS, OUTPUT_ARGS.

What has a meaning here means the same, what has no effect here is accepted with one note, and what
cannot be honoured is refused by name. Names, types and defaults are those of the parser that
pretrain_vlm.py builds in MindSpeed-MM 2.0.0 to 26.1.0 (Megatron core 0.12.1 and MindSpeed).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from mmconvert.errors import RequestError

# Theirs -> ours, where only the name differs.
RENAMED = {"load": "mm_dir"}
# Flags without a value that stand for one of ours.
STANDS_FOR = {"bf16": ("dtype", "bf16")}
# What the file of the model and the layout of the checkpoint must agree with.
SIZES = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
}
SPEED = "kernels, communication and memory, not the result"
LOADED = "weights are loaded from the checkpoint"
BY_MODEL = "model.json and the checkpoint decide"
# No effect here -> (number of values, why).
NO_EFFECT: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        (
            "sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce",
            "overlap_param_gather", "use_mcore_models", "use_fused_rmsnorm", "use_fused_swiglu",
            "use_fused_rotary_pos_emb", "use_flash_attn", "no_masked_softmax_fusion",
            "no_gradient_accumulation_fusion", "no_bias_gelu_fusion", "no_bias_swiglu_fusion",
            "swap_attention", "reuse_fp32_param", "encoder_dp_balance", "use_data_balance",
            "use_deter_comp", "jit_compile", "allow_tf32", "allow_internal_format",
            "variable_seq_lengths", "unaligned_linear", "enable_dummy_optimizer",
            "manual_gc", "accumulate_allreduce_grads_in_fp32", "attention_softmax_in_fp32",
        ),
        (0, SPEED),
    ),
    **dict.fromkeys(
        ("optimizer_selection", "context_parallel_algo", "mm_tool", "num_workers",
         "manual_gc_interval"),
        (1, SPEED),
    ),
    **dict.fromkeys(("no_initialization", "use_cpu_initialization"), (0, LOADED)),
    "init_method_std": (1, LOADED),
    **dict.fromkeys(
        (
            "tokenizer_type", "vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by",
            "normalization", "position_embedding_type", "rotary_base", "hidden_dropout",
            "attention_dropout", "num_layers", "hidden_size", "ffn_hidden_size",
            "num_attention_heads", "num_query_groups", "max_position_embeddings", "norm_epsilon",
        ),
        (1, BY_MODEL),
    ),
    **dict.fromkeys(
        ("swiglu", "untie_embeddings_and_output_weights", "disable_bias_linear",
         "add_qkv_bias", "group_query_attention", "no_position_embedding"),
        (0, BY_MODEL),
    ),
    "distributed_backend": (1, "the device decides: gloo, nccl or hccl"),
    "distributed_timeout_minutes": (1, "it is 30 minutes"),
    "trust_remote_code": (0, "no remote code is run"),
    "exit_on_missing_checkpoint": (0, "a missing checkpoint is always an error"),
    "no_load_optim": (0, "a converted checkpoint has no optimizer state"),
    **dict.fromkeys(("no_load_rng", "no_save_rng"), (0, "a run draws no random numbers")),
}  # fmt: skip
NO_FSDP = ("MM rank files", "leave it out, and train the rank files that hf_to_mm writes")
NO_LORA = ("the whole model learns", "leave it out, or train LoRA with MindSpeed-MM")
NO_DPO = ("fine-tuning on answers", "train DPO with MindSpeed-MM")
# Refused -> (number of values, what is possible, what to do). None: any number of values.
REFUSED: dict[str, tuple[int | None, str, str]] = {
    **dict.fromkeys(("use_torch_fsdp2", "init_model_with_meta_device"), (0, *NO_FSDP)),
    "fsdp2_config_path": (1, *NO_FSDP),
    "fp16": (0, "fp32, or bf16 with fp32 masters", "--bf16 in its place"),
    "train_samples": (1, "a number of iterations", "--train-iters N: samples / global batch size"),
    "num_layers_per_virtual_pipeline_stage": (
        1, "the layers of each stage in model.json", "leave it out; MindSpeed-MM refuses it too",
    ),
    **dict.fromkeys(
        ("lora_target_modules", "lora_apply_modules", "lora_register_forward_hook"),
        (None, *NO_LORA),
    ),
    **dict.fromkeys(
        ("lora_r", "lora_alpha", "lora_dropout", "load_base_model", "lora_load",
         "lora_mixed_training"),
        (1, *NO_LORA),
    ),
    **dict.fromkeys(
        ("dpo_beta", "dpo_loss_type", "dpo_label_smoothing", "ref_model", "pref_ftx"),
        (1, *NO_DPO),
    ),
    **dict.fromkeys(
        ("hetero_encoder_mbs_scale", "lr_scale_modules", "lr_mult", "weight_decay_exclude_modules",
         "muon_momentum", "ns_steps", "matched_adamw_rms"),
        (1, "AdamW, one rate for all that learns", "leave it out"),
    ),
    "calculate_square_loss": (0, "the average loss, by sample or by token", "leave it out"),
    "downcast_to_bf16": (0, "--bf16", "leave it out"),
    **dict.fromkeys(
        ("worker_num", "local_worker_num", "log_dir", "join", "cluster_time_out", "bind_core"),
        (1, "torchrun, or mm-convert's own processes", "leave out msrun and its flags"),
    ),
}  # fmt: skip
# Of these only some values can be honoured: (those that can, what to do about others).
CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "ckpt_format": (("torch",), "--ckpt-format torch: MM rank files"),
    "ai_framework": (("pytorch",), "leave it out"),
    "context_parallel_size": (("1",), "--context-parallel-size 1"),
    "expert_model_parallel_size": (("1",), "leave it out: these families have no experts"),
    "optimizer": (("adam",), "--optimizer adam"),
    "lr_decay_style": (("cosine",), "--lr-decay-style cosine"),
}
# What pretrain_vlm.py takes where a script does not say.
DEFAULTS = {"weight_decay": "0.01", "seed": "1234", "log_interval": "100"}
OF_THE_LAUNCHER = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")


@dataclass
class Script:
    """A script's command line, read.

    Attributes:
        words: what is left, in our own flags.
        model, data: model.json and data.json, if they are given.
        sizes: tp, pp, vpp that the script names.
        hetero: whether each module has the tp size that model.json gives it.
        idle: flags without effect here, by the reason.
    """

    words: list[str] = field(default_factory=list)
    model: Path | None = None
    data: Path | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    hetero: bool = False
    warmup: float = 0.0
    idle: dict[str, list[str]] = field(default_factory=dict)

    @property
    def given(self) -> bool:
        """Whether this is the command line of a script, and not one of ours."""
        return self.model is not None or self.data is not None

    def notes(self) -> list[str]:
        """One line on all flags without effect."""
        if not self.idle:
            return []
        listed = [f"{', '.join(flags)} ({why})" for why, flags in self.idle.items()]
        return [f"note: no effect here: {'; '.join(listed)}"]

    def fill(self, defaults: dict[str, str]) -> None:
        """Adds defaults of flags that are not given."""
        for name, value in defaults.items():
            if f"--{name}" not in self.words:
                self.words += [f"--{name}", value]


def read_script(words: Sequence[str], own: Sequence[str]) -> Script:
    """Takes the flags of a script out of a command line.

    Args:
        own: names of our own flags, which pass.

    Raises:
        RequestError: a flag that cannot be honoured, or that nobody knows, with what to do.
    """
    script = Script()
    rest = _Words(words)
    for flag, value in rest:
        name = flag[2:].replace("-", "_")
        if name in ("mm_model", "mm_data"):
            path = rest.value(flag, value)
            setattr(script, name[3:], Path(path))
            script.words += [f"--{name}", path]
        elif name in SIZES:
            script.sizes[SIZES[name]] = _number(flag, rest.value(flag, value))
        elif name == "hetero_parallel":
            script.hetero = True
        elif name in STANDS_FOR:
            ours, meaning = STANDS_FOR[name]
            script.words += [f"--{ours}", meaning]
        elif name in NO_EFFECT and name not in own:
            count, why = NO_EFFECT[name]
            if count:
                rest.value(flag, value)
            script.idle.setdefault(why, []).append(flag)
        elif name == "lr_warmup_fraction" and name not in own:
            script.warmup = float(rest.value(flag, value))
        elif name in CHOICES and name not in own:
            _choose(flag, rest.value(flag, value), *CHOICES[name])
        elif name not in (*own, *RENAMED, "help"):
            _refuse(flag, name, [*own, *RENAMED])
        else:
            script.words += [f"--{RENAMED.get(name, name)}", *([] if value is None else [value])]
            script.words += rest.values()
    return script


class _Words:
    """The words of a command line, flag by flag."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self._at = list(words), 0

    def __iter__(self) -> Iterator[tuple[str, str | None]]:
        """Each flag, and what stands behind its ``=``."""
        while self._at < len(self._words):
            word = self._words[self._at]
            self._at += 1
            if word == "-h":
                yield "--help", None
                continue
            if not word.startswith("--"):
                raise RequestError(f"{word!r} is no flag", "flags, each with its values")
            name, equals, value = word.partition("=")
            yield name, value if equals else None

    def value(self, flag: str, given: str | None) -> str:
        """The one value of a flag."""
        if given is not None:
            return given
        if self._at == len(self._words) or self._words[self._at].startswith("--"):
            raise RequestError(f"{flag} has no value", f"{flag} VALUE")
        self._at += 1
        return self._words[self._at - 1]

    def values(self) -> list[str]:
        """All words up to the next flag."""
        found: list[str] = []
        while self._at < len(self._words) and not self._words[self._at].startswith("--"):
            found.append(self._words[self._at])
            self._at += 1
        return found


def _number(flag: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 16:
        raise RequestError(f"{flag} is {text!r}", "a number of at least 1")
    return int(text)


def _choose(flag: str, value: str, known: tuple[str, ...], fix: str) -> None:
    if value not in known:
        raise RequestError(f"{flag} {value} cannot be honoured", f"{flag} {known[0]}", fix)


def _refuse(flag: str, name: str, own: Sequence[str]) -> None:
    """Says why a flag is not taken."""
    if name in REFUSED:
        _, expected, fix = REFUSED[name]
        raise RequestError(f"{flag} cannot be honoured", expected, fix)
    if name in OF_THE_LAUNCHER:
        raise RequestError(
            f"{flag} belongs to torchrun",
            "torchrun's flags before the program",
            f"torchrun {flag} ... -m mmconvert finetune ..., or leave it out",
        )
    known = {*own, *NO_EFFECT, *SIZES, *STANDS_FOR, *CHOICES, "mm_model", "mm_data"}
    near = get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    raise RequestError(
        f"there is no flag {flag}",
        "a flag of mm-convert finetune, or of MindSpeed-MM's scripts",
        f"did you mean --{near[0]}?" if near else "mm-convert finetune -h shows the flags",
    )
