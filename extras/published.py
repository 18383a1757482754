"""Read and write published folders: Mamba and CLIP weights (data/tokenizer.py reads the tokenizer.json of the former).

    lm = read_mamba(folder)                        # a MambaLM
    vision = read_clip(folder)                     # a VisionTransformer
    model = read_parts(clip_folder, mamba_folder)  # a RoboMamba, ready for stage 1.1 (train.py --vision-weights)
    save_mamba(lm, folder), save_clip(vision, folder)

config.json   Mamba's original (d_model, n_layer, ssm_cfg, ..) or -hf (hidden_size, ..); CLIP's, or its image tower's
weights       model.safetensors or pytorch_model.bin, in one file or in shards listed in an .index.json
names         backbone.embedding.weight (original), backbone.embeddings.weight (-hf); lm_head.weight is optional;
              CLIP's image tower alone, or under `vision_model.` next to the text tower

Nothing in such a file is executed (a pickle is read with `weights_only=True`), nothing outside the folder is opened.
Every error names the file.
Sources: github.com/state-spaces/mamba (config and names), huggingface.co/docs/transformers (the -hf ones), OpenAI CLIP.
"""

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import PRESETS, LMConfig, RoboMambaConfig, paper_config
from common.files import read_json, write_atomically, write_json
from common.weights import check_number, load_tensors, open_safetensors, save_folder, save_tensors
from data.tokenizer import PUBLISHED, PublishedEncoding
from robomamba import MambaLM, RoboMamba, VisionTransformer, init_weights

TIED = {"lm_head.weight": "backbone.embedding.weight"}  # optional in a file; if present, must equal the other
# Our names of shapes: theirs. What cannot vary here must match the second table or be absent.
MAMBA = {k: k for k in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "dt_rank")}
MAMBA_FIXED = {"layer": "Mamba1", "rms_norm": True, "bias": False, "conv_bias": True}
MAMBA_FIXED |= {"d_intermediate": 0, "attn_layer_idx": []}
MAMBA_OTHER = "ssm_cfg attn_cfg residual_in_fp32 fused_add_norm pad_vocab_size_multiple tie_embeddings"
MAMBA_OTHER += " dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path"  # speed and initial values only
HF = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "vocab_size": "vocab_size", "d_state": "state_size"}
HF |= {"d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank"}
HF_FIXED = {"model_type": "mamba", "hidden_act": "silu", "use_bias": False, "use_conv_bias": True}
CLIP = {"image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size"}
CLIP |= {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "mlp_ratio": "intermediate_size"}
CLIP_FIXED = {"hidden_act": "quick_gelu", "num_channels": 3, "layer_norm_eps": 1e-5}
# Defaults where a config has no value; CLIP's are for ViT-B/32.
MAMBA_DEFAULT = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto"}
CLIP_DEFAULT = {"image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12}
CLIP_DEFAULT |= {"num_attention_heads": 12, "intermediate_size": 3072}


def read_shapes(file: Path, config: dict, names: dict, fixed: dict, what: str) -> dict:
    """{our name: number} of a published config. Raises: ValueError naming the key that is absurd or unsupported."""
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f"{file}: {key} is {config[key]!r}, but only {what} is known here ({key} = {value!r})")
    values = {}
    for ours, key in names.items():
        value = config.get(key)
        if ours == "dt_rank" and value == "auto":
            value = 0  # ceil(d_model / 16)
        limit = "" if ours == "mlp_ratio" else ours  # here it is still a width
        values[ours] = check_number(f"{file}: {key}", value, True, 0 if ours == "dt_rank" else 1, limit)
    return values


# ---- weights ---------------------------------------------------------------------------------------------------------


def load(cls, cfg, folder, rename: Callable, tied: dict | None = None, dtype=torch.float32) -> nn.Module:
    """`cls(cfg)` with the weights of a published folder; `rename`, `tied` and `dtype` as in `load_tensors`."""
    with torch.device("meta"):
        module = cls(cfg)
    load_tensors(module, weight_files(folder), rename, tied, dtype, open_tensors)
    return module.eval()


def weight_files(folder) -> list[Path]:
    """The weight files of a published folder: a single file, or the shards listed in its index."""
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if not index.is_file():
            continue
        parts = read_json(index, dict).get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
            raise ValueError(f"{index}: `weight_map` is not a table of tensor and file names")
        for part in parts.values():
            if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", part):  # no path separators: it is in this folder
                raise ValueError(f"{index}: {part!r} is not the name of a weights file in the index's own folder")
            if not (folder / part).is_file():
                raise ValueError(f"{folder / part}: no such file, but {index.name} names it")
        return [folder / part for part in sorted(set(parts.values()))]
    raise ValueError(f"{folder}: no model.safetensors, pytorch_model.bin or .index.json of one of them")


