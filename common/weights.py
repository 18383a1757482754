"""Files of weights and their configs: our checkpoints, published Mamba folders, CLIP folders. No file is trusted.

    config = mamba_config("mamba-130m-hf")                                 # shapes, in our names
    load_tensors(model, weight_files("mamba-130m-hf"), mamba_name, TIED)   # fills a model built on the meta device

Whoever made a file, reading it executes nothing (safetensors, or a pickle through `weights_only=True`), opens nothing
outside its folder, and allocates nothing before the names and shapes of ALL tensors fit the model. Then they are read
one at a time, straight into the model's own memory and dtype: there is never a second copy of the weights.

What published folders look like (all accepted):

    config.json          Mamba, original: d_model, n_layer, vocab_size, ssm_cfg, pad_vocab_size_multiple
                         Mamba, -hf:      hidden_size, num_hidden_layers, vocab_size, state_size, time_step_rank, ..
                         CLIP:            hidden_size, .. of the image tower, or all of CLIP with a `vision_config`
    weights, one of      model.safetensors | pytorch_model.bin | one of the two in parts, named by an .index.json
    names                backbone.embedding.weight (original), backbone.embeddings.weight (-hf); lm_head.weight, or not;
                         CLIP's tower alone or behind `vision_model.`, beside the text tower

Sources: github.com/state-spaces/mamba (config and names), huggingface.co/docs/transformers (the -hf ones), OpenAI CLIP.
"""

import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import write_atomically

KEEP_FLOAT32 = ("A_log", ".D", "dt_proj.bias")  # ends of names: in bfloat16 their rounding errors grow with every step
TIED = {"lm_head.weight": "backbone.embedding.weight"}  # may be in a file; must then equal the other
JSON_BYTES = 2**26  # no config or index is larger
LARGEST = {"n_layer": 2**10, "expand": 64, "mlp_ratio": 64, "d_state": 2**12, "image_size": 2**14}  # others: 2**20

# ---- files -----------------------------------------------------------------------------------------------------------


