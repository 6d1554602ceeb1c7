"""The form of a conversation, turn by turn, and how one that is too long is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmconvert.runtime.batch import IGNORED
from mmconvert.runtime.families import Architecture, read_config


@dataclass(frozen=True)
class Template:
    """The form of a conversation: ChatML in one of its forms, or GLM's.

    Attributes:
        openings: tokens that open a message, by its role; none for ChatML.
        beginning: tokens that stand first.
        closings: tokens that end an answer, beside the tokenizer's own, which is learnt there.
        system: what a conversation begins with that has no such message of its own; "" for nothing.
        between: what stands behind the end of each message.
        begin: the tokenizer's first token stands first, if it has one.
        thought: what stands before an answer without thoughts, and is learnt.
        by_turn: a long conversation is cut turn by turn, as LLaMA-Factory does; else on the right.
    """

    system: str = ""
    between: str = "\n"
    begin: bool = False
    by_turn: bool = True
    openings: Mapping[str, str] = field(default_factory=dict[str, str])
    beginning: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
    thought: str = ""


# Qwen: the chat templates of the models. InternVL: conversation.py of OpenGVLab's models.
QWEN = Template("You are a helpful assistant.")
GLM = Template(  # as LLaMA-Factory's glm4v has it
    between="",
    openings={role: f"<|{role}|>" for role in ("system", "user", "assistant")},
    beginning=("[gMASK]", "<sop>"),
    closings=("<|user|>", "<|observation|>"),
)
BY_KIND = {"glm4v": GLM, "qwen3_vl": Template(), "qwen3_vl_moe": Template()}
# By the names that data.json has for them.
NAMED = {
    "qwen2vl": QWEN,
    "qwen2_omni": QWEN,
    "qwen3_vl": Template(thought="<think>\n\n</think>\n\n"),
    "qwen3_vl_nothink": Template(),
    "glm4.1v": GLM,
}
INTERN_NAMED = {
    "internlm2-chat": Template(
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
        "英文名叫InternVL, 是一个有用无害的人工智能助手。",
        between="",
        begin=True,
        by_turn=False,
    ),
    "internvl2_5": Template(
        "你是书生·万象，英文名是InternVL，"
        "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
        by_turn=False,
    ),
}
# What config.json of some InternVL2 says.
INTERN_NAMED["Hermes-2"] = INTERN_NAMED["internlm2-chat"]


def template_of(arch: Architecture, hf_dir: Path, name: str) -> Template:
    """The template of a model.

    Args:
        name: by data.json; "" takes the model's own, of InternVL that of config.json or a bare one.
    """
    if not arch.intern:
        return NAMED[name] if name else BY_KIND.get(arch.kind, QWEN)
    bare = Template(by_turn=False)
    return INTERN_NAMED.get(name or str(read_config(hf_dir).get("template")), bare)


@dataclass
class Turn:
    """What is asked, and what is answered: ids, and which of the answer's are learnt."""

    asked: list[int] = field(default_factory=list[int])
    answer: list[int] = field(default_factory=list[int])
    learnt: list[bool] = field(default_factory=list[bool])

    def add(self, ids: Sequence[int], *, answer: bool, learnt: bool = False) -> None:
        """Appends ids to one of both."""
        if answer:
            self.answer += ids
            self.learnt += [learnt] * len(ids)
        else:
            self.asked += ids


def line(
    turns: Sequence[Turn], length: int, *, by_turn: bool, everything: bool, last: bool
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation.

    Args:
        length: ids at most; 0 for no limit.
        by_turn: how a longer one is cut.
        everything: questions are learnt, too.
        last: of the answers only the last is learnt; a long conversation then keeps its end.
    """
    pairs = list(enumerate(turns))
    found: list[tuple[list[int], list[int]]] = []
    room = length
    for number, turn in reversed(pairs) if last else pairs:
        asked, answer = len(turn.asked), len(turn.answer)
        if length and by_turn:
            if room <= 0:
                break
            asked, answer = shares(asked, answer, room)
            room -= asked + answer
        keeps = not last or number == len(turns) - 1
        labels = turn.asked[:asked] if everything else [IGNORED] * asked
        kept = zip(turn.answer[:answer], turn.learnt, strict=False)
        labels += [i if keeps and learnt else IGNORED for i, learnt in kept]
        found.append((turn.asked[:asked] + turn.answer[:answer], labels))
    if last:
        found.reverse()
    ids = [i for part, _ in found for i in part]
    labels = [i for _, part in found for i in part]
    return (ids[:length], labels[:length]) if length else (ids, labels)


def shares(asked: int, answer: int, room: int) -> tuple[int, int]:
    """How much of a question and of its answer fits: LLaMA-Factory's rule.

    A short one of the two stays whole; of two long ones each keeps its proportion.
    """
    if 2 * answer < room:
        most = room
    elif 2 * asked < room:
        most = room - asked
    else:
        most = int(room * (answer / (asked + answer)))
    answer = min(most, answer)
    return min(max(room - answer, 0), asked), answer
