"""Megatron-core's own optimizers on MM checkpoints, one process for each rank, on the CPU.

The text decoder is Megatron's GPTModel, the vision encoder a tree of parameters; its DDP, its
mixed-precision or distributed optimizer and its scheduler load a checkpoint, take steps and save
one, as its training loop does. Nothing of mmconvert is used here.

Gradients are a function of each weight's own value, so that they do not depend on the layout.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from megatron_text import PREFIX as TEXT
from megatron_text import expert_count, expert_options, model_parallel, process, text_config


class Run(NamedTuple):
    """A piece of training.

    Attributes:
        source, target: checkpoints to begin with and to write.
        llm: text layers by virtual stage and pipeline rank.
        steps: how many to take.
        distributed: with the distributed optimizer.
        frozen: beginnings of names that do not learn.
        bucket: elements of a bucket of gradients that are reduced while others are computed.
        ep: expert-parallel size, for models with experts.
        fused: its Adam has the step in the groups; else it is torch's.
        later: where to save once more, after another step.
    """

    source: Path
    target: Path
    llm: list[list[int]]
    tp: int = 1
    steps: int = 1
    distributed: bool = False
    tied: bool = False
    frozen: tuple[str, ...] = ()
    bucket: int = 0
    ep: int = 1
    fused: bool = False
    later: Path | None = None

    @property
    def pp(self) -> int:
        return len(self.llm[0])


class Place(NamedTuple):
    """A rank's coordinates."""

    tp: int
    pp: int
    ep: int


class FusedAdam(torch.optim.Optimizer):
    """AdamW with its step in the groups, as Apex, Transformer Engine and MindSpeed have it; in the
    arithmetic of torch's own, so that either can go on from the other.
    """

    def __init__(
        self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, **_: Any
    ) -> None:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, given)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        del closure
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None or not parameter.numel():
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                mean.lerp_(grad, 1 - first)
                square.mul_(second).addcmul_(grad, grad, value=1 - second)
                scale = square.sqrt() / (1 - second ** group["step"]) ** 0.5
                size = group["lr"] / (1 - first ** group["step"])
                parameter.addcdiv_(mean, scale.add_(group["eps"]), value=-size)


def use_fused(fused: bool) -> None:
    """Lets Megatron use the class above, or torch's AdamW."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    adam = FusedAdam if fused else torch.optim.AdamW
    for module in (optimizer, distrib_optimizer):
        module.Adam = adam  # pyright: ignore
    optimizer.USING_PYTORCH_OPTIMIZER = not fused  # pyright: ignore
    distrib_optimizer.HAVE_APEX_OR_TE = fused  # pyright: ignore


class Tree(nn.Module):
    """Parameters by dotted names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        inner: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            word, _, rest = name.partition(".")
            if rest:
                inner.setdefault(word, {})[rest] = tensor
            else:
                self.register_parameter(word, nn.Parameter(tensor.clone()))
        for word, some in inner.items():
            self.add_module(word, Tree(some))


@contextmanager
def on_cpu() -> Iterator[None]:
    """Lets Megatron's optimizers run without a GPU, in a process of their own."""
    cpu = torch.device("cpu")

    def here(make: Any) -> Any:
        def made(*args: Any, **more: Any) -> Any:
            if "device" in more:
                more["device"] = cpu
            return make(*args, **more)

        return made

    for name in ("tensor", "zeros", "empty", "ones", "full", "rand"):
        setattr(torch, name, here(getattr(torch, name)))
    plain = torch.Tensor.type
    torch.Tensor.type = (  # pyright: ignore[reportAttributeAccessIssue]
        lambda self, *a, **k: (
            plain(self, *a, **k) if a or k else plain(self).replace("torch.", "torch.cuda.")
        )
    )
    torch.Tensor.cuda = lambda self, *a, **k: self  # pyright: ignore[reportAttributeAccessIssue]

    def scatter(out: torch.Tensor, whole: torch.Tensor, *, group: Any = None, **_: Any) -> None:
        summed = whole.clone()
        dist.all_reduce(summed, group=group)
        out.copy_(summed.chunk(dist.get_world_size(group))[dist.get_rank(group)])

    dist.reduce_scatter_tensor = scatter
    _without_fp8()
    yield


