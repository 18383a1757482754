"""Wordings that training, the model and the evaluation must agree on, and how questions are asked (numpy only).

    instruction -> contact_question -> (the model) -> "37 52 05 71 93" -> parse_contact -> pixel and direction

Question types are named here; data/questions.py explains them in a table and fills in the wordings of ASK.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

ROBOT_TYPES = ("plan", "success", "possible", "past", "future", "movable")  # answered in words
GENERAL_TYPES = ("object", "caption", "colour", "size", "relation", "parts", "count", "state", "presence")
COORDINATE_TYPES = {"where": 2, "box": 4, "contact": 5}  # how many numbers an answer has
CONTACT_TOKENS = 16  # "37 52 05 71 93" is nine tokens plus the end token
QUESTION_TYPES = (*GENERAL_TYPES, *ROBOT_TYPES, *COORDINATE_TYPES)


def number(c: float, size: float = 1.0) -> str:
    """Two digits, floor(100 c / size) clipped to "00" .. "99". A direction d in [-1, 1] is written number(d + 1, 2)."""
    if not math.isfinite(c) or not size > 0:
        raise ValueError(f"number(c={c}, size={size}): c must be finite and size positive")
    return f"{min(max(math.floor(100 * c / size), 0), 99):02d}"


def contact_question(instruction: str) -> str:
    """Wrap an instruction in a question, the same in training and at inference. ValueError if it is empty."""
    text = " ".join(instruction.split()).rstrip(".!? ")
    if not text:
        raise ValueError("the instruction is empty; say what to do, for example 'open the top drawer'")
    return f"Predict the contact point and direction: {text[0].lower() + text[1:]}."


def contact_answer(contact: Mapping, image_size: int) -> str:
    """ "u v a b c" from contact["u"], ["v"] (pixels) and ["approach"]: a unit vector in the camera frame (x right,
    y down, z forward) along which the gripper approaches."""
    pixel = [number(contact[key], image_size) for key in ("u", "v")]
    return " ".join(pixel + [number(d + 1, 2) for d in contact["approach"]])


def parse_contact(text: str) -> tuple[float, float, np.ndarray] | None:
    """Parse text: u, v as shares of the picture (0..1), approach as (3,) unit vector. None if it is not a contact.

    Strict: five two-digit numbers separated by single spaces; only white space around them is ignored. A number stands
    for the centre of its bin: u and v are at most 0.005 off, a component of the direction 0.01 (before normalisation).
    """
    if not re.fullmatch(r"[0-9]{2}( [0-9]{2}){4}", text.strip()):
        return None
    u, v, *direction = ((int(word) + 0.5) / 100 for word in text.split())
    approach = 2 * np.array(direction) - 1  # never zero: bin centres are odd hundredths
    return u, v, approach / np.linalg.norm(approach)


# Question type, or a variant of one -> its wordings.
ASK = {
    "object": ("What is this?", "What is this object?", "What object is in the picture?", "Name this object.",
               "What do you see?", "What kind of thing is this?"),
    "caption": ("Describe this object briefly.", "Give a short caption of the picture.", "Caption this picture.",
                "What is in the picture, and in which colour?", "Describe this object in a few words."),
    "full caption": ("Describe this object and what can move on it.", "Caption this picture with the movable parts.",
                     "Describe this object with its movable parts.", "What is this, and what can move on it?"),
    "colour": ("What colour is this object?", "What colour is it?", "Name the colour of this object.",
               "Which colour does this object have?", "What color is this object?"),
    "part colour": ("What colour is {the}?", "Name the colour of {the}.", "Which colour does {the} have?",
                    "What color is {the}?"),
    "size": ("How large is this object in the picture: small, medium or large?", "How large does this object look?",
             "Does this object look small, medium or large?", "Of what size is this object in the picture?"),
    "larger": ("Which looks larger, {a} or {b}?", "Which is larger in the picture, {a} or {b}?",
               "{a} or {b}: which is larger?", "Of {a} and {b}, which is the larger one?"),
    "side": ("Is this object in the left or in the right half of the picture?", "Left or right: where is this object?",
             "On which side of the picture is this object, left or right?", "Which half holds it: left, right?"),
    "left right": ("Is {a} to the left or to the right of {b}?", "Left or right of {b}: where is {a}?",
                   "On which side of {b} is {a}, left or right?", "Seen from here, is {a} left or right of {b}?"),
    "above below": ("Is {a} above or below {b}?", "Above or below {b}: where is {a}?",
                    "In the picture, is {a} above or below {b}?", "Is {a} higher than {b} or lower, above or below?"),
    "parts": ("Which parts of this object can you see that move?", "Which movable parts can you see?",
              "What can be moved on this object?", "Name the parts of this object that can move.",
              "List the movable parts in view."),
    "count": ("How many movable parts can you see?", "How many parts of this object can move?",
              "Count the movable parts.", "What is the number of movable parts in view?"),
    "count kind": ("How many {kinds} can you see?", "Count the {kinds}.", "How many {kinds} are there?",
                   "What is the number of {kinds}?"),
    "state": ("Is {the} open or closed?", "Is {the} closed or open?", "In which state is {the}, open or closed?",
              "Tell me whether {the} is open or closed."),
    "where": ("Where is {the}?", "Where in the picture is {the}?", "Give the position of {the}.", "Locate {the}.",
              "Point to {the}."),
    "box": ("Give the bounding box of {the}.", "What is the bounding box of {the}?", "Put a box around {the}.",
            "Which bounding box holds {the}?"),
    "presence": ("Is there {a} in this picture?", "Is there {a}?", "Can you see {a}?", "Does the picture show {a}?",
                 "Do you see {a} here?"),
    "possible": ("Is it possible to {act}?", "Can a robot {act} now?", "{act}: possible right now?",
                 "Would it work to {act}?", "Could you {act} right now?"),
    "plan": ("How do I {act}?", "Which steps does it take to {act}?", "Goal: {act}. What are the steps?",
             "Plan how to {act}.", "How would a robot {act}?"),
    "next": ("Goal: {act}. Done so far: {done}. What next?", "I want to {act}. So far: {done}. Next step?",
             "Current goal is: {act}. Last steps: {done}. Immediate next step?",
             "Task: {act}. Finished: {done}. What follows?"),
    "five": ("Goal: {act}. Done so far: {done}. What are the next five steps?", "I want to {act}. Next five steps?",
             "Current goal is: {act}. Last steps: {done}. Next five steps?", "Plan ahead, five steps: {act}."),
    "success": ("The goal was to {act}. Did it work?", "Somebody tried to {act}. Was it a success?",
                "Goal: {act}. Has it been reached?", "Was the attempt to {act} successful?"),
    "past": ("What has just been done?", "What did the robot just do?", "Which action has just been finished?",
             "What happened right before this picture?"),
    "future": ("The gripper holds {the} and pulls. What will happen?", "What happens if the robot pulls at {the}?",
               "The robot is about to pull at {the}. What comes next?", "Predict what a pull at {the} will do."),
    "future push": ("The gripper touches {the} and pushes. What will happen?", "What happens if one pushes {the}?",
                    "The robot is about to push {the}. What comes next?", "Predict what a push at {the} will do."),
    "movable": ("Can the point {point} be moved?", "Does the point {point} lie on a part that moves?",
                "Would what is at {point} move if pulled or pushed?", "Is there a movable part at {point}?"),
    "actions": ("What actions are possible now?", "What could a robot do with this object?",
                "Which actions are possible on this object?", "What can be done with this object now?"),
}  # fmt: skip

# Half with the object's noun, a quarter with "object", a quarter with neither, only the part's name.
INSTRUCTIONS_NOUN = ("{act} of the {noun}", "{act} on the {noun}", "{act} of this {noun}", "on the {noun}, {act}")
INSTRUCTIONS_PLAIN = ("{act} of the object", "{act} of this object", "{act}", "{act}, please")
