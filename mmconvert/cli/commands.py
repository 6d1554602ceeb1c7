"""What the command knows of: converters' verbs, tools, scripts; and the help that lists them."""

from __future__ import annotations

AUTO = "AutoConverter"  # the family is told by the checkpoint
LAYOUT = "--cfg.parallel_config.llm_pp_layers [12,16] --cfg.parallel_config.vit_pp_layers [32,0]"
TOOLS = {
    "inspect": "PATH says what a checkpoint is, with a picture of its layout",
    "verify": "A B compares two checkpoints of any formats, in any two layouts",
    "diff": "A B measures how far apart two checkpoints are, by tensor, layer and module",
    "suggest": "HF_DIR --pp N balances the layers over the pipeline and prints the command",
    "model_json": "HF_DIR --output FILE writes MindSpeed-MM's model.json for a model and layout",
    "doctor": "PATH says what is wrong with a checkpoint, and prints the commands that fix it",
    "roundtrip": "HF_DIR proves, for CI, that every byte comes back from another format",
    "validate": "--mm_dir D --hf_dir H runs both and compares what they compute",
    "generate": "--mm_dir D --hf_dir H --prompt P answers, from pictures, videos and sounds too",
    "finetune": "--mm_dir D --hf_dir H --data F --save S trains on conversations",
    "predict": "single YAML X.ckpt VOCAB IMAGE PROMPT 1 answers, as MindFormers' Qwen-VL script",
    "run_qwenvl": "--config YAML --load_checkpoint X.ckpt --hf_dir H trains, as MindFormers'",
    "data": "CONVERSION converts a dataset's annotations to the form that training reads",
    "convert_weight": "--model qwenvl --input_path HF --output_path X.ckpt, as MindFormers' script",
    "playground": "DIR writes small checkpoints of every family to try the commands on",
    "moe_expert": "--style merge|split --hf_dir HF --save_dir OUT stores experts in another form",
    "rename_lora": "--lora_dir A --save_dir B --names new|old|fsdp2 renames an adapter's tensors",
    "merge_base_lora_weight": "merges MM base + MM adapter, with MindSpeed-MM's flags",
    "merge_lora_safetensors_to_base": "merges HF base + adapter, with MindSpeed-MM's flags",
    "completion": "bash|zsh prints a script that completes these words in the shell",
}
# Scripts of MindFormers' and MindSpeed-MM's guides: their lines work with mm-convert for python.
SCRIPTS = {
    "convert_weight": ["convert_weight"],
    "data_convert": ["data", "llava-to-qwenvl"],
    "run_qwenvl_predict": ["predict"],
    "run_qwenvl": ["run_qwenvl"],
    "hf_to_dcp": ["hf_to_dcp.py"],
    "merge_dcp_to_hf": ["merge_dcp_to_hf.py"],
    "merge_base_lora_weight": ["merge_base_lora_weight"],
    "merge_lora_safetensors_to_base": ["merge_lora_safetensors_to_base"],
    "llava_instruct_2_mllm_demo_format": ["data", "llava-to-mllm"],
}
# Tools that write one checkpoint, which several processes can share.
CONVERTING = (
    "convert_weight",
    "moe_expert",
    "rename_lora",
    "merge_base_lora_weight",
    "merge_lora_safetensors_to_base",
)
# These bring torch's process groups themselves, one process for each rank of the checkpoint.
RUNTIME = ("validate", "generate", "finetune", "predict", "run_qwenvl")
# Verb -> class of its flags, by its module in ``config``; what the verb does; an example. The
# function of its name in the module of ``directions`` of the same name runs it.
VERBS = {
    "hf_to_mm": (
        "mm.HFToMM",
        "Hugging Face -> MM: before training",
        "--cfg.hf_config.hf_dir HF_DIR --cfg.mm_dir MM_DIR "
        f"{LAYOUT} --cfg.parallel_config.tp_size 2",
    ),
    "mm_to_hf": (
        "mm.MMToHF",
        "MM -> Hugging Face: after training; the layout is read from the folder",
        "--cfg.mm_dir MM_DIR --cfg.hf_config.hf_dir HF_DIR --cfg.save_hf_dir NEW_HF_DIR",
    ),
    "resplit": (
        "mm.Resplit",
        "MM -> MM in another parallel layout",
        "--cfg.source_dir MM_DIR --cfg.target_dir NEW_MM_DIR "
        "--cfg.target_parallel_config.llm_pp_layers [28] "
        "--cfg.target_parallel_config.vit_pp_layers [32]",
    ),
}
# Of the same converters, for adapters.
LORA_VERBS = {
    "lora_hf_to_mm": (
        "lora.LoraHFToMM",
        "PEFT adapter -> MM: to train on, or to merge there",
        "--cfg.hf_config.hf_dir ADAPTER --cfg.mm_dir MM_DIR "
        "--cfg.base_mm_dir BASE_MM_DIR --cfg.base_hf_dir BASE_HF_DIR",
    ),
    "lora_mm_to_hf": (
        "lora.LoraMMToHF",
        "adapter of LoRA training -> PEFT, with adapter_config.json",
        "--cfg.mm_dir MM_DIR --cfg.hf_config.hf_dir BASE_HF_DIR --cfg.save_hf_dir ADAPTER",
    ),
    "lora_merge": (
        "lora.LoraMerge",
        "base model + adapters -> model, each of them Hugging Face or MM",
        "--cfg.base_dir BASE --cfg.lora_dir ADAPTER --cfg.save_dir MERGED",
    ),
    "lora_resplit": (
        "lora.LoraResplit",
        "MM adapter -> MM adapter in another parallel layout",
        "--cfg.source_dir MM_DIR --cfg.target_dir NEW_MM_DIR "
        "--cfg.target_parallel_config.llm_pp_layers [28] "
        "--cfg.target_parallel_config.vit_pp_layers [32]",
    ),
}
DCP_VERBS = {
    "hf_to_dcp": (
        "dcp.HFToDCP",
        "Hugging Face -> DCP: before training with FSDP2",
        "--cfg.hf_config.hf_dir HF_DIR --cfg.dcp_dir DCP_DIR",
    ),
    "dcp_to_hf": (
        "dcp.DCPToHF",
        "DCP -> Hugging Face: after training with FSDP2",
        "--cfg.dcp_dir DCP_DIR --cfg.hf_config.hf_dir HF_DIR --cfg.save_hf_dir NEW_HF_DIR",
    ),
    "mm_to_dcp": (
        "dcp.MMToDCP",
        "MM -> DCP, directly",
        "--cfg.mm_dir MM_DIR --cfg.hf_config.hf_dir HF_DIR --cfg.dcp_dir DCP_DIR",
    ),
    "dcp_to_mm": (
        "dcp.DCPToMM",
        "DCP -> MM, directly",
        f"--cfg.dcp_dir DCP_DIR --cfg.hf_config.hf_dir HF_DIR --cfg.mm_dir MM_DIR {LAYOUT}",
    ),
    "hf_to_mm_dcp": (
        "dcp.HFToMMDCP",
        "Hugging Face -> DCP with whole MM tensors",
        "--cfg.hf_config.hf_dir HF_DIR --cfg.mm_dir DCP_DIR",
    ),
}
ANY_VERB = "A_to_B         any two of hf, mm, dcp, torch_dist: --cfg.source PATH --cfg.target PATH"
# Converters of MindSpeed-MM for its FSDP2 trainers, which take models of any kind.
DCP_CONVERTERS = {
    "Qwen3VLConverter": "Qwen3-VL",
    "Qwen35Converter": "Qwen3.5 and 3.6",
    "Mistral3Converter": "Mistral 3, Magistral",
    "ExpertMergeDcpConverter": "InternVL3.5 with experts, GLM-4.5V, Qwen3-Omni",
    "GenericDCPConverter": "any model",
}
# The trainers' own commands and scripts, with the same flags as there.
DCP_SCRIPTS = (
    "mindspeed_mm.fsdp.tasks.checkpoint.converter",
    "hf_to_dcp.py",
    "merge_dcp_to_hf.py",
)
# Of the converters whose other side is MindSpore (converters.MINDSPORE).
MS_VERBS = {
    "hf_to_ms": (
        "mindspore.HFToMS",
        "Hugging Face -> MindSpore: before training or serving with MindFormers",
        "--cfg.hf_config.hf_dir HF_DIR --cfg.ms_path X.ckpt --cfg.dtype fp16",
    ),
    "ms_to_hf": (
        "mindspore.MSToHF",
        "MindSpore -> Hugging Face: a .ckpt, or rank folders with their strategy files",
        "--cfg.ms_path X.ckpt --cfg.hf_config.hf_dir HF_DIR --cfg.save_hf_dir NEW_HF_DIR",
    ),
    "resplit": (
        "mindspore.MSResplit",
        "MindSpore -> MindSpore: a complete file, or sliced over any devices",
        "--cfg.source_dir X.ckpt --cfg.target_dir RANKS_DIR "
        "--cfg.target_parallel_config.data_parallel 2 "
        "--cfg.target_parallel_config.model_parallel 4",
    ),
}
NAMED = VERBS | DCP_VERBS | MS_VERBS  # between two formats, with flags of their own