def _without_fp8() -> None:
    """Lets Megatron before 0.13 step without Transformer Engine, whose fp8 it asks for."""
    from megatron.core.optimizer import distrib_optimizer

    distrib_optimizer.quantize_param_shard = lambda *_: None  # pyright: ignore


def chunk_model(
    run: Run, text: dict[str, Any], weights: dict[str, torch.Tensor], stage: int
) -> Any:
    """One model chunk: what its weights name."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.module import MegatronModule

    layers = {n.split(".")[3] for n in weights if n.startswith(f"{TEXT}decoder.layers.")}
    count = expert_count(text)
    options = expert_options(text, run.tp, run.ep) if count else {}
    config = text_config(
        text,
        **{"tensor_model_parallel_size": run.tp, **options},
        num_layers=max(len(layers), 1),
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    spec: dict[str, Any] = {"moe_grouped_gemm": False, "qk_layernorm": True} if count else {}
    spec |= {"num_experts": count} if any(".experts." in name for name in weights) else {}

    config.sequence_parallel = False  # torch's norms, which have no part in this, refuse it

    class Model(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            own = {n: t for n, t in weights.items() if not n.startswith(TEXT)}
            for word in dict.fromkeys(n.split(".")[0] for n in own):
                cut = {n.partition(".")[2]: t for n, t in own.items() if n.startswith(word + ".")}
                self.add_module(word, Tree(cut))
            mine = {n for n in weights if n.startswith(TEXT)}
            if mine:
                self.text_decoder = decoder(mine)

    def decoder(names: set[str]) -> Any:
        first = f"{TEXT}embedding.word_embeddings.weight" in names
        last = f"{TEXT}decoder.final_layernorm.weight" in names
        made = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm", **spec),
            vocab_size=text["vocab_size"],
            max_sequence_length=64,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=run.tied,
            position_embedding_type="rope",
        )
        if not layers:
            made.decoder.layers = nn.ModuleList()
        return made.bfloat16()

    model = Model()
    found = model.load_state_dict(weights, strict=False)
    missing = [n for n in found.missing_keys if not n.endswith("_extra_state")]
    if missing or found.unexpected_keys:
        raise ValueError(f"stage {stage}: {missing[:3]} missing, {found.unexpected_keys[:3]} extra")
    for name, parameter in model.named_parameters():
        if name.startswith(run.frozen) and run.frozen:
            parameter.requires_grad_(False)
        if (
            run.tied
            and run.pp > 1
            and name.endswith(("word_embeddings.weight", "output_layer.weight"))
        ):
            parameter.shared_embedding = True  # as setup_embeddings_and_output_layer does  # pyright: ignore
    return model


def rank_file(folder: Path, run: Run, place: Place) -> Path:
    """Where a rank's weights are, in the iteration that the tracker names."""
    word = (folder / "latest_checkpointed_iteration.txt").read_text()
    inner = word if word == "release" else f"iter_{int(word):07d}"
    name = f"mp_rank_{place.tp:02d}" + (f"_{place.pp:03d}" if run.pp > 1 else "")
    name += f"_{place.ep:03d}" if run.ep > 1 else ""
    return folder / inner / name / "model_optim_rng.pt"