def write_json(path: Path, values: dict) -> None:
    write_atomically(path, lambda tmp: Path(tmp).write_text(json.dumps(values, indent=1) + "\n"))


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError names the file."""
    try:
        if path.stat().st_size > JSON_BYTES:
            raise ValueError(f"larger than {JSON_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def dataclass_from_dict(cls, values, source: str):
    """Strict: an unknown key, a value of another type or out of all reason is an error that names it."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(values).__name__}")
    known = {f.name: getattr(cls(), f.name) for f in fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{source}: unknown key {unknown[0]!r}; known keys are {', '.join(known)}")
    out = {}
    for key, value in values.items():
        default, name = known[key], f"{source}.{key}"
        if is_dataclass(default):
            value = dataclass_from_dict(type(default), value, name)
        elif isinstance(default, tuple):
            if not isinstance(value, list | tuple) or len(value) > LARGEST["n_layer"]:
                raise ValueError(f"{name}: expected a list of numbers, got {value!r}")
            for x in value:
                check_number(name, x, isinstance(default[0], int), -1e6 if isinstance(default[0], float) else 1)
            value = tuple(value)
        elif isinstance(default, bool | str):
            if type(value) is not type(default):
                raise ValueError(f"{name}: expected {type(default).__name__}, got {value!r}")
        else:
            low = {"dt_rank": 0, "select_layer": -LARGEST["n_layer"]}.get(key, 1)
            check_number(name, value, isinstance(default, int), low if isinstance(default, int) else 1e-12, key)
        out[key] = value
    return cls(**out)


def check_number(name: str, value, whole: bool, low: float, key: str = "") -> int | float:
    """The value, if it is a (whole) number from `low` to the largest one reasonable for `key`."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{name}: expected {'int' if whole else 'float'}, got {value!r}")
    if not low <= value <= LARGEST.get(key, 2**20):  # false for NaN too
        raise ValueError(f"{name}: {value} is outside {low:g} .. {LARGEST.get(key, 2**20)}")
    return value


# ---- weights ---------------------------------------------------------------------------------------------------------


def weight_files(folder) -> list[Path]:
    """The files that hold the weights of a published folder; one file, or the parts that its index names."""
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
            raise ValueError(f"{index}: `weight_map` is not a table of tensor and file names")
        for part in sorted(set(parts.values())):
            if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", part):  # no separators: it lies in this folder
                raise ValueError(f"{index}: {part!r} is not the name of a weights file in the index's own folder")
            if not (folder / part).is_file():
                raise ValueError(f"{folder / part}: no such file, but {index.name} names it")
        return [folder / part for part in sorted(set(parts.values()))]
    raise ValueError(f"{folder}: no model.safetensors, pytorch_model.bin or .index.json of one of them")


def open_tensors(file: Path) -> tuple[dict, Callable[[str], Tensor]]:
    """({name: shape, or dtype where that is no floating point}, function that reads one tensor).

    Only a safetensors header, or a pickle's structure, is read here.
    """
    if file.suffix == ".safetensors":
        try:
            tensors = safe_open(str(file), "pt")
            views = {name: tensors.get_slice(name) for name in tensors.keys()}
            shapes = {k: tuple(v.get_shape()) if "F" in v.get_dtype() else v.get_dtype() for k, v in views.items()}
            return shapes, tensors.get_tensor
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    try:
        in_zip = zipfile.is_zipfile(file)  # torch.save's format since 2020: its tensors can be mapped, not read
        if in_zip:
            with zipfile.ZipFile(file) as parts:
                if any(part.compress_type for part in parts.infolist()):
                    raise ValueError("compressed, which torch.save never does")
        with warnings.catch_warnings(action="ignore"):  # about the pickle's age
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=in_zip)
        if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
        ):
            raise ValueError("not a table of tensors")
    except pickle.UnpicklingError as error:
        wants = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks to run {wants[1]}" if wants else "is damaged or asks for more than tensors"
        raise ValueError(f"{file}: refused, this pickle {what}") from None
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: not a readable file of tensors ({reason})") from None
    return {k: tuple(t.shape) if t.is_floating_point() else t.dtype for k, t in tensors.items()}, tensors.__getitem__


def load_tensors(
    model: nn.Module,
    files: list[Path],
    rename: Callable[[str], str | None] = lambda name: name,
    tied: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Fill a model built on the meta device; one ValueError names every missing, surplus or misshaped tensor.

    Args     rename: a file's name -> the model's, or None for a tensor to leave out. tied: {name that may be there:
             the parameter it must equal}. dtype: of the parameters in memory, but KEEP_FLOAT32 are float32.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied ones once
    found, read, problems = {}, {}, []
    for file in files:
        shapes, get = open_tensors(file)
        for theirs, shape in shapes.items():
            name = rename(theirs)
            if name in found:
                problems.append(f"{name} twice")
            elif name is not None:
                found[name], read[name] = shape, (get, theirs)
    tied = {alias: name for alias, name in (tied or {}).items() if alias in found}
    problems += [f"missing {k}" for k in expected.keys() - found.keys()]
    problems += [f"surplus {k}" for k in found.keys() - expected.keys() - tied.keys()]
    wanted = expected | {alias: expected[name] for alias, name in tied.items()}
    misshaped = (k for k in wanted.keys() & found.keys() if found[k] != wanted[k])
    problems += [f"{k} is {found[k]}, expected {wanted[k]}" for k in misshaped]
    if problems:
        raise ValueError(f"{files[0] if len(files) == 1 else files[0].parent}: " + "; ".join(sorted(problems)))

    def tensor(name: str, kind: torch.dtype) -> Tensor:
        get, theirs = read[name]
        try:
            return get(theirs).to(torch.float32 if name.endswith(KEEP_FLOAT32) else kind, copy=True)  # own memory
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{files[0].parent}: {theirs} cannot be read ({error})") from None

    model.load_state_dict({name: tensor(name, dtype) for name in expected}, strict=False, assign=True)
    for alias, name in tied.items():
        if not torch.equal(tensor(alias, dtype), model.get_parameter(name)):
            raise ValueError(f"{files[0].parent}: {alias} differs from {name}; this model ties the two")
    model.requires_grad_(True)


# ---- published Mamba -------------------------------------------------------------------------------------------------


def mamba_name(name: str) -> str:
    """A published tensor's name -> ours: -hf folders say `embeddings`."""
    return name.replace("backbone.embeddings.", "backbone.embedding.")


def mamba_config(folder) -> dict:
    """Shapes in our names (the fields of LMConfig) from the config.json of a published folder, -hf or original.

    Raises   ValueError naming the key that is missing, unknown, absurd, or asks for a model that this project has not.
    """
    file = Path(folder) / "config.json"
    config = read_json(file)
    if "hidden_size" in config:  # -hf; asked first, because some of these folders hold the original's keys as well
        theirs = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "vocab_size": "vocab_size"}
        theirs |= {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank"}
        fixed = {"model_type": "mamba", "hidden_act": "silu", "use_bias": False, "use_conv_bias": True}
        multiple, eps = 1, config.get("layer_norm_epsilon", 1e-5)
    else:
        ssm = config.get("ssm_cfg") or {}
        if not isinstance(ssm, dict):
            raise ValueError(f"{file}: ssm_cfg is {ssm!r}, expected a JSON object")
        config = config | ssm
        theirs = {k: k for k in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "dt_rank")}
        fixed = {"layer": "Mamba1", "rms_norm": True, "bias": False, "conv_bias": True}
        fixed |= {"d_intermediate": 0, "attn_layer_idx": []}
        harmless = "ssm_cfg attn_cfg residual_in_fp32 fused_add_norm pad_vocab_size_multiple tie_embeddings"
        harmless += " dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path"  # speed and initial values only
        unknown = sorted(config.keys() - theirs.keys() - fixed.keys() - set(harmless.split()))
        if unknown:
            raise ValueError(f"{file}: unknown key {unknown[0]!r} in a Mamba config")
        multiple, eps = config.get("pad_vocab_size_multiple", 8), 1e-5
    _check_fixed(file, config, fixed, "Mamba-1 with RMSNorm and SiLU")
    default = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto"}
    values = {}
    for ours, key in theirs.items():
        value = config.get(key, default.get(ours))
        if ours == "dt_rank" and value == "auto":
            value = 0  # ceil(d_model / 16)
        values[ours] = check_number(f"{file}: {key}", value, True, 0 if ours == "dt_rank" else 1, ours)
    multiple = check_number(f"{file}: pad_vocab_size_multiple", multiple, True, 1)
    values["vocab_size"] = math.ceil(values["vocab_size"] / multiple) * multiple
    return values | {"norm_eps": check_number(f"{file}: layer_norm_epsilon", eps, False, 1e-12)}