def open_tensors(file: Path) -> tuple[dict, Callable[[str], Tensor]]:
    """As `open_safetensors`, but also for a pickled .bin, whose tensors are memory-mapped, not read."""
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    try:
        in_zip = zipfile.is_zipfile(file)  # torch.save's format since 2020
        if in_zip:
            with zipfile.ZipFile(file) as parts:
                if any(part.compress_type for part in parts.infolist()):  # mapping it would give wrong numbers
                    raise ValueError("compressed, which torch.save never does")
        with warnings.catch_warnings(action="ignore"):  # about the pickle's age
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=in_zip)
        values = tensors.values() if isinstance(tensors, dict) else [None]
        if not all(isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta for t in values):
            raise ValueError("not a table of tensors, or one among them is sparse or has no data")
        shapes = {str(k): tuple(t.shape) if t.is_floating_point() else t.dtype for k, t in tensors.items()}
    except pickle.UnpicklingError as error:
        wants = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks to run {wants[1]}" if wants else "is damaged or asks for more than tensors"
        raise ValueError(f"{file}: refused, this pickle {what}") from None
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: not a readable file of tensors ({reason})") from None
    return shapes, tensors.__getitem__


# ---- Mamba -----------------------------------------------------------------------------------------------------------


def mamba_config(folder) -> dict:
    """The fields of LMConfig from the config.json of a published folder, -hf or original.

    Raises: ValueError naming the key that is missing, unknown, absurd, or asks for a model that this project lacks.
    """
    file = Path(folder) / "config.json"
    config = read_json(file, dict)
    multiple, eps = 1, 1e-5
    what = "Mamba-1 with RMSNorm and SiLU"
    if "hidden_size" in config:  # -hf; checked first, because some of these folders hold the original's keys as well
        eps = check_number(f"{file}: layer_norm_epsilon", config.get("layer_norm_epsilon", eps), False, 1e-12)
        config = {HF[key]: value for key, value in MAMBA_DEFAULT.items()} | config
        values = read_shapes(file, config, HF, HF_FIXED, what)
    else:
        ssm = config.get("ssm_cfg") or {}
        if not isinstance(ssm, dict):
            raise ValueError(f"{file}: ssm_cfg is {ssm!r}, expected a JSON object")
        config = MAMBA_DEFAULT | config | ssm
        unknown = sorted(config.keys() - MAMBA.keys() - MAMBA_FIXED.keys() - set(MAMBA_OTHER.split()))
        if unknown:
            raise ValueError(f"{file}: unknown key {unknown[0]!r} in a Mamba config")
        values = read_shapes(file, config, MAMBA, MAMBA_FIXED, what)
        multiple = check_number(f"{file}: pad_vocab_size_multiple", config.get("pad_vocab_size_multiple", 8), True, 1)
    values["vocab_size"] = math.ceil(values["vocab_size"] / multiple) * multiple
    start = {"dt_min": 0.001, "dt_max": 0.1, "a_min": 1.0, "a_max": float(values["d_state"])}
    return values | start | {"norm_eps": eps, "bc_norm": False}


def read_mamba(folder, dtype=torch.float32) -> MambaLM:
    """A published Mamba folder: original or -hf naming, .bin or safetensors, sharded or not."""
    cfg = LMConfig(**mamba_config(folder))
    lm = load(MambaLM, cfg, folder, lambda name: name.replace(".embeddings.", ".embedding."), TIED, dtype)
    lm.tie()
    return lm