def train(run: Run, text: dict[str, Any], place: Place) -> None:
    """Loads, takes the steps, saves."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    path, pp = rank_file(run.source, run, place), place.pp
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(path, weights_only=True)
    parts = sorted(key for key in content if key.startswith("model"))
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=run.distributed,
        overlap_grad_reduce=bool(run.bucket),
        bucket_size=run.bucket or None,
    )
    chunks: list[Any] = []
    for i, part in enumerate(parts):
        if len(parts) > 1:  # before 0.13 a tied model asks whether it is the first or last chunk
            parallel_state.set_virtual_pipeline_model_parallel_rank(i)
        chunks.append(chunk_model(run, text, content[part], pp))
    models: list[Any] = [
        DistributedDataParallel(m.config, ddp, m, disable_bucketing=bool(i or pp or not run.bucket))
        for i, m in enumerate(chunks)
    ]
    use_fused(run.fused)
    optimizer: Any = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=1e-3, weight_decay=0.1, bf16=True, clip_grad=0.0,
            params_dtype=torch.bfloat16, use_distributed_optimizer=run.distributed,
        ),
        models,
    )  # fmt: skip
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1e-2, min_lr=1e-3, lr_warmup_steps=4, lr_decay_steps=100,
        lr_decay_style="cosine", start_wd=0.1, end_wd=0.1, wd_incr_steps=100,
        wd_incr_style="constant",
    )  # fmt: skip
    done = content.get("iteration", 0)
    if "optimizer" in content:
        optimizer.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(content["opt_param_scheduler"])
        if run.distributed:
            optimizer.load_parameter_state(str(path.with_name("distrib_optim.pt")))
    for step in range(done, done + run.steps):
        one_step(models, optimizer, scheduler, step)
    done += run.steps
    save(run, run.target, chunks, parts, optimizer, scheduler, done, place)
    if run.later is not None:
        one_step(models, optimizer, scheduler, done)
        save(run, run.later, chunks, parts, optimizer, scheduler, done + 1, place)


def one_step(models: list[Any], optimizer: Any, scheduler: Any, step: int) -> None:
    """A step with gradients that each element's own value gives."""
    optimizer.zero_grad()
    for model in models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.main_grad.copy_(torch.sin(37 * parameter.detach().float() + step))
    optimizer.step()
    scheduler.step(increment=1)


def save(
    run: Run, target: Path, chunks: list[Any], parts: list[str], optimizer: Any, scheduler: Any,
    done: int, place: Place,
) -> None:  # fmt: skip
    """Saves as Megatron's checkpointing does."""
    from megatron.core import parallel_state

    args = Namespace(
        tensor_model_parallel_size=run.tp, pipeline_model_parallel_size=run.pp, num_layers=4,
        consumed_train_samples=8 * done,
        data_parallel_size=dist.get_world_size() // run.tp // run.pp,
        expert_model_parallel_size=run.ep,
        overlap_grad_reduce=bool(run.bucket), ddp_bucket_size=run.bucket or None,
        params_dtype=torch.bfloat16, lr=1e-2, mm=object,
    )  # fmt: skip
    content: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": done}
    for part, model in zip(parts, chunks, strict=True):
        content[part] = model.state_dict()
    content["optimizer"] = optimizer.state_dict()
    content["opt_param_scheduler"] = scheduler.state_dict()
    content["rng_state"] = [{"torch_rng_state": torch.get_rng_state()}]
    content["num_floating_point_operations_so_far"] = 123456789012345678901
    target.mkdir(exist_ok=True)
    tracker = target / "latest_checkpointed_iteration.txt"
    if dist.get_rank() == 0:
        tracker.write_text(str(done))
    dist.barrier()
    path = rank_file(target, run, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    if run.distributed:
        optimizer.save_parameter_state(str(path.with_name("distrib_optim.pt")))
    if parallel_state.get_expert_data_parallel_rank() == 0:
        torch.save(content, path)
    dist.barrier()


def work(rank: int, folder: Path, world: int, text: dict[str, Any], runs: list[Run]) -> None:
    """One rank of all runs."""
    with process(rank, folder, world), on_cpu():
        from megatron.core import parallel_state

        for run in runs:
            virtual = len(run.llm) if len(run.llm) > 1 else None
            with model_parallel(run.tp, run.pp, virtual, run.ep):
                place = Place(
                    parallel_state.get_tensor_model_parallel_rank(),
                    parallel_state.get_pipeline_model_parallel_rank(),
                    parallel_state.get_expert_model_parallel_rank(),
                )
                train(run, text, place)
