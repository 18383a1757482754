"""The robot's prompt and its answer: what training, the model and the evaluation must agree on (numpy only).

    instruction -> contact_question -> (the model) -> "37 52 05 71 93" -> parse_contact -> pixel and direction

Question types are named here; data/questions.py has the table of them and writes the questions.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

ROBOT_TYPES = ("plan", "success", "possible", "past", "future", "movable")  # answered in words
GENERAL_TYPES = ("object", "caption", "colour", "size", "relation", "parts", "count", "state", "presence")
COORDINATE_TYPES = {"where": 2, "box": 4, "contact": 5}  # how many numbers make an answer
CONTACT_TOKENS = 16  # "37 52 05 71 93" is nine tokens and the end
QUESTION_TYPES = (*GENERAL_TYPES, *ROBOT_TYPES, *COORDINATE_TYPES)


def number(c: float, size: float = 1.0) -> str:
    """Two digits, floor(100 c / size) clipped to "00" .. "99". A direction d in [-1, 1] is written number(d + 1, 2)."""
    if not math.isfinite(c) or not size > 0:
        raise ValueError(f"number(c={c}, size={size}): c must be finite and size positive")
    return f"{min(max(math.floor(100 * c / size), 0), 99):02d}"


def contact_question(instruction: str) -> str:
    """The question around an instruction, the same in training and in use. ValueError when the instruction is empty."""
    text = " ".join(instruction.split()).rstrip(".!? ")
    if not text:
        raise ValueError("the instruction is empty; say what to do, for example 'open the top drawer'")
    return f"Predict the contact point and direction: {text[0].lower() + text[1:]}."


def contact_answer(contact: Mapping, image_size: int) -> str:
    """ "u v a b c" from contact["u"], ["v"] (pixels) and ["approach"]: a unit vector in the camera frame (x right,
    y down, z forward) along which the gripper comes."""
    pixel = [number(contact[key], image_size) for key in ("u", "v")]
    return " ".join(pixel + [number(d + 1, 2) for d in contact["approach"]])


def parse_contact(text: str) -> tuple[float, float, np.ndarray] | None:
    """Back from text: u, v as shares of the picture (0..1), approach as (3,) unit vector. None if it is no contact.

    Strict: five two-digit numbers with single spaces, only white space around them is forgiven. A number stands for the
    middle of its bin: u and v are at most 0.005 off, a component of the direction 0.01 (before normalisation).
    """
    if not re.fullmatch(r"[0-9]{2}( [0-9]{2}){4}", text.strip()):
        return None
    u, v, *direction = ((int(word) + 0.5) / 100 for word in text.split())
    approach = 2 * np.array(direction) - 1  # never zero: middles of bins are odd hundredths
    return u, v, approach / np.linalg.norm(approach)