def save_mamba(lm: nn.Module, folder, naming: str = "hf") -> None:
    """Write a MambaLM as a folder that `transformers` ("hf") or mamba_ssm ("original") reads."""
    cfg, folder = lm.cfg, Path(folder)
    if naming not in ("hf", "original"):
        raise ValueError(f"naming: {naming!r}, expected 'hf' or 'original'")
    if cfg.mixer != "mamba":
        raise ValueError(f"mixer: {cfg.mixer}; only a Mamba has a published Mamba form")
    if cfg.bc_norm:
        raise ValueError("bc_norm: published Mamba code cannot normalise B and C; this model has no published form")
    if naming == "original" and cfg.norm_eps != 1e-5:
        raise ValueError(f"norm_eps: {cfg.norm_eps} cannot be said in the original config, which means 1e-5")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in lm.named_parameters()}
    if naming == "hf":
        config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "tie_word_embeddings": True}
        config |= {"hidden_size": cfg.d_model, "num_hidden_layers": cfg.n_layer, "vocab_size": cfg.vocab_size}
        config |= {"state_size": cfg.d_state, "conv_kernel": cfg.d_conv, "expand": cfg.expand}
        config |= {"intermediate_size": cfg.d_inner, "time_step_rank": cfg.rank, "layer_norm_epsilon": cfg.norm_eps}
        weights = {name.replace("backbone.embedding.", "backbone.embeddings."): w for name, w in weights.items()}
        write_json(folder / "config.json", config)
        save_tensors(folder / "model.safetensors", weights)
    else:
        ssm = {"d_state": cfg.d_state, "d_conv": cfg.d_conv, "expand": cfg.expand, "dt_rank": cfg.rank}
        config = {"d_model": cfg.d_model, "n_layer": cfg.n_layer, "vocab_size": cfg.vocab_size, "ssm_cfg": ssm}
        config |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 1}
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        write_json(folder / "config.json", config)
        write_atomically(folder / "pytorch_model.bin", lambda tmp: torch.save(weights, tmp))


