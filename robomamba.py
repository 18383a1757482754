"""RoboMamba in one file: a picture and a sentence in; words, or a contact point and a gripper direction, out.

    picture (S, S, 3) -> VisionTransformer -> Projector -> visual tokens --.
                                                                           Mamba blocks -> lm_head -> an answer in words
    sentence -> byte-pair tokens -> embedding -> text tokens --------------'       `-> PolicyHead -> pixel + 6D rotation

Run it:
    python robomamba.py --image scene.png --ask "What is this object?"
    python robomamba.py --image scene.png --act "Open the top drawer."
    python robomamba.py --image rgb.png --act "Open the drawer." --depth depth.png --intrinsics 615 615 320 240
    python robomamba.py --image scene.png --act "Open the top drawer." --look DIR   # and pictures of the state inside
    python robomamba.py --presets                                   # parameters and memory of every preset

Read `selective_scan.py` first (the recurrence and the symbol key), then this file top to bottom: config, vision, Mamba,
policy head, the whole model, main. Then `train.py`, `finetune_policy.py`, `sim_eval.py`. How files of weights are read
and written, the published ones too, is in `common/weights.py`.

Sources: RoboMamba, arXiv 2406.04339 (sections 3.1-3.3, Fig. 2); Mamba, arXiv 2312.00752 (Algorithm 2, section 3.4);
CLIP, arXiv 2103.00020.

What is simplified against the paper, in the `tiny` preset (the `robomamba-2.8b` preset has the paper's shapes):
  encoder    4 blocks of width 192 on 128 px instead of CLIP ViT-L/14 on 224 px; strided convolutions instead of one
             patch convolution (they train faster from nothing); trained here by `train.py --stage vision`, without CLIP
  language   4 Mamba blocks of width 192 instead of 64 of width 2560
  start      A and dt start at slower decay and B, C are normalised (`bc_norm`): with the standard start the last state
             of so small a model hardly depends on the picture (tests/test_model.py measures it)
  position   a fixed 2-D sine code is added to the visual tokens after the projector (the paper adds none)
  pooling    the policy head reads the last prompt state (`pool="last"`); the paper's code averages it with the first
             text state
"""

# Symbols beyond those of selective_scan.py:
#   S  side of the square picture in pixels      P  visual tokens = (S / patch)^2      V  vocabulary
#   W  width of the vision transformer           T  text tokens                        Q  questions about one picture

import argparse
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import weights as checkpoints
from common.weights import KEEP_FLOAT32, load_tensors, weight_files
from data.dataset import read_picture
from data.depth import lift, read_depth
from data.prompts import contact_question
from data.tokenizer import NUMBER_BASE, NUMBERS, load_encoding, read_tokenizer_json, write_encoding
from extras.costs import print_presets
from extras.transformer import TransformerBlock
from selective_scan import scan_step, selective_scan

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class VisionConfig:
    """The image encoder. Defaults are the `tiny` preset; CLIP's own shapes are in PRESETS["robomamba-2.8b"]."""

    image_size: int = 128  # S, pixels
    patch_size: int = 16  # pixels
    width: int = 192  # W
    n_layer: int = 4
    n_head: int = 6
    mlp_ratio: int = 4
    stem: tuple = (24, 48, 96)  # channels of 3x3 stride-2 convolutions, before the last; () = CLIP's patch convolution
    select_layer: int = -1  # whose output is put out; -1 = the last block, -2 = the one before (the paper's choice)
    output_norm: bool = True  # apply post_layernorm to the tokens (CLIP's recipe for LLaVA-like models: no)
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class LMConfig:
    """The language model. Fields named as in Mamba's own config where it has them."""

    d_model: int = 192
    n_layer: int = 4
    vocab_size: int = 1024
    d_state: int = 8  # N
    d_conv: int = 4  # K
    expand: int = 2  # E = expand * d_model
    dt_rank: int = 0  # R; 0 = ceil(d_model / 16)
    dt_min: float = 0.02  # range of the initial step size (Mamba: 0.001 .. 0.1)
    dt_max: float = 0.5
    a_min: float = 0.02  # range of the initial -A; (1, d_state) is Mamba's S4D-real start 1, 2, .., N
    a_max: float = 4.0
    bc_norm: bool = True  # normalise B and C to unit root mean square; off for published weights
    norm_eps: float = 1e-5
    mixer: str = "mamba"  # "attention": a Transformer of the same size to compare with, see extras/transformer.py

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.d_model / 16)

    @property
    def n_block(self) -> int:
        return self.n_layer if self.mixer == "mamba" else math.ceil(self.n_layer / 2)


@dataclass
class HeadConfig:
    """The policy head (paper section 3.3, appendix Table 6)."""

    # "two_mlp": pixel and rotation apart (the paper's choice); "one_mlp": one MLP with 8 outputs;
    # "ssm": two of (Mamba block, mean over the text, MLP), which read all text states, whatever `pool` says
    kind: str = "two_mlp"
    hidden: tuple = (8,)  # hidden widths; the paper's text fits (d_model / 4, d_model / 8)
    pool: str = "last"  # "last" | "first_last" (the paper's code) | "mean" of the text states