def verbs_of(converter: str) -> dict[str, tuple[str, str, str]]:
    """The verbs of a converter, as :data:`VERBS`."""
    from mmconvert.converters import BUILT_IN, MINDSPORE, load

    if converter == AUTO:
        return MS_VERBS | VERBS | DCP_VERBS | LORA_VERBS
    if converter not in BUILT_IN and (
        converter in MINDSPORE or load(converter).naming == "mindformers"
    ):
        return MS_VERBS
    return VERBS | DCP_VERBS | LORA_VERBS


def top_help(names: list[str], ms_names: list[str]) -> str:
    """The help of mm-convert itself: what ``mm-convert -h`` prints."""
    verbs = "\n".join(f"  {verb:<14} {text}" for verb, (_, text, _) in (VERBS | LORA_VERBS).items())
    ms_verbs = "\n".join(f"  {verb:<10} {text}" for verb, (_, text, _) in MS_VERBS.items())
    about = {AUTO: "   reads the family from config.json or from the MM checkpoint"}
    converters = "\n".join(f"  {name}{about.get(name, '')}" for name in names)
    dcp_verbs = "\n".join(f"  {verb:<14} {text}" for verb, (_, text, _) in DCP_VERBS.items())
    fsdp = "\n".join(f"  {name:<24} {text}" for name, text in DCP_CONVERTERS.items())
    below = "\n" + " " * 17  # the text of a long name is on the next line
    tools = "\n".join(
        f"  {name:<14}{' ' if len(name) <= 14 else below}{text}" for name, text in TOOLS.items()
    )
    return f"""usage: mm-convert CONVERTER VERB [flags]
       mm-convert TOOL WORDS ... [flags]

Moves multimodal checkpoints between Hugging Face, MM, DCP and torch_dist, and from any
parallel layout to any other: complete or not at all, in bounded memory, without torch or an NPU.

converters:
{converters}

verbs:
{verbs}

the same converters for DCP folders:
{dcp_verbs}
  {ANY_VERB}

MindSpeed-MM's converters for FSDP2, with hf_to_dcp and dcp_to_hf:
{fsdp}

for MindSpore (MindFormers) instead of MM format: {", ".join(ms_names)}, with the verbs
{ms_verbs}

tools, which need no converter:
{tools}

mm-convert CONVERTER VERB -h and mm-convert TOOL -h show the flags; --config FILE.yaml takes
them from a file; mm-convert --version shows the version.

Exit codes: 0 done, 1 a comparison differs, 2 the request is impossible, 3 a checkpoint is
missing or damaged, 70 a fault of mmconvert itself, 130 interrupted, 141 output closed early.

example:
  mm-convert Qwen2VLConverter hf_to_mm {VERBS["hf_to_mm"][2]}"""


def converter_help(converter: str) -> str:
    """The help of a converter: its verbs, with an example of each."""
    lines = [f"usage: mm-convert {converter} VERB [flags]", "", "verbs and an example of each:"]
    for verb, (_, text, example) in verbs_of(converter).items():
        lines += [
            f"  {verb:<14} {text}",
            f"                mm-convert {converter} {verb} {example}",
        ]
    lines += [] if verbs_of(converter) is MS_VERBS else [f"  {ANY_VERB}"]
    return "\n".join([*lines, "", f"mm-convert {converter} VERB -h shows the flags."])
