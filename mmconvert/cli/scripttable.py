"""What becomes of each flag of MindSpeed-MM's scripts: GPT_ARGS, MM_ARGS, OUTPUT_ARGS.

Names, types and defaults are those of the parser that pretrain_vlm.py builds in MindSpeed-MM 2.0.0
to 26.1.0 (Megatron core 0.12.1 and MindSpeed). Names have ``_`` here where scripts write ``-``.
"""

from __future__ import annotations

# Theirs -> ours, where only the name differs.
RENAMED = {"load": "mm_dir", "lr_warmup_iters": "warmup_iters"}
# Flags without a value that stand for one of ours.
STANDS_FOR = {"bf16": ("dtype", "bf16")}
# What the file of the model and the layout of the checkpoint must agree with.
SIZES = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "expert_model_parallel_size": "ep",
}
SPEED = "kernels, communication and memory, not the result"
LOADED = "weights are loaded from the checkpoint"
BY_MODEL = "model.json and the checkpoint decide"
# No effect here -> (number of values, why).
NO_EFFECT: dict[str, tuple[int, str]] = {
    **dict.fromkeys(
        (
            "sequence_parallel", "overlap_grad_reduce",
            "overlap_param_gather", "use_mcore_models", "use_fused_rmsnorm", "use_fused_swiglu",
            "use_fused_rotary_pos_emb", "use_flash_attn", "no_masked_softmax_fusion",
            "no_gradient_accumulation_fusion", "no_bias_gelu_fusion", "no_bias_swiglu_fusion",
            "swap_attention", "reuse_fp32_param", "encoder_dp_balance", "use_data_balance",
            "use_deter_comp", "jit_compile", "allow_tf32", "allow_internal_format",
            "variable_seq_lengths", "unaligned_linear", "enable_dummy_optimizer",
            "moe_grouped_gemm", "moe_permute_fusion",
            "manual_gc", "accumulate_allreduce_grads_in_fp32", "attention_softmax_in_fp32",
        ),
        (0, SPEED),
    ),
    **dict.fromkeys(
        ("optimizer_selection", "context_parallel_algo", "mm_tool",
         "manual_gc_interval", "moe_token_dispatcher_type"),
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
            "num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_layer_freq",
        ),
        (1, BY_MODEL),
    ),
    **dict.fromkeys(
        ("swiglu", "untie_embeddings_and_output_weights", "disable_bias_linear",
         "add_qkv_bias", "group_query_attention", "no_position_embedding"),
        (0, BY_MODEL),
    ),
    "distributed_backend": (1, "the device decides: gloo, nccl or hccl"),
    "trust_remote_code": (0, "no remote code is run"),
    "exit_on_missing_checkpoint": (0, "a missing checkpoint is always an error"),
    "no_save_rng": (0, "a run draws no random numbers"),
    **dict.fromkeys(
        ("recompute_method", "recompute_num_layers",
         "recompute_num_layers_skip_core_attention"),
        (1, "every layer is computed again, or none"),
    ),
    "lora_register_forward_hook": (1, "adapters learn without it"),
    "recompute_skip_core_attention": (0, "every layer is computed again, or none"),
}  # fmt: skip
NO_FSDP = ("MM rank files", "leave it out, and train the rank files that hf_to_mm writes")
NO_LORA = ("adapters of linear layers, which alone learn", "leave it out")
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
        ("lora_apply_modules", "lora_target_parameters"),
        (None, *NO_LORA),
    ),
    **dict.fromkeys(
        ("lora_load", "lora_mixed_training"),
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
NO_AUX = "leave it out: routers get no loss of their own"
# Of these only some values are supported: (those that can, what to do about others).
CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "ckpt_format": (("torch",), "leave it out, and train the rank files that hf_to_mm writes"),
    "ai_framework": (("pytorch",), "leave it out"),
    "context_parallel_size": (("1",), "leave it out"),
    "moe_aux_loss_coeff": (("0", "0.0"), NO_AUX),
    "moe_router_load_balancing_type": (
        ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
        "give aux_loss, whose coefficient is 0 here",
    ),
    "moe_z_loss_coeff": (("0", "0.0"), NO_AUX),
    "optimizer": (("adam",), "leave it out: AdamW is the one that trains here"),
}
# What pretrain_vlm.py takes where a script does not say.
DEFAULTS = {
    "weight_decay": "0.01", "seed": "1234", "log_interval": "100", "lr_decay_style": "linear",
}  # fmt: skip
OF_THE_LAUNCHER = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")
