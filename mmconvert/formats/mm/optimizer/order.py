"""The order in which training registers its parameters, learnt from files and applied to others.

An optimizer numbers its parameters in the order of ``named_parameters()``: module by module, as
they were registered. The keys of a saved model have that order, each chunk's its part of it.
"""

from __future__ import annotations

from collections.abc import Iterable

NUMBER = "#"  # a layer or an expert; these are in the order of their numbers


class Order:
    """What follows what within each module, of all chunks that were seen."""

    def __init__(self) -> None:
        self._children: dict[tuple[str, ...], list[str]] = {}

    def learn(self, names: Iterable[str]) -> None:
        """Takes over the order of one model chunk's names."""
        siblings: dict[tuple[str, ...], dict[str, None]] = {}
        for name in names:
            path: tuple[str, ...] = ()
            for word in name.split("."):
                step = NUMBER if word.isdigit() else word
                siblings.setdefault(path, {})[step] = None
                path = (*path, step)
        for path, steps in siblings.items():
            self._merge(self._children.setdefault(path, []), list(steps))

    def _merge(self, known: list[str], steps: list[str]) -> None:
        """New siblings stand behind the one before them, or before the next that is known."""
        for i, step in enumerate(steps):
            if step in known:
                continue
            after = next((known.index(s) for s in steps[i + 1 :] if s in known), len(known))
            known.insert(known.index(steps[i - 1]) + 1 if i else after, step)

    def arrange(self) -> None:
        """Brings known siblings into the order of :data:`SIBLINGS`; others stay in their places."""
        for known in self._children.values():
            for siblings in SIBLINGS:
                places = [i for i, word in enumerate(known) if word in siblings]
                words = sorted((known[i] for i in places), key=siblings.index)
                for place, word in zip(places, words, strict=True):
                    known[place] = word

    def key(self, name: str) -> tuple[int, ...]:
        """Sorts names in this order."""
        places: list[int] = []
        path: tuple[str, ...] = ()
        for word in name.split("."):
            step = NUMBER if word.isdigit() else word
            known = self._children.get(path, [])
            places.append(known.index(step) if step in known else len(known))
            places.append(int(word) if word.isdigit() else 0)
            path = (*path, step)
        return tuple(places)


# Siblings in the order in which Megatron-Core 0.12.1 and MindSpeed-MM 2.2 register them.
SIBLINGS = (
    ("image_encoder", "audio_encoder", "text_decoder"),
    ("encoder", "projector"),
    ("patch_embed", "blocks"),
    ("embedding", "decoder", "output_layer"),
    ("layers", "final_layernorm"),
    ("input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp"),
    ("linear_proj", "linear_qkv", "q_layernorm", "k_layernorm"),
    ("router", "experts", "shared_experts"),
    ("linear_fc1", "linear_fc2"),
    ("weight", "bias"),
)


def registered(names: Iterable[str]) -> list[str]:
    """Names in the order in which Megatron registers them, as far as it is known here."""
    listed = list(names)
    order = Order()
    order.learn(listed)
    order.arrange()
    return sorted(listed, key=order.key)