@dataclass
class RoboMambaConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    projector_hidden: tuple = (384,)
    position_code: bool = True  # fixed 2-D sine code on the visual tokens

    def __post_init__(self):
        v, lm, head = self.vision, self.lm, self.head
        if v.image_size % v.patch_size or v.width % v.n_head:
            raise ValueError(
                f"vision: patch_size {v.patch_size} must divide image_size {v.image_size}, "
                f"and n_head {v.n_head} must divide width {v.width}"
            )
        if not -v.n_layer - 1 <= v.select_layer <= v.n_layer:
            raise ValueError(f"vision.select_layer: {v.select_layer} is not a layer of {v.n_layer} blocks")
        if v.stem and 2 ** (len(v.stem) + 1) != v.patch_size:
            raise ValueError(f"vision.stem: {len(v.stem)} + 1 halvings do not make patch_size {v.patch_size}")
        if self.position_code and lm.d_model % 4:
            raise ValueError(f"lm.d_model {lm.d_model} must be a multiple of 4 for position_code")
        if lm.mixer not in ("mamba", "attention"):
            raise ValueError(f"lm.mixer: {lm.mixer!r} is unknown; there are mamba and attention")
        if head.kind not in ("two_mlp", "one_mlp", "ssm") or head.pool not in ("last", "first_last", "mean"):
            raise ValueError(f"head: kind {head.kind!r} or pool {head.pool!r} is unknown (see HeadConfig)")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict, source: str = "config") -> "RoboMambaConfig":
        return checkpoints.dataclass_from_dict(cls, values, source)


def paper_config(vision: VisionConfig, lm: LMConfig) -> RoboMambaConfig:
    """The paper's projector, policy head and pooling around an encoder and a language model of any size."""
    d = lm.d_model
    head = HeadConfig(hidden=(d // 4, d // 8), pool="first_last")
    return RoboMambaConfig(vision, lm, head, projector_hidden=(4096, d), position_code=False)


_CLIP_L = VisionConfig(224, 14, 1024, 24, 16, stem=(), select_layer=-2, output_norm=False)
_MAMBA = dict(vocab_size=50280, d_state=16, dt_min=0.001, dt_max=0.1, a_min=1.0, a_max=16.0, bc_norm=False)
_PUBLISHED = {"mamba-130m": (768, 24), "mamba-370m": (1024, 48), "mamba-790m": (1536, 48), "mamba-1.4b": (2048, 48)}
_PUBLISHED |= {"robomamba-2.8b": (2560, 64)}  # width, blocks
PRESETS = {
    "tiny": RoboMambaConfig(),
    "small": RoboMambaConfig(
        VisionConfig(width=384, n_layer=8), LMConfig(384, 8, d_state=16), HeadConfig(hidden=(24,)), (768,)
    ),
    **{name: paper_config(_CLIP_L, LMConfig(d, n, **_MAMBA)) for name, (d, n) in _PUBLISHED.items()},
}


# ---- vision ----------------------------------------------------------------------------------------------------------


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), CLIP's activation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens (no mask). Names are those of CLIP checkpoints."""

    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, P, W = x.shape
        parts = (p(x).view(B, P, self.n_head, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, heads, P, W/heads)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P, W))


class ViTBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        W = cfg.width
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(W), nn.LayerNorm(W)
        self.self_attn = Attention(W, cfg.n_head)
        self.mlp = nn.Sequential()  # named children, so that the keys are CLIP's mlp.fc1 and mlp.fc2
        self.mlp.add_module("fc1", nn.Linear(W, cfg.mlp_ratio * W))
        self.mlp.add_module("act", QuickGELU())
        self.mlp.add_module("fc2", nn.Linear(cfg.mlp_ratio * W, W))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """CLIP's image tower: class token, learned positions, pre-norm blocks; returns the patch tokens of one layer.

    Source: CLIP section 2.4; RoboMamba section 3.1 takes the second-to-last layer of ViT-L and drops the class token.
    Differs: `stem` replaces the single patch convolution by strided 3x3 ones (see the file's docstring); () is CLIP's.
    """

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg, W = cfg, cfg.width
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(W))
        self.embeddings.patch_embedding = self._patch_embedding(cfg)
        self.embeddings.position_embedding = nn.Embedding((cfg.image_size // cfg.patch_size) ** 2 + 1, W)
        self.pre_layrnorm = nn.LayerNorm(W)  # spelt as in the published checkpoints
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.n_layer))
        self.post_layernorm = nn.LayerNorm(W)

    @classmethod
    def from_pretrained(cls, folder, select_layer: int = -2, dtype=torch.float32) -> "VisionTransformer":
        """Read a CLIP folder (whole CLIP, or the image tower); select_layer -2 is the paper's choice."""
        cfg = VisionConfig(**checkpoints.clip_config(folder), select_layer=select_layer)
        RoboMambaConfig(cfg)  # checks the shapes
        with torch.device("meta"):
            vision = cls(cfg)
        load_tensors(vision, weight_files(folder), checkpoints.clip_name, dtype=dtype)
        return vision.eval()

    def save_pretrained(self, folder) -> None:
        """Write an image-tower folder that `transformers` reads."""
        checkpoints.save_clip(self, folder)

    @staticmethod
    def _patch_embedding(cfg: VisionConfig) -> nn.Module:
        if not cfg.stem:
            return nn.Conv2d(3, cfg.width, cfg.patch_size, stride=cfg.patch_size, bias=False)
        layers, channels = [], (3, *cfg.stem)
        for c_in, c_out in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GELU()]
        return nn.Sequential(*layers, nn.Conv2d(channels[-1], cfg.width, 3, stride=2, padding=1))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> float, CLIP's mean and deviation."""
        S = self.cfg.image_size
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, S, S):
            raise ValueError(f"images: expected uint8 (B, 3, {S}, {S}), got {images.dtype} {tuple(images.shape)}")
        dtype = self.pre_layrnorm.weight.dtype
        mean, std = (
            torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (self.cfg.image_mean, self.cfg.image_std)
        )
        return ((images.float() / 255 - mean) / std).to(dtype)

    def forward_all(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, 1 + P, W): class token first, then the patches row by row, at `select_layer`."""
        x = self.embeddings.patch_embedding(self.normalise(images)).flatten(2).transpose(1, 2)  # (B, P, W)
        x = torch.cat([self.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.pre_layrnorm(x + self.embeddings.position_embedding.weight)
        n = self.cfg.select_layer % (self.cfg.n_layer + 1)  # blocks to run
        for block in self.encoder.layers[:n]:
            x = block(x)
        return self.post_layernorm(x) if self.cfg.output_norm else x

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, P, W) patch tokens, class token dropped."""
        return self.forward_all(images)[:, 1:]


