"""How samples become batches: the limits and choices of data.json, and what holds without one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """InternVL's tiles.

    Attributes:
        dynamic: a picture is cut into as many tiles as its shape asks for; else it is one.
        thumbnail: beside several tiles the whole picture stands as one more.
        least, most: tiles of a picture, the thumbnail not counted.
        square: pictures are padded to squares first.
    """

    dynamic: bool = False
    thumbnail: bool = False
    least: int = 1
    most: int = 6
    square: bool = False


@dataclass(frozen=True)
class Prepare:
    """How samples are prepared.

    Attributes:
        image_pixels, video_pixels: the least and the most pixels of a picture and of a frame; it
            is scaled before the model's processor sees it. None: the processor alone decides.
        video_rate: frames a second that are taken.
        video_frames: frames of a video at most.
        learn_questions: what the user says is learnt, too.
        learn_last: only the last answer is learnt.
        length: tokens of a sample; longer ones are cut. 0: none is cut.
        tiling: of InternVL; None takes that of config.json.
        newline: the newline behind an answer in Qwen's template is learnt, as MindSpeed-MM does.
        template: of conversations, by data.json; "" takes the model's own.
        thinking: with the template ``qwen3_vl`` an answer without thoughts learns that it has none.
        sound_in_video: a video's sound stands between its frames, for Omni.
    """

    image_pixels: tuple[int, int] | None = None
    video_pixels: tuple[int, int] | None = None
    video_rate: float = 2.0
    video_frames: int = 16
    learn_questions: bool = False
    learn_last: bool = False
    length: int = 0
    newline: bool = True
    tiling: Tiling | None = None
    template: str = ""
    thinking: bool = True
    sound_in_video: bool = False
