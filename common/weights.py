"""Checkpoints: a folder with model.safetensors, config.json and the tokenizer's files.

Reading a file executes nothing, and allocates nothing until the names and shapes of ALL tensors match the model. Then
the tensors are read one at a time and become the model's parameters: there is never a second copy of the weights.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import write_atomically

# Endings of parameter names that are never 16-bit: a rounded decay is applied again at every token.
KEEP_FLOAT32 = ("A_log", ".D", "dt_proj.bias")
LARGEST = {"n_layer": 2**10, "expand": 64, "mlp_ratio": 64, "d_state": 2**12, "image_size": 2**14}  # others: 2**20
LOWEST = {"dt_rank": 0, "fine": 0, "turn": 0, "select_layer": -LARGEST["n_layer"]}  # others: 1, floats above 0
RETIRED = (("mixer", "mamba"),)  # entries of older configs that nothing depends on


def count(module: nn.Module) -> int:
    """Number of parameters, counting tied ones once."""
    return sum(p.numel() for p in module.parameters())


def check_number(name: str, value, whole: bool, low: float, key: str = "") -> int | float:
    """The value, if it is a (whole) number from `low` to the largest one reasonable for `key`."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{name}: expected {'int' if whole else 'float'}, got {value!r}")
    if not low <= value <= LARGEST.get(key, 2**20):  # false for NaN too
        raise ValueError(f"{name}: {value} is outside {low:g} .. {LARGEST.get(key, 2**20)}")
    return value


def dataclass_from_dict(cls, values, source: str):
    """A (nested) dataclass with the values of a JSON object; fields that are left out keep their defaults.

    Raises: ValueError naming `source` and the key that is unknown, of the wrong type, or has an absurd value.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(values).__name__}")
    defaults = {field.name: getattr(cls(), field.name) for field in fields(cls)}
    checked = {}
    for key, value in values.items():
        if key in defaults:
            checked[key] = _check_field(key, value, defaults[key], f"{source}.{key}")
        elif (key, value) not in RETIRED:
            raise ValueError(f"{source}: unknown key {key!r}; known keys are {', '.join(defaults)}")
    try:
        return cls(**checked)
    except ValueError as error:  # from __post_init__, which does not know the file
        raise ValueError(f"{source}: {error}") from None


def _check_field(key: str, value, default, name: str):
    """`value`, if it has the type of `default` and a reasonable size."""
    if is_dataclass(default):
        return dataclass_from_dict(type(default), value, name)
    if isinstance(default, bool | str):
        if type(value) is not type(default):
            raise ValueError(f"{name}: expected {type(default).__name__}, got {value!r}")
        return value
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or len(value) > LARGEST["n_layer"]:
            raise ValueError(f"{name}: expected a list of numbers, got {value!r}")
        whole = isinstance(default[0], int)
        return tuple(check_number(name, x, whole, 1 if whole else -1e6) for x in value)
    whole = isinstance(default, int)
    return check_number(name, value, whole, LOWEST.get(key, 1 if whole else 1e-12), key)


def save_tensors(path: Path, module: nn.Module, rename: Callable[[str], str] = str, half: bool = False) -> None:
    """All parameters of `module` (tied ones once) as safetensors. half: matrices except A_log as float16."""
    weights = {}
    for name, p in module.named_parameters():
        p = p.detach().cpu().contiguous()
        weights[rename(name)] = p.half() if half and p.ndim >= 2 and not name.endswith("A_log") else p
    write_atomically(path, lambda temporary: save_file(weights, temporary, {"format": "pt"}))


def save_folder(folder, write: Callable[[Path], None], owned: tuple = ()) -> None:
    """Replace the files of a checkpoint folder together; other files in it stay.

    `write(staging)` makes the new files in an empty folder: a full disk or a kill meanwhile leaves the old checkpoint.
    Then config.json is removed first and replaced last, so a config is never beside weights of another save. `owned`:
    other files of a checkpoint, removed if `write` makes none. Raises: ValueError naming what cannot be written.
    """
    folder = Path(folder)
    staging = folder / "saving.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed save
        staging.mkdir()
        write(staging)
        for name in ("config.json", *owned):
            (folder / name).unlink(missing_ok=True)
        for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def open_safetensors(file: Path) -> tuple[dict, Callable[[str], Tensor]]:
    """({name: shape, or dtype if that is not floating point}, function that reads one tensor)."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        tensors = safe_open(str(file), "pt")
        views = {name: tensors.get_slice(name) for name in tensors.keys()}
        shapes = {k: tuple(v.get_shape()) if "F" in v.get_dtype() else v.get_dtype() for k, v in views.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    return shapes, tensors.get_tensor


def load_tensors(model, files, rename=str, tied=None, dtype=torch.float32, open_file=open_safetensors) -> None:
    """Fill a model built on the meta device; one ValueError names every missing, surplus or misshaped tensor.

    Args: files: paths. rename: name in the file -> name in the model, or None to skip the tensor. tied: {optional
        name: the parameter it must equal}. dtype: of the parameters in memory; KEEP_FLOAT32 are never 16-bit.
    Raises: ValueError, also for a tensor with non-finite numbers.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied ones once
    found, readers, problems = {}, {}, []
    for file in files:
        shapes, read = open_file(file)
        for theirs, shape in shapes.items():
            name = rename(theirs)
            if name in found:
                problems.append(f"{name} twice")
            elif name is not None:
                found[name] = shape
                readers[name] = (file, theirs, read)
    tied = {alias: name for alias, name in (tied or {}).items() if alias in found}
    wanted = expected | {alias: expected[name] for alias, name in tied.items()}
    problems += [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"surplus {name}" for name in found.keys() - wanted.keys()]
    wrong = [name for name in wanted.keys() & found.keys() if found[name] != wanted[name]]
    problems += [f"{name} is {found[name]}, expected {wanted[name]}" for name in wrong]
    if problems:
        raise ValueError(f"{files[0] if len(files) == 1 else files[0].parent}: " + "; ".join(sorted(problems)))

    def tensor(name: str) -> Tensor:
        file, theirs, read = readers[name]
        kept = torch.promote_types(dtype, torch.float32) if name.endswith(KEEP_FLOAT32) else dtype
        try:
            value = read(theirs).to(kept, copy=True)  # a copy: the file may be memory-mapped
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{file}: {theirs} cannot be read ({error})") from None
        if not all(math.isfinite(extreme) for extreme in value.aminmax()):  # no second tensor, unlike isfinite
            raise ValueError(f"{file}: {theirs} holds numbers that are not finite")
        return value

    model.load_state_dict({name: tensor(name) for name in expected}, strict=False, assign=True)
    for alias, name in tied.items():
        if not torch.equal(tensor(alias), model.get_parameter(name)):
            raise ValueError(f"{readers[alias][0]}: {alias} differs from {name}; this model ties the two")
    model.requires_grad_(True)