def save_mamba(lm: MambaLM, folder, naming: str = "hf") -> None:
    """Write a MambaLM as a folder that `transformers` ("hf") or mamba_ssm ("original") reads."""
    cfg = lm.cfg
    if naming not in ("hf", "original"):
        raise ValueError(f"naming: {naming!r}, expected 'hf' or 'original'")
    if cfg.bc_norm:
        raise ValueError("bc_norm: published Mamba code cannot normalise B and C; this model has no published form")
    if naming == "original" and cfg.norm_eps != 1e-5:
        raise ValueError(f"norm_eps: {cfg.norm_eps} cannot be said in the original config, which means 1e-5")
    shapes = {ours: getattr(cfg, ours) for ours in MAMBA} | {"dt_rank": cfg.rank}

    def write(staging: Path) -> None:
        if naming == "hf":
            config = {HF[ours]: value for ours, value in shapes.items()}
            config |= {"intermediate_size": cfg.d_inner, "layer_norm_epsilon": cfg.norm_eps, "model_type": "mamba"}
            config |= {"architectures": ["MambaForCausalLM"], "tie_word_embeddings": True}
            save_tensors(staging / "model.safetensors", lm, lambda name: name.replace("embedding.", "embeddings."))
        else:
            ssm = {key: shapes.pop(key) for key in ("d_state", "d_conv", "expand", "dt_rank")}
            config = shapes | {"ssm_cfg": ssm, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
            config["pad_vocab_size_multiple"] = 1
            weights = {name: p.detach().cpu() for name, p in lm.state_dict().items()}  # the tied head under both names
            write_atomically(staging / "pytorch_model.bin", lambda temporary: torch.save(weights, temporary))
        write_json(staging / "config.json", config)

    save_folder(folder, write)


# ---- CLIP ------------------------------------------------------------------------------------------------------------


def clip_name(name: str) -> str | None:
    """A CLIP tensor's name -> ours, None for anything outside the image tower (position_ids is just 0, 1, 2, ..)."""
    if name.startswith(("text_model.", "logit_scale", "text_projection", "visual_projection")):
        return None
    return None if name.endswith("position_ids") else name.removeprefix("vision_model.")


def clip_config(folder) -> dict:
    """The fields of VisionConfig from the config.json of a CLIP folder: all of CLIP, or the image tower alone."""
    file = Path(folder) / "config.json"
    config = read_json(file, dict)
    if config.get("model_type", "clip") not in ("clip", "clip_vision_model"):
        raise ValueError(f"{file}: model_type is {config['model_type']!r}, expected CLIP's")
    config = config.get("vision_config", config)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: vision_config is {config!r}, expected a JSON object")
    values = read_shapes(file, CLIP_DEFAULT | config, CLIP, CLIP_FIXED, "OpenAI's CLIP image tower")
    hidden = values["mlp_ratio"]
    if hidden % values["width"]:
        raise ValueError(f"{file}: intermediate_size {hidden} is no multiple of {values['width']}")
    return values | {"mlp_ratio": hidden // values["width"], "stem": (), "output_norm": False}


def read_clip(folder, select_layer: int = -2, dtype=torch.float32) -> VisionTransformer:
    """A CLIP folder (whole CLIP, or the image tower); select_layer -2 is the paper's choice."""
    values = clip_config(folder) | {"select_layer": select_layer}
    cfg = RoboMambaConfig.from_dict({"vision": values}, str(folder)).vision  # checks the shapes
    return load(VisionTransformer, cfg, folder, clip_name, dtype=dtype)


def save_clip(vision: VisionTransformer, folder) -> None:
    """Write a VisionTransformer as a CLIP image-tower folder that `transformers` reads."""
    cfg = vision.cfg
    if cfg.stem or cfg.depth:
        raise ValueError(f"stem {cfg.stem}, depth {cfg.depth}: CLIP has one convolution of RGB patches, stem=()")

    def write(staging: Path) -> None:
        config = {theirs: getattr(cfg, ours) for ours, theirs in CLIP.items()} | CLIP_FIXED
        config |= {"intermediate_size": cfg.mlp_ratio * cfg.width}
        config |= {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
        save_tensors(staging / "model.safetensors", vision, lambda name: f"vision_model.{name}")
        write_json(staging / "config.json", config)

    save_folder(folder, write)


# ---- a whole model ---------------------------------------------------------------------------------------------------


def read_parts(vision_folder, mamba_folder, preset="robomamba-2.8b", dtype=torch.float32):
    """A RoboMamba ready for stage 1.1: published CLIP encoder and Mamba language model, new projector and policy head.

    mamba_folder also holds the tokenizer.json. preset: "tiny" or "small" for their projector, head, pooling and
    position code; else the paper's. dtype: of the published parts; the new parts, to be trained, are float32.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    encoding = PublishedEncoding(Path(mamba_folder) / PUBLISHED)
    vision = read_clip(vision_folder, dtype=dtype)
    lm = read_mamba(mamba_folder, dtype)
    if preset in ("tiny", "small"):
        config = replace(PRESETS[preset], vision=vision.cfg, lm=lm.cfg)
    else:
        config = paper_config(vision.cfg, lm.cfg)  # its widths follow the language model's
    if encoding.n_vocab > lm.cfg.vocab_size:
        raise ValueError(f"{mamba_folder}: {lm.cfg.vocab_size} embeddings for {encoding.n_vocab} tokens")
    with torch.device("meta"):
        model = RoboMamba(config, encoding)
    model.vision, model.lm = vision, lm
    for part in (model.projector, model.head):
        init_weights(part.to_empty(device="cpu"))
    return model.eval()
