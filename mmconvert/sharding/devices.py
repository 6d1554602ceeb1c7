"""How MindSpore spreads a model over devices: sizes, pipeline stages, what the optimizer splits."""

from __future__ import annotations

from dataclasses import dataclass

from mmconvert.errors import LayoutError

MAX_RANKS = 1 << 16  # of a checkpoint; more rank folders than any cluster has


@dataclass(frozen=True)
class DeviceLayout:
    """A layout in MindFormers' words.

    Attributes:
        data_parallel: replicas of the model in each stage.
        model_parallel: devices over which weights are divided.
        layers: number of text layers on each pipeline stage.
        vocab_emb_dp: keep word embedding and output layer whole on each device.
        optimizer_parallel: divide weights over data-parallel devices too.
        threshold: bytes of a slice below which ``optimizer_parallel`` leaves it as it is.
    """

    data_parallel: int = 1
    model_parallel: int = 1
    layers: tuple[int, ...] = ()
    vocab_emb_dp: bool = False
    optimizer_parallel: bool = False
    threshold: int = 64 << 10

    @property
    def stages(self) -> int:
        """Number of pipeline stages."""
        return max(1, len(self.layers))

    @property
    def devices(self) -> int:
        """Number of devices of one stage."""
        return self.data_parallel * self.model_parallel

    @property
    def ranks(self) -> int:
        """Number of devices."""
        return self.devices * self.stages

    def stage_of(self, layer: int) -> int:
        """The stage of a text layer.

        Raises:
            LayoutError: no stage holds so high a layer.
        """
        left = layer
        for stage, count in enumerate(self.layers):
            if left < count:
                return stage
            left -= count
        raise LayoutError(
            f"text layer {layer} is on none of the stages {list(self.layers)}",
            "numbers of layers that add up to those of the model",
        )

    def check(self) -> None:
        """Raises LayoutError for sizes that cannot be."""
        for name in ("data_parallel", "model_parallel"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} is {getattr(self, name)}", "a size of at least 1")
        if self.threshold < 0:
            raise LayoutError(f"optimizer_threshold is {self.threshold}", "0 or more")
        if self.ranks > MAX_RANKS:
            raise LayoutError(f"{self.ranks} devices", f"at most {MAX_RANKS}")

    def describe(self) -> str:
        """One line for messages, in the words of the command line."""
        if self.ranks == 1:
            return "complete"
        words = [f"data_parallel {self.data_parallel}", f"model_parallel {self.model_parallel}"]
        if self.stages > 1:
            words.append(f"pipeline_stage {self.stages} (layers {list(self.layers)})")
        words += ["vocab_emb_dp"] if self.vocab_emb_dp else []
        words += ["optimizer_parallel"] if self.optimizer_parallel else []
        return ", ".join(words)

    def as_dict(self) -> dict[str, object]:
        """The layout as JSON."""
        return {
            "data_parallel": self.data_parallel,
            "model_parallel": self.model_parallel,
            "pipeline_stage": self.stages,
            "layers": list(self.layers),
            "vocab_emb_dp": self.vocab_emb_dp,
            "optimizer_parallel": self.optimizer_parallel,
        }