def save_tensors(path: Path, weights: dict[str, Tensor]) -> None:
    write_atomically(path, lambda tmp: save_file(weights, tmp, {"format": "pt"}))


def _check_fixed(file: Path, config: dict, fixed: dict, what: str) -> None:
    """What our code cannot vary must be as it is there, or be absent."""
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {config[key]!r}, but only {what} is known here ({key} = {value!r})")


# ---- CLIP ------------------------------------------------------------------------------------------------------------


def clip_name(name: str) -> str | None:
    """A CLIP tensor's name -> ours, None for what is not the image tower (position_ids are a table 0, 1, 2, ..)."""
    if name.startswith(("text_model.", "logit_scale", "text_projection", "visual_projection")):
        return None
    return None if name.endswith("position_ids") else name.removeprefix("vision_model.")


def clip_config(folder) -> dict:
    """The fields of VisionConfig from the config.json of a CLIP folder: all of CLIP, or the image tower alone."""
    file = Path(folder) / "config.json"
    config = read_json(file)
    if config.get("model_type", "clip") not in ("clip", "clip_vision_model"):
        raise ValueError(f"{file}: model_type is {config['model_type']!r}, expected CLIP's")
    config = config.get("vision_config", config)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: vision_config is {config!r}, expected a JSON object")
    fixed = {"hidden_act": "quick_gelu", "num_channels": 3, "layer_norm_eps": 1e-5}
    _check_fixed(file, config, fixed, "OpenAI's CLIP image tower")
    theirs = {"image_size": ("image_size", 224), "patch_size": ("patch_size", 32), "width": ("hidden_size", 768)}
    theirs |= {"n_layer": ("num_hidden_layers", 12), "n_head": ("num_attention_heads", 12)}
    theirs |= {"mlp_ratio": ("intermediate_size", 3072)}  # defaults: CLIP configs leave out what equals ViT-B/32
    values = {
        ours: check_number(f"{file}: {key}", config.get(key, default), True, 1, ours if ours != "mlp_ratio" else "")
        for ours, (key, default) in theirs.items()
    }
    if values["mlp_ratio"] % values["width"]:
        raise ValueError(f"{file}: intermediate_size {values['mlp_ratio']} is no multiple of {values['width']}")
    values["mlp_ratio"] //= values["width"]
    return values | {"stem": (), "output_norm": False}


def save_clip(vision: nn.Module, folder) -> None:
    """Write a VisionTransformer as a CLIP image-tower folder that `transformers` reads."""
    cfg, folder = vision.cfg, Path(folder)
    if cfg.stem:
        raise ValueError(f"stem: {cfg.stem} has no published form; CLIP has a single patch convolution, stem=()")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "hidden_act": "quick_gelu"}
    config |= {"image_size": cfg.image_size, "patch_size": cfg.patch_size, "hidden_size": cfg.width}
    config |= {"num_hidden_layers": cfg.n_layer, "num_attention_heads": cfg.n_head}
    config |= {"intermediate_size": cfg.mlp_ratio * cfg.width, "num_channels": 3, "layer_norm_eps": 1e-5}
    write_json(folder / "config.json", config)
    weights = {f"vision_model.{name}": p.detach().cpu().contiguous() for name, p in vision.named_parameters()}
    save_tensors(folder / "model.safetensors", weights)