def projector(widths: tuple) -> nn.Sequential:
    """Linear, GELU, Linear, .. over `widths` (paper section 3.1: the MLP between encoder and language model)."""
    layers = []
    for w_in, w_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(w_in, w_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def position_code(side: int, d_model: int) -> Tensor:
    """Fixed 2-D sine code (side * side, d_model), amplitude 0.5; half the channels tell the row, half the column."""
    w = math.pi * torch.linspace(0.5, side, d_model // 4)
    angle = (torch.arange(side)[:, None] + 0.5) / side * w  # (side, d_model / 4)
    code = torch.cat([angle.sin(), angle.cos()], 1)  # (side, d_model / 2)
    rows, columns = code[:, None].expand(side, side, -1), code[None].expand(side, side, -1)
    return 0.5 * torch.cat([rows, columns], 2).reshape(side * side, d_model)


# ---- mamba -----------------------------------------------------------------------------------------------------------


class LayerState(NamedTuple):
    """All that one Mamba block remembers of the past; its size does not depend on how long the past was."""

    conv: Tensor  # (B, K-1, E) the last inputs of the causal convolution
    ssm: Tensor  # (B, E, N) float32, the state h


class MambaMixer(nn.Module):
    """The selective state-space mixer (Mamba paper, Fig. 3 and Algorithm 2; RoboMamba Fig. 2, right).

    Differs: `bc_norm` divides B and C by their root mean square before the scan. A_log, D, dt and the scan are float32
    always, after `.to(torch.bfloat16)` too: a rounded decay is applied anew with every token.
    """

    def __init__(self, cfg: LMConfig):
        super().__init__()
        D, E, N, R, K = cfg.d_model, cfg.d_inner, cfg.d_state, cfg.rank, cfg.d_conv
        self.cfg = cfg
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.conv1d = nn.Conv1d(E, E, K, groups=E, padding=K - 1)  # holds the published names; applied by `conv` below
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E)
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, D, bias=False)

    def _apply(self, fn, recurse=True):
        """What `.to`, `.half`, `.cuda` .. call. KEEP_FLOAT32 parameters follow to the device, not to 16 bits."""
        before = {name: p.data for name, p in self.named_parameters() if f".{name}".endswith(KEEP_FLOAT32)}
        super()._apply(fn, recurse)
        for name, old in before.items():
            p = self.get_parameter(name)
            if p.dtype in (torch.bfloat16, torch.float16):
                p.data = old.to(p.device)
        return self

    def initial_state(self, batch: int) -> LayerState:
        cfg, w = self.cfg, self.in_proj.weight
        conv = w.new_zeros(batch, cfg.d_conv - 1, cfg.d_inner)
        return LayerState(conv, torch.zeros(batch, cfg.d_inner, cfg.d_state, device=w.device))

    def conv(self, x: Tensor) -> Tensor:
        """Causal depthwise convolution of (B, L + K - 1, E), the past in front, to (B, L, E), as K shifted products."""
        K = self.cfg.d_conv
        L, w = x.shape[1] - K + 1, self.conv1d.weight[:, 0]  # (E, K)
        y = torch.addcmul(self.conv1d.bias, x[:, :L], w[:, 0])
        for k in range(1, K):
            y = torch.addcmul(y, x[:, k : k + L], w[:, k])
        return y

    def selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u (.., E) -> dt (.., E), A (E, N), B (.., N), C (.., N): what the input selects (Algorithm 2, lines 2-4)."""
        # exercise 5: the Mamba block, what a token selects
        cfg = self.cfg
        dt, B, C = self.x_proj(u).split([cfg.rank, cfg.d_state, cfg.d_state], -1)
        dt = F.softplus(F.linear(dt, self.dt_proj.weight).float() + self.dt_proj.bias.float())
        if cfg.bc_norm:
            B, C = (F.rms_norm(x.float(), (cfg.d_state,), eps=cfg.norm_eps) for x in (B, C))
        return dt, -torch.exp(self.A_log.float()), B, C
        # end of exercise 5

    def forward(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """(B, L, D) and the state before it -> (B, L, D) and the state after it."""
        # exercise 5: the Mamba block
        state = state or self.initial_state(len(x))
        u, z = self.in_proj(x).chunk(2, -1)  # (B, L, E) each: the convolution's branch and the gate's
        u = torch.cat([state.conv.to(u.dtype), u], 1)  # (B, K-1 + L, E)
        tail = u[:, u.shape[1] - (self.cfg.d_conv - 1) :]
        u = F.silu(self.conv(u))
        dt, A, B, C = self.selection(u)
        y, ssm = selective_scan(u, dt, A, B, C, self.D, state.ssm)
        return self.out_proj(y.to(z.dtype) * F.silu(z)), LayerState(tail, ssm)
        # end of exercise 5

    def step(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """One token: (B, D) and the state before it -> (B, D) and the state after it; equals `forward` on L = 1."""
        u, z = self.in_proj(x).chunk(2, -1)  # (B, E)
        window = torch.cat([state.conv.to(u.dtype), u[:, None]], 1)  # (B, K, E)
        u = F.silu(self.conv(window)[:, 0])
        dt, A, B, C = self.selection(u)
        y, ssm = scan_step(u, dt, A, B, C, self.D, state.ssm)
        return self.out_proj(y.to(z.dtype) * F.silu(z)), LayerState(window[:, 1:], ssm)


class MambaBlock(nn.Module):
    """x + mixer(norm x). With 16-bit weights the sum x stays float32, as in the published models."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.norm = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        self.mixer = MambaMixer(cfg)

    def forward(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        y, state = self.mixer(self.norm(x.to(self.norm.weight.dtype)), state)
        return x + y, state

    def step(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        y, state = self.mixer.step(self.norm(x.to(self.norm.weight.dtype)), state)
        return x + y, state


class MambaBackbone(nn.Module):
    """Embedding, blocks, final norm. Works on embeddings, so that visual tokens can take the place of words."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        block = MambaBlock if cfg.mixer == "mamba" else TransformerBlock
        self.layers = nn.ModuleList(block(cfg) for _ in range(cfg.n_block))
        self.norm_f = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)

    def forward(self, x: Tensor, states: list[LayerState] | None = None) -> tuple[Tensor, list[LayerState]]:
        """Embeddings (B, L, D) after `states` (one a block or None) -> final-norm states (B, L, D), new `states`."""
        states = states or [None] * len(self.layers)
        x, after = x.to(torch.promote_types(x.dtype, torch.float32)), []
        for block, state in zip(self.layers, states, strict=True):
            x, state = block(x, state)
            after.append(state)
        return self.norm_f(x.to(self.norm_f.weight.dtype)), after

    def step(self, x: Tensor, states: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
        """One embedding (B, D) -> (B, D); memory stays constant however long the sequence gets."""
        x, after = x.to(torch.promote_types(x.dtype, torch.float32)), []
        for block, state in zip(self.layers, states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return self.norm_f(x.to(self.norm_f.weight.dtype)), after


class MambaLM(nn.Module):
    """The Mamba language model with tied output embedding; parameter names are those of the published checkpoints."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.cfg = cfg
        self.backbone = MambaBackbone(cfg)
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        self.lm_head.weight = self.backbone.embedding.weight

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32) -> "MambaLM":
        """Read a published Mamba folder: original or -hf naming, .bin or safetensors, in parts or not."""
        values = checkpoints.mamba_config(folder)
        with torch.device("meta"):
            lm = cls(LMConfig(**_MAMBA | {"a_max": float(values["d_state"])} | values))
        load_tensors(lm, weight_files(folder), checkpoints.mamba_name, checkpoints.TIED, dtype)
        lm.tie()
        return lm.eval()

    def save_pretrained(self, folder, naming: str = "hf") -> None:
        """Write a folder that `transformers` (naming "hf") or mamba_ssm ("original") reads."""
        checkpoints.save_mamba(self, folder, naming)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> logits (B, L, V)."""
        return self.lm_head(self.backbone(self.backbone.embedding(tokens))[0])


# ---- policy head -----------------------------------------------------------------------------------------------------


class Action(NamedTuple):
    """Where and how to take hold of the part. Camera frame: x right, y down, z forward."""

    u: float  # column of the contact pixel, 0 .. S
    v: float  # row
    rotation: np.ndarray  # (3, 3), columns = gripper forward, left, approach

    @property
    def approach(self) -> np.ndarray:
        """(3,) unit vector along which the gripper travels to the contact; a pull goes back along it."""
        return self.rotation[:, 2]


class PolicyHead(nn.Module):
    """Pooled state (B, D) -> pixel (B, 2) in -1 .. 1 (left/top .. right/bottom) and 6D rotation (B, 6).

    With kind "ssm" it reads the text states (B, T, D) instead, zero where there is padding, and averages its own.
    Source: RoboMamba section 3.3 and Table 6 ("MLP x2", "MLP x1", "(SSM block + MLP) x2"). ReLU between layers, no last
    bias, as in its code. Differs: its SSM blocks have expand 2, which here is 1: one of its 64 blocks is 1.5 % of its
    model, but one of the 4 of `tiny` is 7 %.
    """

    def __init__(self, cfg: HeadConfig, d_model: int):
        super().__init__()
        self.outputs = (8,) if cfg.kind == "one_mlp" else (2, 6)
        if cfg.kind == "ssm":
            self.blocks = nn.ModuleList(MambaBlock(LMConfig(d_model=d_model, expand=1)) for _ in self.outputs)
        self.mlps = nn.ModuleList(self._mlp((d_model, *cfg.hidden, n)) for n in self.outputs)

    @staticmethod
    def _mlp(widths: tuple) -> nn.Sequential:
        layers = []
        for w_in, w_out in zip(widths[:-1], widths[1:-1], strict=False):
            layers += [nn.Linear(w_in, w_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        states = states.to(self.mlps[0][-1].weight.dtype)  # the language model's may be bfloat16
        read = [states] * len(self.mlps)
        if states.ndim == 3:
            inside = (states != 0).any(-1, keepdim=True)  # a normed state is never all zeros
            sums = ((block(states)[0] * inside).sum(1) for block in self.blocks)
            read = [(x / inside.sum(1)).to(states.dtype) for x in sums]
        return torch.cat([mlp(x) for mlp, x in zip(self.mlps, read, strict=True)], -1).split([2, 6], -1)


def rotation_from_6d(r6: Tensor) -> Tensor:
    """(.., 6) = approach, forward (any length, not yet orthogonal) -> (.., 3, 3), columns [forward, left, approach].

    Source: Zhou et al. 2019 (arXiv 1812.07035), Gram-Schmidt; RoboMamba predicts gripper up (= approach), then forward.
    """
    # exercise 7: 6D rotation
    approach = F.normalize(r6[..., :3], dim=-1, eps=1e-6)
    forward = r6[..., 3:] - (approach * r6[..., 3:]).sum(-1, keepdim=True) * approach
    forward = F.normalize(forward, dim=-1, eps=1e-6)
    return torch.stack([forward, torch.linalg.cross(approach, forward, dim=-1), approach], -1)
    # end of exercise 7


# ---- whole model -----------------------------------------------------------------------------------------------------


class RoboMamba(nn.Module):
    """The whole model. `vision`, `projector`, `lm`, `head` are the four parts the training stages freeze and train.

    Args: config; `encoding`, the tokenizer (a tiktoken.Encoding), needed by everything that takes or returns words.
    """

    def __init__(self, config: RoboMambaConfig, encoding=None):
        super().__init__()
        self.config, self.encoding = config, encoding
        self.vision = VisionTransformer(config.vision)
        self.projector = projector((config.vision.width, *config.projector_hidden, config.lm.d_model))
        self.lm = MambaLM(config.lm)
        self.head = PolicyHead(config.head, config.lm.d_model)
        init_weights(self)

    # -- tokens

    def prompt(self, question: str) -> list[int]:
        """`<|user|> question <|assistant|>` as token ids. The last one's state is what the policy head reads."""
        if not question or not question.strip():
            raise ValueError("the question or instruction is empty; say what the robot should do or tell")
        special = {name: self.encoding.encode_single_token(name) for name in ("<|user|>", "<|assistant|>")}
        return [special["<|user|>"], *self.encoding.encode_ordinary(question.strip()), special["<|assistant|>"]]

    # -- forward

    def look(self, images: Tensor, states: list[LayerState] | None = None) -> list[LayerState]:
        """uint8 (B, 3, S, S), or cached visual tokens (B, P, W) -> the state of every Mamba block after the picture.

        The state is all that the model remembers of a picture, so several questions can branch from one reading. It may
        go on from `states`: what was seen and said before.
        """
        tokens = self.vision(images) if images.ndim == 4 else images
        x = self.projector(tokens.to(self.projector[0].weight.dtype))  # (B, P, D)
        if self.config.position_code:
            side = self.config.vision.image_size // self.config.vision.patch_size
            x = x + position_code(side, x.shape[-1]).to(x)
        return self.lm.backbone(x, states)[1]

    def hidden(self, images: Tensor | None, tokens: Tensor, owner: Tensor | None = None) -> Tensor:
        """Final-norm states (B * Q, T, D) of the text tokens (B * Q, T), each row after the picture it speaks of."""
        return self.read(images, tokens, owner)[0]

    def read(self, images: Tensor | None, tokens: Tensor, owner: Tensor | None = None, states=None) -> tuple:
        """The same, and the state of every block at the end, from which a later picture or text can go on.

        Every picture is read once. Row r belongs to picture owner[r]; by default rows b * Q .. b * Q + Q - 1 belong to
        picture b. `images` (B, ..) and `states` as in `look`; images None = no picture.
        """
        if images is not None:
            if owner is None:
                if len(tokens) % len(images):
                    raise ValueError(f"{len(tokens)} rows of tokens are not a multiple of {len(images)} pictures")
                owner = torch.arange(len(tokens), device=tokens.device) // (len(tokens) // len(images))
            states = [state._make(s[owner] for s in state) for state in self.look(images, states)]
        return self.lm.backbone(self.lm.backbone.embedding(tokens), states)

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor,
        lengths: Tensor,
        labels: Tensor | None = None,
        *,
        owners: Tensor | None = None,
        soft: Tensor | None = None,
        normalizer: float | None = None,
        return_states: bool = False,
    ) -> tuple:
        """Next-token logits and, with labels, the loss (paper section 3.2: cross-entropy on the answer only).

        Args:
            images: uint8 (B, 3, S, S), or visual tokens (B, P, W), or None for text alone.
            tokens: (n, T) int64, right-padded. lengths: (n,) true lengths; what lies beyond is never a target.
            labels: (n, T) int64, the token itself where it is to be predicted, -100 elsewhere; not shifted.
            owners: (n,) int64, the picture a row speaks of; None: each picture has n / B rows in order.
            soft: (100, 100), row k = target distribution over the number tokens where the label is the number k.
            normalizer: what the sum over answer tokens is divided by; None: their number.
        Returns: logits (n, T, V), loss () or None. With return_states also the text states (n, T, D); the logits are
            then None where a loss is asked for: training needs them at the labelled positions only.
        """
        states = self.hidden(images, tokens, owners)
        if labels is None:
            logits = self.lm.lm_head(states)
            return (logits, None, states) if return_states else (logits, None)
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        target = labels.masked_fill(~inside, -100)[:, 1:]
        rows, columns = (target != -100).nonzero(as_tuple=True)
        target = target[rows, columns]
        log_p = F.log_softmax(self.lm.lm_head(states[rows, columns]).float(), -1)  # (answer tokens, V)
        losses = -log_p.gather(1, target[:, None])[:, 0]
        if soft is not None:
            number = target - NUMBER_BASE
            is_number = (number >= 0) & (number < NUMBERS)
            wanted = soft[number.clamp(0, NUMBERS - 1)]
            softened = -(wanted * log_p[:, NUMBER_BASE : NUMBER_BASE + NUMBERS]).sum(1)
            losses = torch.where(is_number, softened, losses)
        loss = losses.sum() / (len(target) if normalizer is None else normalizer)
        return (None, loss, states) if return_states else (self.lm.lm_head(states), loss)

    def pooled(self, images: Tensor | None, tokens: Tensor, lengths: Tensor, owner: Tensor | None = None) -> Tensor:
        """(B * Q, D): what the policy head reads; for the head "ssm" all states (B * Q, T, D), zeros for padding."""
        return self.pool(self.hidden(images, tokens, owner), lengths)

    def pool(self, h: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) -> what `pooled` says. The last TRUE token is indexed; `[:, -1]` would be padding."""
        inside = (torch.arange(h.shape[1], device=h.device) < lengths[:, None]).unsqueeze(-1)
        if self.config.head.kind == "ssm":
            return h * inside
        last = h[torch.arange(len(h), device=h.device), lengths - 1]
        if self.config.head.pool == "last":
            return last
        if self.config.head.pool == "first_last":
            return (h[:, 0] + last) / 2
        return (h * inside).sum(1) / lengths[:, None]

    # -- use

    def _picture(self, image) -> Tensor:
        """Path, PIL image or uint8 (S, S, 3) -> uint8 (1, 3, S, S); files and PIL images are resized, arrays not."""
        S = self.config.vision.image_size
        if isinstance(image, str | os.PathLike):
            image = read_picture(image, S)
        elif isinstance(image, Image.Image):
            image = image.convert("RGB").resize((S, S), Image.Resampling.BILINEAR)
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.shape != (S, S, 3):
            raise ValueError(f"image: expected uint8 ({S}, {S}, 3), got {image.dtype} {image.shape}; or pass a file")
        return torch.from_numpy(image.transpose(2, 0, 1).copy())[None].to(self.lm.lm_head.weight.device)

    def generate(
        self, image, question, max_new_tokens: int = 64, temperature=0.0, top_k=0, top_p=1.0, seed=0
    ) -> str | list[str]:
        """Answer in words, one recurrent `step` a token: memory and time per token do not grow with the answer.

        Args: image as in `predict_action`, or None, or with a list of questions a list as long (a picture that occurs
        several times is read once); question, str or list of str; temperature 0 = greedy, else sampling from the top_k
        / top_p tokens with `seed` (an int, or one a question).
        Returns: the answer, or for a list the answers, each what the question alone would get.
        """
        if isinstance(question, str):
            return self.generate(image, [question], max_new_tokens, temperature, top_k, top_p, seed)[0]
        answers = self.generate_ids(image, question, max_new_tokens, temperature, top_k, top_p, seed)
        return [self.text(ids) for ids in answers]

    def text(self, ids: list[int]) -> str:
        """Token ids of an answer as words; ids beyond the vocabulary (padded embeddings) say nothing."""
        return self.encoding.decode([t for t in ids if t < self.encoding.n_vocab]).strip()

    @torch.inference_mode()
    def generate_ids(
        self, image, questions: list[str], max_new_tokens: int = 64, temperature=0.0, top_k=0, top_p=1.0, seed=0
    ) -> list[list[int]]:
        """`generate` for a list of questions, as token ids without the end token.

        Prompts differ in length, but nothing is padded: all rows read as many tokens as the shortest prompt has in one
        pass; from there a row is fed the rest of its prompt, one token a step, or what it said last. So a short
        question already answers while a long one is still being read, every state is that of a true last token, and
        one question alone is read in one pass. A row that has ended leaves the batch.
        """
        prompts, answers = [self.prompt(question) for question in questions], [[] for _ in questions]
        if not prompts:
            return []
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"seed: {len(seeds)} seeds for {len(prompts)} questions; give one, or one each")
        rngs = [torch.Generator().manual_seed(s) for s in seeds]
        backbone, device = self.lm.backbone, self.lm.lm_head.weight.device
        end, t = self.encoding.encode_single_token("<|endoftext|>"), min(map(len, prompts))
        read = torch.tensor([prompt[:t] for prompt in prompts], device=device)
        h, states = backbone(backbone.embedding(read), self._looked(image, len(prompts)))
        h, rows = h[:, -1], list(range(len(prompts)))  # the questions still in the batch
        while True:
            logits = self.lm.lm_head(h)
            greedy = logits.argmax(-1).tolist() if temperature <= 0 else None
            kept, fed = [], []
            for i, row in enumerate(rows):
                if t < len(prompts[row]):
                    token = prompts[row][t]
                elif len(answers[row]) == max_new_tokens:
                    continue
                else:
                    token = greedy[i] if greedy else sample(logits[i], temperature, top_k, top_p, rngs[row])
                    if token == end:
                        continue
                    answers[row].append(token)
                kept.append(i)
                fed.append(token)
            if not kept:
                return answers
            if len(kept) < len(rows):
                states = [state._make(s[kept] for s in state) for state in states]
                rows = [rows[i] for i in kept]
            h, states = backbone.step(backbone.embedding(torch.tensor(fed, device=device)), states)
            t += 1

    def _looked(self, image, n: int) -> list[LayerState] | None:
        """The states before `n` questions: after one picture for all, or a list of one each; None without a picture."""
        if image is None:
            return None
        images = list(image) if isinstance(image, list | tuple) else [image] * n
        if len(images) != n:
            raise ValueError(f"image: {len(images)} pictures for {n} questions; give one, or one each")
        keys = [str(x) if isinstance(x, str | os.PathLike) else id(x) for x in images]
        different = dict(zip(keys, images, strict=True))
        place = {key: i for i, key in enumerate(different)}
        states = self.look(torch.cat([self._picture(x) for x in different.values()]))
        return [state._make(s[[place[key] for key in keys]] for s in state) for state in states]

    @torch.inference_mode()
    def predict_action(self, image, instruction: str, memory: list | None = None) -> Action:
        """One forward pass, nothing decoded: picture (path, PIL image, uint8 (S, S, 3)) and sentence -> Action.

        Args: memory, a list, empty at first: goes on from the state in it and leaves the state after this prediction.
        """
        S, device = self.config.vision.image_size, self.lm.lm_head.weight.device
        tokens = torch.tensor([self.prompt(contact_question(instruction))], device=device)
        lengths = torch.tensor([tokens.shape[1]], device=device)
        h, states = self.read(self._picture(image), tokens, states=memory)
        if memory is not None:
            memory[:] = states
        pixel, r6 = self.head(self.pool(h, lengths))
        u, v = ((pixel[0].float() + 1) * S / 2).clamp(0, S - 1e-3).tolist()
        return Action(u, v, rotation_from_6d(r6[0].float()).cpu().numpy())

    # -- checkpoints

    def save_pretrained(self, path, half: bool = False) -> None:
        """Write `path`/{model.safetensors, config.json, vocab.tiktoken}; each file appears whole or not at all.

        Args: half, weight matrices in float16 (A_log, D, dt bias, norms stay); loading gives float32 again.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        weights = {k: p.detach().cpu().contiguous() for k, p in self.named_parameters()}  # the tied head once
        if half:
            weights = {k: w.half() if w.ndim >= 2 and not k.endswith("A_log") else w for k, w in weights.items()}
        write_encoding(path / "vocab.tiktoken", self.encoding)
        checkpoints.write_json(path / "config.json", self.config.to_dict())
        checkpoints.save_tensors(path / "model.safetensors", weights)

    @classmethod
    def from_pretrained(cls, path, device: str = "cpu", dtype=torch.float32) -> "RoboMamba":
        """Read a folder written by `save_pretrained`. ValueError names the file and every tensor that does not fit."""
        path = Path(path)
        for name in ("config.json", "vocab.tiktoken", "model.safetensors"):
            if not (path / name).is_file():
                raise ValueError(f"{path / name}: no such file; save_pretrained writes one")
        config = RoboMambaConfig.from_dict(checkpoints.read_json(path / "config.json"), str(path / "config.json"))
        with torch.device("meta"):
            model = cls(config, load_encoding(path / "vocab.tiktoken"))
        load_tensors(model, [path / "model.safetensors"], dtype=dtype)
        model.lm.tie()
        return model.to(device).eval()

    @classmethod
    def from_parts(cls, vision_folder, mamba_folder, preset="robomamba-2.8b", tokenizer=None, dtype=torch.float32):
        """A model ready for stage 1.1: published CLIP encoder and Mamba language model, new projector and policy head.

        Args: preset, whose projector, head, pooling and position code (the published ones' widths follow the language
        model's). tokenizer, a tokenizer.json; default: the one in mamba_folder (the original folders have none).
        dtype of the published parts (bfloat16 halves the memory); what is new, and to be trained, is float32.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
        encoding = read_tokenizer_json(tokenizer or Path(mamba_folder) / "tokenizer.json")
        vision = VisionTransformer.from_pretrained(vision_folder, dtype=dtype)
        lm = MambaLM.from_pretrained(mamba_folder, dtype)
        if encoding.n_vocab > lm.cfg.vocab_size:
            raise ValueError(f"{mamba_folder}: {lm.cfg.vocab_size} embeddings for {encoding.n_vocab} tokens")
        config = paper_config(vision.cfg, lm.cfg)
        if preset not in _PUBLISHED:
            config = replace(PRESETS[preset], vision=vision.cfg, lm=lm.cfg)
        with torch.device("meta"):
            model = cls(config, encoding)
        model.vision, model.lm = vision, lm
        for part in (model.projector, model.head):
            init_weights(part.to_empty(device="cpu"))
        return model.eval()


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, rng: torch.Generator) -> int:
    """One token id from logits (V,)."""
    if temperature <= 0:
        return int(logits.argmax())
    p = torch.softmax(logits.float().cpu() / temperature, -1)
    p, order = p.sort(descending=True)
    keep = p.cumsum(0) - p < top_p  # the token that crosses top_p is kept, so at least one is
    if top_k:
        keep[top_k:] = False
    return int(order[torch.multinomial(p * keep, 1, generator=rng)])


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Every initial value, in one place; called once, last.

    | parameter | value | why |
    |---|---|---|
    | linear, conv1d weights | normal, sd min(0.02 sqrt(768 / fan_in), fan_in^-1/2) | unit activations at any width |
    | conv2d weights | normal, sd sqrt(2 / fan_in) (He et al.) | the stem's GELUs would shrink the picture to nothing |
    | mixer.out_proj, mlp.2 | the same / sqrt(n_layer) | the residual stream does not grow with depth (Mamba's code) |
    | embeddings, class token, positions | normal, sd 0.02 | tied with the output: larger logits start too sure |
    | A_log | log of N values from a_min to a_max, evenly in log (Mamba: 1, 2, .., N) | slow to fast memories |
    | dt_proj.weight | uniform +- R^-1/2 | keeps the variance of dt (Mamba's code) |
    | dt_proj.bias | inverse softplus of exp(U(log dt_min, log dt_max)) | softplus(bias) is the initial step size |
    | D | 1 | a plain skip |
    | biases | 0 | |
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            fan_in = module.weight[0].numel()
            small = min(0.02 * math.sqrt(768 / fan_in), fan_in**-0.5)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in) if isinstance(module, nn.Conv2d) else small)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, VisionTransformer):
            nn.init.normal_(module.embeddings.class_embedding, std=0.02)
        if isinstance(module, MambaLM):
            nn.init.normal_(module.backbone.embedding.weight, std=0.02)  # the tied lm_head was drawn above
            for block in module.backbone.layers:
                for last in (block.mixer.out_proj, *([block.mlp[2]] if module.cfg.mixer == "attention" else [])):
                    last.weight /= math.sqrt(module.cfg.n_layer)
        if isinstance(module, MambaMixer):
            cfg = module.cfg
            if (cfg.a_min, cfg.a_max) == (1.0, float(cfg.d_state)):
                a = torch.arange(1.0, cfg.d_state + 1)
            else:
                a = torch.logspace(math.log10(cfg.a_min), math.log10(cfg.a_max), cfg.d_state)
            module.A_log.copy_(a.log().expand_as(module.A_log))
            module.D.fill_(1.0)
            nn.init.uniform_(module.dt_proj.weight, -(cfg.rank**-0.5), cfg.rank**-0.5)
            dt = torch.exp(torch.empty_like(module.dt_proj.bias).uniform_(math.log(cfg.dt_min), math.log(cfg.dt_max)))
            module.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


# ---- main ------------------------------------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask RoboMamba about a picture, or where to take hold.")
    shipped = Path(__file__).parent / "data/pretrained/robomamba-tiny"
    parser.add_argument("--checkpoint", default=shipped, help="folder written by save_pretrained")
    parser.add_argument("--image", help="picture file")
    parser.add_argument("--ask", help="a question; the answer is printed")
    parser.add_argument("--act", help="an instruction; contact pixel and gripper rotation are printed")
    parser.add_argument("--depth", help="with --act: depth of the picture, .npy in metres or 16-bit PNG in millimetres")
    parser.add_argument("--intrinsics", nargs=4, type=float, metavar="F", help="fx fy cx cy in pixels of --depth")
    parser.add_argument("--look", metavar="DIR", help="write pictures of the recurrent state into DIR (extras/look.py)")
    parser.add_argument("--presets", action="store_true", help="print parameters and memory of every preset")
    args = parser.parse_args()
    if args.presets:
        return print_presets(PRESETS, RoboMamba)
    if not args.image or (args.ask is None) == (args.act is None):
        parser.error("give --image and one of --ask and --act (or --presets)")
    if (args.depth is None) != (args.intrinsics is None) or (args.depth and args.act is None):
        parser.error("--depth and --intrinsics go together, and with --act")
    try:
        model = RoboMamba.from_pretrained(args.checkpoint)
        if args.ask is not None:
            start = time.perf_counter()
            (answer,) = model.generate_ids(args.image, [args.ask])
            seconds = time.perf_counter() - start
            print(model.text(answer))
            speed = f"{len(answer)} tokens, {len(answer) / seconds:.0f} tokens/s"
            print(f"{speed} in {seconds:.2f} s, reading picture and question included", file=sys.stderr)
        else:
            depth = read_depth(args.depth) if args.depth else None
            action, side = model.predict_action(args.image, args.act), model.config.vision.image_size
            print(f"pixel u {action.u:.1f} v {action.v:.1f} (of {side})")
            if depth is not None:
                x, y, z = lift(action.u, action.v, side, depth, args.intrinsics)
                print(f"point x {x:.4f} y {y:.4f} z {z:.4f} m, camera frame x right, y down, z forward")
            print("rotation, columns forward, left, approach, camera frame x right, y down, z forward:")
            print(np.array2string(action.rotation, precision=3, suppress_small=True))
        if args.look:
            from extras.look import draw  # here: nothing else needs what it draws with

            question = args.ask if args.act is None else contact_question(args.act)
            print("Written:", *draw(model, args.image, question, args.look))
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
