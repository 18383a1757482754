"""RoboMamba in one file: an image and a sentence in; words, or a contact point and a gripper direction, out.

    image (S, S, 3) -> VisionTransformer -> Projector -> visual tokens --.
                                                                         Mamba blocks -> lm_head -> an answer in words
    sentence -> byte-pair tokens -> embedding -> text tokens ------------'       `-> PolicyHead -> pixel + 6D rotation

    python robomamba.py --image scene.png --ask "What is this object?"
    python robomamba.py --image scene.png --act "Open the top drawer."
    python robomamba.py --image rgb.png --act "Open the drawer." --depth depth.png --intrinsics 615 615 320 240

Read `selective_scan.py` first (the recurrence and the symbol key), then `common/config.py` (the shapes), then this file
top to bottom. Checkpoints: `common/weights.py`; published weights: `extras/published.py`; tokens: `data/tokenizer.py`.
Sources: RoboMamba, arXiv 2406.04339 (sections 3.1-3.3, Fig. 2); Mamba, arXiv 2312.00752; CLIP, arXiv 2103.00020.

How the `tiny` preset differs from the paper (the `robomamba-2.8b` preset has the paper's shapes):
  encoder    4 blocks of width 192 at 128 px instead of CLIP ViT-L/14 at 224 px; strided convolutions instead of one
             patch convolution (they train faster from scratch); trained by `train.py --stage vision`, without CLIP
  language   4 Mamba blocks of width 192 instead of 64 of width 2560
  start      slower decay exp(dt A); B, C normalised (`bc_norm`); without these, the last state barely sees the image
  position   a fixed 2-D sine code is added to the visual tokens (the paper adds none)
  pooling    the policy head reads the last text state (`pool`); the paper's code averages it with the first
"""

# Symbols beyond those of selective_scan.py:
#   S  side of the square image in pixels        P  visual tokens = (S / patch)^2      V  vocabulary
#   W  width of the vision transformer           T  text tokens                        n  rows of text

import argparse
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common.config import HeadConfig, LMConfig, RoboMambaConfig, VisionConfig
from common.files import read_json, write_json
from common.pointing import FineMap, PointingHead, peak
from common.scripts import run_main
from common.weights import KEEP_FLOAT32, load_tensors, save_folder, save_tensors
from data import depth as depth_camera
from data import tokenizer
from data.dataset import IGNORE, read_picture, upright_rgb
from data.prompts import contact_question
from selective_scan import _step, selective_scan

# ---- vision ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention over all tokens (no mask). Parameter names match CLIP checkpoints."""

    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, P, W = x.shape
        parts = (project(x).view(B, P, self.n_head, -1) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, heads, P, W / heads)
        y = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(W / heads)) v
        return self.out_proj(y.transpose(1, 2).reshape(B, P, W))


class ViTBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.width)
        self.layer_norm2 = nn.LayerNorm(cfg.width)
        self.self_attn = Attention(cfg.width, cfg.n_head)
        self.mlp = nn.Module()  # only a namespace, so that the keys match CLIP's: mlp.fc1.. and mlp.fc2..
        self.mlp.fc1 = nn.Linear(cfg.width, cfg.mlp_ratio * cfg.width)
        self.mlp.fc2 = nn.Linear(cfg.mlp_ratio * cfg.width, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        hidden = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))  # CLIP's activation, "QuickGELU"


def patch_embedding(cfg: VisionConfig) -> nn.Module:
    """CLIP's single patch convolution, or a `stem` of strided 3x3 ones; pixels -> (B, W, S / patch, S / patch)."""
    channels = 7 if cfg.depth else 3
    if not cfg.stem:
        return nn.Conv2d(channels, cfg.width, cfg.patch_size, stride=cfg.patch_size, bias=False)
    layers = []
    for c_in, c_out in zip((channels, *cfg.stem), (*cfg.stem, cfg.width), strict=True):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GELU()]
    return nn.Sequential(*layers[:-1])  # no GELU after the last convolution


class VisionTransformer(nn.Module):
    """CLIP's image tower: class token, learned positions, pre-norm blocks; returns the patch tokens of one layer.

    Source: CLIP section 2.4; RoboMamba section 3.1 takes the second-to-last layer of ViT-L and drops the class token.
    Differs: `stem`, see `patch_embedding`; `depth` adds four input channels, `fine` a map of higher resolution."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.embeddings = nn.Module()  # a namespace
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(cfg.width))
        self.embeddings.patch_embedding = patch_embedding(cfg)
        self.embeddings.position_embedding = nn.Embedding((cfg.image_size // cfg.patch_size) ** 2 + 1, cfg.width)
        self.pre_layrnorm = nn.LayerNorm(cfg.width)  # spelt as in the published checkpoints
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.n_layer))
        self.used = cfg.select_layer % (cfg.n_layer + 1)  # number of blocks that run: -1 is all, -2 all but the last
        self.post_layernorm = nn.LayerNorm(cfg.width)
        self.fine = FineMap(cfg) if cfg.fine else None

    @classmethod
    def from_pretrained(cls, folder, select_layer: int = -2, dtype=torch.float32) -> "VisionTransformer":
        """Load a CLIP folder; see `read_clip` in extras/published.py."""
        from extras.published import read_clip

        return read_clip(folder, select_layer, dtype)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) -> float, normalised with CLIP's mean and standard deviation."""
        S = self.cfg.image_size
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, S, S):
            raise ValueError(f"images: expected uint8 (B, 3, {S}, {S}), got {images.dtype} {tuple(images.shape)}")
        mean, std = images.new_tensor([self.cfg.image_mean, self.cfg.image_std], dtype=torch.float32).view(2, 3, 1, 1)
        return ((images.float() / 255 - mean) / std).to(self.pre_layrnorm.weight.dtype)

    def forward(self, images: Tensor, geometry: Tensor | None = None, fine: bool = False) -> Tensor | tuple:
        """uint8 (B, 3, S, S) -> (B, P, W) patch tokens of `select_layer`, row by row, without the class token.

        geometry: (B, 4, S, S), for an encoder with `depth` (see data/depth.py); None = nothing measured, all zeros.
        fine: return (tokens, the fine map (B, C, H, H)); H = 4 S / patch."""
        x = self.normalise(images)
        if self.cfg.depth:
            geometry = x.new_zeros(1, 1, 1, 1) if geometry is None else geometry.to(x)
            x = torch.cat([x, geometry.expand(len(x), 4, *x.shape[2:])], 1)
        seen = []
        for layer in self.embeddings.patch_embedding if self.cfg.stem else [self.embeddings.patch_embedding]:
            x = layer(x)
            if isinstance(layer, nn.GELU):
                seen.append(x)
        x = x.flatten(2).transpose(1, 2)  # (B, P, W)
        x = torch.cat([self.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.pre_layrnorm(x + self.embeddings.position_embedding.weight)
        for block in self.encoder.layers[: self.used]:
            x = block(x)
        tokens = (self.post_layernorm(x) if self.cfg.output_norm else x)[:, 1:]
        return (tokens, self.fine(tokens, seen)) if fine else tokens

    def unread(self, fine: bool) -> list[nn.Module]:
        """The parts that no output of `forward(.., fine=fine)` depends on."""
        parts = list(self.encoder.layers[self.used :])
        if not self.cfg.output_norm:
            parts.append(self.post_layernorm)
        return [*parts, self.fine] if self.fine and not fine else parts


def mlp(widths: tuple, activation: type, last_bias: bool = True) -> nn.Sequential:
    layers = []
    for w_in, w_out in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(w_in, w_out), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=last_bias))


def position_code(side: int, d_model: int) -> Tensor:
    """Fixed 2-D sine code (side * side, d_model), amplitude 0.5; half the channels encode the row, half the column."""
    with torch.device("cpu"):  # a real tensor even while a model is built on the meta device
        w = math.pi * torch.linspace(0.5, side, d_model // 4)
        angle = (torch.arange(side)[:, None] + 0.5) / side * w  # (side, d_model / 4)
    code = torch.cat([angle.sin(), angle.cos()], 1)  # (side, d_model / 2)
    return 0.5 * torch.cat([code.repeat_interleave(side, 0), code.repeat(side, 1)], 1)


# ---- mamba -----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) over the last axis. F.rms_norm gives the same, more slowly on a CPU."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.rsqrt(length * length / x.shape[-1] + eps)


class RMSNorm(nn.Module):
    """`rms_norm` times a learned weight, (.., width) -> (.., width) in the weight's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps).to(self.weight.dtype) * self.weight


class LayerState(NamedTuple):
    """Everything one Mamba block remembers; its size does not depend on how many tokens came before."""

    conv: Tensor  # (B, K-1, E) the last inputs of the causal convolution
    ssm: Tensor  # (B, E, N) float32 (float64 in a float64 model), the state h


class MambaMixer(nn.Module):
    """The selective state-space mixer (Mamba paper, Fig. 3 and Algorithm 2; RoboMamba Fig. 2, right).

    Differs: `bc_norm` divides B and C by their root mean square before the scan. A_log, D, dt and the scan stay at
    least float32, even after `.to(torch.bfloat16)`, because a rounded decay is applied again at every token."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        D, E, N, R, K = cfg.d_model, cfg.d_inner, cfg.d_state, cfg.rank, cfg.d_conv
        self.cfg = cfg
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.conv1d = nn.Conv1d(E, E, K, groups=E)  # only holds weight and bias under their published names
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E)
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))
        self.out_proj = nn.Linear(E, D, bias=False)

    def _apply(self, fn, recurse=True):
        """PyTorch calls this for `.to`, `.half`, `.cuda` etc.; KEEP_FLOAT32 parameters never become 16-bit."""
        before = {name: p.data for name, p in self.named_parameters() if f".{name}".endswith(KEEP_FLOAT32)}
        super()._apply(fn, recurse)
        for name, old in before.items():
            p = self.get_parameter(name)
            if p.dtype in (torch.bfloat16, torch.float16):
                p.data = old.to(p.device)
        return self

    def initial_state(self, batch: int) -> LayerState:
        conv = self.in_proj.weight.new_zeros(batch, self.cfg.d_conv - 1, self.cfg.d_inner)
        return LayerState(conv, self.A_log.new_zeros(batch, *self.A_log.shape))

    def conv(self, x: Tensor) -> Tensor:
        """Causal depthwise convolution: (B, L + K - 1, E), which starts with the K - 1 past inputs, -> (B, L, E)."""
        # K shifted products: F.conv1d needs (B, E, L), so two transposes, and its backward is slow on a CPU
        taps = self.conv1d.weight[:, 0].T.contiguous()  # (K, E)
        L = x.shape[1] - len(taps) + 1
        y = self.conv1d.bias
        for k, tap in enumerate(taps):
            y = torch.addcmul(y, x[:, k : k + L], tap)
        return y

    def selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u (.., E) -> dt (.., E), A (E, N), B (.., N), C (.., N): Algorithm 2, lines 1 to 4; all but A depend on u."""
        # exercise 5: the Mamba block, what a token selects
        cfg = self.cfg
        dt, BC = self.x_proj(u).split([cfg.rank, 2 * cfg.d_state], -1)
        # line 4: dt = softplus(parameter + s_dt(u)), where s_dt is a product of two matrices of rank R
        dt = F.softplus(F.linear(dt, self.dt_proj.weight).to(self.A_log.dtype) + self.dt_proj.bias)
        # lines 2 and 3: B = s_B(u), C = s_C(u)
        BC = BC.to(self.A_log.dtype).unflatten(-1, (2, cfg.d_state))  # (.., 2, N)
        if cfg.bc_norm:
            BC = rms_norm(BC, cfg.norm_eps)
        B, C = BC.unbind(-2)
        return dt, -torch.exp(self.A_log), B, C
        # end of exercise 5

    def forward(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """(B, L, D) and the state before it -> (B, L, D) and the state after it."""
        # exercise 5: the Mamba block
        state = state or self.initial_state(len(x))
        u, z = self.in_proj(x).chunk(2, -1)  # (B, L, E) each: the convolution branch and the gate branch
        u = torch.cat([state.conv.to(u.dtype), u], 1)  # (B, K-1 + L, E)
        tail = u[:, u.shape[1] - (self.cfg.d_conv - 1) :]
        u = F.silu(self.conv(u))
        dt, A, B, C = self.selection(u)
        y, ssm = selective_scan(u, dt, A, B, C, self.D, state.ssm)  # lines 5 and 6
        return self.out_proj(y.to(z.dtype) * F.silu(z)), LayerState(tail, ssm)
        # end of exercise 5

    def step(self, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """One token: (B, D) and the state before it -> (B, D) and the state after it; equals `forward` with L = 1."""
        u, z = self.in_proj(x).chunk(2, -1)  # (B, E)
        window = torch.cat([state.conv.to(u.dtype), u[:, None]], 1)  # (B, K, E)
        u = F.silu((window * self.conv1d.weight[:, 0].T).sum(1) + self.conv1d.bias)  # `conv` for one token
        dt, A, B, C = self.selection(u)
        y, ssm = _step(u.to(dt.dtype), dt, A, B, C, self.D, state.ssm)  # scan_step without its checks
        return self.out_proj(y.to(z.dtype) * F.silu(z)), LayerState(window[:, 1:], ssm)


class MambaBlock(nn.Module):
    """x + mixer(norm x). With 16-bit weights the residual stream x stays float32, as in the published models."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.norm = RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        self.mixer = MambaMixer(cfg)

    def forward(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """A sequence (B, L, D), or one token (B, D), which is a step of the recurrence."""
        mix = self.mixer.step if x.ndim == 2 else self.mixer
        y, state = mix(self.norm(x), state)
        return x + y, state


class MambaBackbone(nn.Module):
    """Embedding, blocks, final norm. Takes embeddings instead of token ids, so that visual tokens can be fed in too."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(MambaBlock(cfg) for _ in range(cfg.n_layer))
        self.norm_f = RMSNorm(cfg.d_model, eps=cfg.norm_eps)

    def forward(self, x: Tensor, states: list | None = None) -> tuple[Tensor, list[LayerState]]:
        """Embeddings (B, L, D) after `states` (one per block or None) -> final-norm states (B, L, D), new `states`."""
        states = states or [None] * len(self.layers)
        after = []
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for block, state in zip(self.layers, states, strict=True):
            x, state = block(x, state)
            after.append(state)
        return self.norm_f(x), after

    def step(self, x: Tensor, states: list) -> tuple[Tensor, list[LayerState]]:
        """One embedding (B, D) -> (B, D); memory stays constant however long the sequence gets."""
        return self(x, states)


class MambaLM(nn.Module):
    """The Mamba language model with tied output embedding; parameter names match the published checkpoints."""

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
        """Load a published Mamba folder; see `read_mamba` in extras/published.py."""
        from extras.published import read_mamba

        return read_mamba(folder, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> logits (B, L, V)."""
        return self.lm_head(self.backbone(self.backbone.embedding(tokens))[0])


# ---- policy head -----------------------------------------------------------------------------------------------------


class Action(NamedTuple):
    """Where and how to grip the part. Camera frame: x right, y down, z forward."""

    u: float  # column of the contact pixel, 0 .. S
    v: float  # row
    rotation: np.ndarray  # (3, 3), columns = gripper forward, left, approach

    @property
    def approach(self) -> np.ndarray:
        """(3,) unit vector along which the gripper travels to the contact; a pull goes back along it."""
        return self.rotation[:, 2]


class PolicyHead(nn.Module):
    """Pooled state (B, D) -> pixel (B, 2) in -1 .. 1 (left/top .. right/bottom) and 6D rotation (B, 6).

    Source: RoboMamba section 3.3 and Table 6 ("MLP x2", "MLP x1"). ReLU inside, no final bias, as in its code."""

    def __init__(self, cfg: HeadConfig, d_model: int):
        super().__init__()
        outputs = (8,) if cfg.kind == "one_mlp" else (2, 6)
        self.mlps = nn.ModuleList(mlp((d_model, *cfg.hidden, n), nn.ReLU, last_bias=False) for n in outputs)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        state = state.to(self.mlps[0][-1].weight.dtype)  # the language model may be bfloat16
        return torch.cat([mlp(state) for mlp in self.mlps], -1).split([2, 6], -1)


def rotation_from_6d(r6: Tensor) -> Tensor:
    """(.., 6) = approach, forward (any length, not yet orthogonal) -> (.., 3, 3), columns [forward, left, approach].

    Source: Zhou et al. 2019 (arXiv 1812.07035), Gram-Schmidt; RoboMamba predicts up (= approach), then forward."""
    # exercise 7: 6D rotation
    approach = F.normalize(r6[..., :3], dim=-1, eps=1e-6)
    forward = r6[..., 3:] - (approach * r6[..., 3:]).sum(-1, keepdim=True) * approach
    forward = F.normalize(forward, dim=-1, eps=1e-6)
    return torch.stack([forward, torch.linalg.cross(approach, forward, dim=-1), approach], -1)
    # end of exercise 7


# ---- whole model -----------------------------------------------------------------------------------------------------


class RoboMamba(nn.Module):
    """The whole model. Training stages freeze or train its four parts, `vision`, `projector`, `lm` and `head`, and
    a fifth, `point`, if the encoder has a fine map (otherwise None).

    encoding: the tokenizer (data/tokenizer.py), needed by everything that takes or returns words.
    `images` below is uint8 (B, 3, S, S), or visual tokens (B, P, W) saved from an earlier call of `vision`, or None for
    text only; `geometry` accompanies uint8 images for an RGB-D encoder."""

    def __init__(self, config: RoboMambaConfig, encoding=None):
        super().__init__()
        self.config = config
        self.encoding = encoding
        self.vision = VisionTransformer(config.vision)
        self.projector = mlp((config.vision.width, *config.projector_hidden, config.lm.d_model), nn.GELU)
        self.lm = MambaLM(config.lm)
        self.head = PolicyHead(config.head, config.lm.d_model)
        self.point = PointingHead(config.lm.d_model, config.vision.fine) if config.vision.fine else None
        side = config.vision.image_size // config.vision.patch_size
        position = position_code(side, config.lm.d_model) if config.position_code else None
        self.register_buffer("position", position, persistent=False)  # computed, not learned: not in checkpoints
        init_weights(self)

    def prompt(self, question: str) -> list[int]:
        """`<|user|> question <|assistant|>` as token ids. The policy head reads the state of the last one."""
        if not question or not question.strip():
            raise ValueError("the question or instruction is empty; say what the robot should do or tell")
        user, assistant = (self.encoding.encode_single_token(name) for name in (tokenizer.USER, tokenizer.ASSISTANT))
        return [user, *self.encoding.encode_ordinary(question.strip()), assistant]

    def text(self, ids: list[int]) -> str:
        """Decode the token ids of an answer; ids beyond the vocabulary (padded embeddings) are dropped."""
        return self.encoding.decode([t for t in ids if t < self.encoding.n_vocab]).strip()

    def image_tensor(self, image) -> Tensor:
        """Path, PIL image or uint8 (S, S, 3) -> uint8 (1, 3, S, S); only files and PIL images are resized."""
        S = self.config.vision.image_size
        if isinstance(image, str | os.PathLike):
            image = read_picture(image, S)
        elif isinstance(image, Image.Image):
            image = upright_rgb(image).resize((S, S), Image.Resampling.BILINEAR)
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.shape != (S, S, 3):
            raise ValueError(f"image: expected uint8 ({S}, {S}, 3), got {image.dtype} {image.shape}; or pass a file")
        return torch.from_numpy(image.transpose(2, 0, 1).copy())[None].to(self.lm.lm_head.weight.device)

    def visual_tokens(self, images: Tensor, geometry: Tensor | None = None) -> Tensor:
        """Images -> embeddings (B, P, D) that precede the words (paper section 3.1)."""
        tokens = images if images.ndim == 3 else self.vision(images, geometry)
        x = self.projector(tokens.to(self.projector[0].weight.dtype))
        return x if self.position is None else x + self.position.to(x.dtype)

    def sequence(self, images: Tensor | None, tokens: Tensor, geometry: Tensor | None = None) -> Tensor:
        """Images and words as one sequence of embeddings (n, P + T, D): row i of `tokens` (n, T) follows image i."""
        words = self.lm.backbone.embedding(tokens)
        if images is None:
            return words
        if len(images) != len(tokens):
            raise ValueError(f"{len(tokens)} rows of tokens for {len(images)} images; owners says whose each is")
        return torch.cat([self.visual_tokens(images, geometry), words], 1)

    def encode_image(self, images: Tensor, geometry: Tensor | None = None) -> list[LayerState]:
        """Prefill: the state of every Mamba block after the image, a prefix that all questions about it share."""
        return self.lm.backbone(self.visual_tokens(images, geometry))[1]

    def text_states(self, images: Tensor | None, tokens: Tensor, owners=None, geometry=None, lengths=None) -> Tensor:
        """Final-norm states (n, T, D) of the words `tokens` (n, T), each row after the image it is about.

        owners: (n,) int64; row i is about image owners[i], and each image is encoded once (prefill). None: row i is
        about image i, and both are read in one pass. lengths: (n,) true lengths, used with owners: rows of similar
        length are batched together to save padding. States at padding are undefined. None: all rows in one batch.
        """
        if images is None or owners is None:
            return self.lm.backbone(self.sequence(images, tokens, geometry))[0][:, -tokens.shape[1] :]
        prefix = self.encode_image(images, geometry)
        grouped = lengths is not None and tokens.device.type == "cpu"  # a GPU prefers one large batch and no sync
        order = lengths.argsort() if grouped else torch.arange(len(tokens), device=tokens.device)
        read = []
        for rows in order.chunk(4 if grouped else 1):
            words = self.lm.backbone.embedding(tokens[rows, : lengths[rows].max() if grouped else None])
            states = [state._make(s[owners[rows]] for s in state) for state in prefix]
            states, _ = self.lm.backbone(words, states)
            read.append(F.pad(states, (0, 0, 0, tokens.shape[1] - words.shape[1])))
        return torch.cat(read)[order.argsort()]

    def forward(
        self, images, tokens: Tensor, lengths: Tensor, labels: Tensor | None = None,
        *, owners=None, soft=None, geometry=None, normalizer: float | None = None, return_states: bool = False,
    ) -> tuple:  # fmt: skip
        """Next-token logits and, with labels, the loss of stages 1.1 and 1.2 (paper section 3.2).

        tokens: (n, T) int64, right-padded. lengths: (n,) true lengths; tokens beyond them are never targets. labels:
        (n, T) int64, the token itself where it is to be predicted, IGNORE (-100) elsewhere; not shifted. owners,
        geometry: as in `text_states`. soft, normalizer: as in `answer_loss`.
        Returns: logits (n, T, V), loss () or None. With return_states, also the text states (n, T, D); if labels are
            given too, logits is then None, because training needs logits only at the labelled positions.
        """
        states = self.text_states(images, tokens, owners, geometry, lengths)
        logits = None if return_states and labels is not None else self.lm.lm_head(states)
        loss = None
        if labels is not None:
            beyond = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
            loss = self.answer_loss(states, labels.masked_fill(beyond, IGNORE), soft, normalizer)
        return (logits, loss, states) if return_states else (logits, loss)

    def answer_loss(self, states: Tensor, labels: Tensor, soft=None, normalizer: float | None = None) -> Tensor:
        """Cross-entropy summed over the labelled tokens, divided by `normalizer` (default: their number).

        soft: (100, 100); row k is the target distribution over the number tokens "00" .. "99" for label k, so that a
        near miss costs less than a far one. normalizer: in data-parallel training, the mean count per process.
        """
        target = labels[:, 1:]  # the state of token t predicts token t + 1
        rows, columns = (target != IGNORE).nonzero(as_tuple=True)
        target = target[rows, columns]
        log_p = F.log_softmax(self.lm.lm_head(states[rows, columns]).float(), -1)  # (labelled tokens, V)
        losses = -log_p.gather(1, target[:, None])[:, 0]
        if soft is not None:
            first = tokenizer.NUMBER_BASE
            number = target - first
            softened = -(soft[number.clamp(0, len(soft) - 1)] * log_p[:, first : first + len(soft)]).sum(1)
            losses = torch.where((number >= 0) & (number < len(soft)), softened, losses)
        return losses.sum() / (max(len(target), 1) if normalizer is None else normalizer)

    def pool(self, states: Tensor, lengths: Tensor) -> Tensor:
        """(n, T, D) -> (n, D), the policy head's input. "last" is the last TRUE token; `[:, -1]` could be padding."""
        if self.config.head.pool == "mean":
            inside = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
            return (states * inside[..., None]).sum(1) / lengths[:, None]
        last = states[torch.arange(len(states), device=states.device), lengths - 1]
        return last if self.config.head.pool == "last" else (states[:, 0] + last) / 2  # "first_last"

    @torch.inference_mode()
    def generate(self, image, question: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
        """Answer in words, one recurrent `step` per token: memory and time per token do not grow with the answer.

        image: as in `predict_action`, or None. temperature: 0 = greedy, else sampling with `seed`.
        """
        rng = torch.Generator().manual_seed(seed)
        device = self.lm.lm_head.weight.device
        backbone = self.lm.backbone
        image = None if image is None else self.image_tensor(image)
        h, states = backbone(self.sequence(image, torch.tensor([self.prompt(question)], device=device)))
        h = h[:, -1]
        answer = []
        while len(answer) < max_new_tokens:
            logits = self.lm.lm_head(h)[0].float().cpu()
            if not logits.isfinite().all():
                raise ValueError("the logits are not finite: these weights cannot be used")
            token = int(logits.argmax())
            if temperature > 0:
                token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=rng))
            if token == self.encoding.eot_token:
                break
            answer.append(token)
            h, states = backbone.step(backbone.embedding(torch.tensor([token], device=device)), states)
        return self.text(answer)

    @torch.inference_mode()
    def predict_action(
        self, image, instruction: str, depth: np.ndarray | None = None, intrinsics=None, point=None, refine=True
    ) -> Action:
        """One forward pass, no decoding: image (path, PIL image or uint8 (S, S, 3)) and instruction -> Action.

        depth: (H, W) metres along the camera's z, the same view at any resolution; 0 or non-finite = not measured.
        intrinsics: fx, fy, cx, cy in pixels of depth. Given both, an RGB-D encoder sees the geometry, and any model's
        contact is refined on the measured surface (`refine` in data/depth.py), unless `refine` is False or refining
        would turn the direction by more than `config.head.turn` degrees.
        point: True = use the pointing head, if there is one; False = use the paper's head; None = True with depth.
        Raises: ValueError for bad input, and for an action that is not finite.
        """
        S = self.config.vision.image_size
        device = self.lm.lm_head.weight.device
        if (depth is None) != (intrinsics is None):
            raise ValueError("depth and intrinsics go together")
        geometry = None
        if depth is not None:
            depth, intrinsics = depth_camera.resample(depth, intrinsics, S)
            if self.config.vision.depth:
                geometry = torch.from_numpy(depth_camera.geometry(depth, intrinsics))[None].to(device)
        tokens = torch.tensor([self.prompt(contact_question(instruction))], device=device)
        image = self.image_tensor(image)
        point = self.point is not None and (depth is not None if point is None else point)
        if point:
            image, fine = self.vision(image, geometry, fine=True)
        states = self.text_states(image, tokens, geometry=geometry)
        state = self.pool(states, torch.tensor([tokens.shape[1]], device=device))
        pixel, r6 = self.head(state)
        if point:
            heat, way = self.point(state, fine).float().split([1, 3], 1)
            pixel, approach = peak(heat[:, 0], way)
            r6 = torch.cat([approach, rotation_from_6d(r6.float())[..., 0]], 1)
        u, v = ((pixel[0].float() + 1) * S / 2).clamp(0, S - 1e-3).tolist()
        rotation = rotation_from_6d(r6[0].float()).cpu()
        if not (math.isfinite(u) and math.isfinite(v) and rotation.isfinite().all()):
            raise ValueError(f"the action is not finite (u {u}, v {v}): these weights cannot be used")
        if depth is not None and refine:
            u, v, approach = depth_camera.refine(u, v, rotation[:, 2].numpy(), depth, intrinsics, self.config.head.turn)
            # Rebuild the rotation from the new approach; forward stays as close to the old one as possible.
            rotation = rotation_from_6d(torch.cat([torch.as_tensor(approach).to(rotation), rotation[:, 0]]))
        return Action(float(u), float(v), rotation.numpy())

    def save_pretrained(self, path, half: bool = False) -> None:
        """Write `path`/{model.safetensors, config.json, the tokenizer file}; half: matrices except A_log in float16."""

        def write(staging: Path) -> None:
            save_tensors(staging / "model.safetensors", self, half=half)
            tokenizer.write_encoding(staging, self.encoding)
            write_json(staging / "config.json", self.config.to_dict())

        save_folder(path, write, tokenizer.FILES)

    @classmethod
    def from_pretrained(cls, path, device: str = "cpu", dtype=torch.float32) -> "RoboMamba":
        """Load a `save_pretrained` folder. Raises: ValueError naming the file and every tensor that does not fit."""
        path = Path(path)
        values = read_json(path / "config.json", dict, "save_pretrained writes one")
        config = RoboMambaConfig.from_dict(values, str(path / "config.json"))
        with torch.device("meta"):
            model = cls(config, tokenizer.load_encoding(path / tokenizer.RANKS))
        load_tensors(model, [path / "model.safetensors"], dtype=dtype)
        model.lm.tie()
        return model.to(device).eval()


# ---- initial values --------------------------------------------------------------------------------------------------


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """All initial values in one place; the last step of construction, also of a new policy head.

    | parameter | value | why |
    |---|---|---|
    | linear, conv1d weights | normal, sd 0.02 sqrt(768 / fan_in) | GPT-2's 0.02 at width 768, for any width |
    | conv2d weights | normal, sd sqrt(2 / fan_in) (He et al.) | else the stem's GELUs shrink the signal to nothing |
    | mixer.out_proj | the same / sqrt(n_layer) | the residual stream does not grow with depth (Mamba's code) |
    | embeddings, class token, positions | normal, sd 0.02 | tied with the output: a larger sd starts overconfident |
    | A_log | log of N log-spaced values from a_min to a_max (Mamba: 1, 2, .., N) | slow to fast memories |
    | dt_proj.weight | uniform +- R^-1/2 | keeps the variance of dt (Mamba's code) |
    | dt_proj.bias | inverse softplus of exp(U(log dt_min, log dt_max)) | softplus(bias) is the initial step size |
    | D, other biases | 1, 0 | a plain skip |
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            fan_in = module.weight[0].numel()
            std = math.sqrt(2 / fan_in) if isinstance(module, nn.Conv2d) else 0.02 * math.sqrt(768 / fan_in)
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, VisionTransformer):
            nn.init.normal_(module.embeddings.class_embedding, std=0.02)
        if isinstance(module, MambaLM):
            nn.init.normal_(module.backbone.embedding.weight, std=0.02)  # again: the tied lm_head was drawn above
            for block in module.backbone.layers:
                block.mixer.out_proj.weight /= math.sqrt(module.cfg.n_layer)
        if isinstance(module, MambaMixer):
            cfg = module.cfg
            a = torch.logspace(math.log10(cfg.a_min), math.log10(cfg.a_max), cfg.d_state)
            if (cfg.a_min, cfg.a_max) == (1.0, float(cfg.d_state)):
                a = torch.arange(1.0, cfg.d_state + 1)
            module.A_log.copy_(a.log().expand_as(module.A_log))
            module.D.fill_(1.0)
            nn.init.uniform_(module.dt_proj.weight, -(cfg.rank**-0.5), cfg.rank**-0.5)
            dt = torch.exp(torch.empty_like(module.dt_proj.bias).uniform_(math.log(cfg.dt_min), math.log(cfg.dt_max)))
            module.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


# ---- main ------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask RoboMamba about an image, or where to take hold.")
    shipped = Path(__file__).parent / "data/pretrained/robomamba-tiny-rgbd"
    parser.add_argument("--checkpoint", default=shipped, help="folder written by save_pretrained")
    parser.add_argument("--image", required=True, help="image file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ask", help="a question; the answer is printed")
    what.add_argument("--act", help="an instruction; contact pixel and gripper rotation are printed")
    parser.add_argument("--depth", help="with --act: depth of the image, .npy in metres or 16-bit PNG in millimetres")
    parser.add_argument("--intrinsics", nargs=4, type=float, metavar="F", help="fx fy cx cy in pixels of --depth")
    args = parser.parse_args()
    if args.depth and args.act is None:
        parser.error("--depth goes with --act")
    model = RoboMamba.from_pretrained(args.checkpoint)
    if args.ask is not None:
        print(model.generate(args.image, args.ask))
        return
    depth = depth_camera.read_depth(args.depth) if args.depth else None
    u, v, rotation = model.predict_action(args.image, args.act, depth, args.intrinsics)
    side = model.config.vision.image_size
    print(f"pixel u {u:.1f} v {v:.1f} (of {side})")
    if depth is not None:
        x, y, z = depth_camera.lift(u, v, side, depth, args.intrinsics)
        print(f"point x {x:.4f} y {y:.4f} z {z:.4f} m, camera frame x right, y down, z forward")
    print("rotation, columns forward, left, approach, camera frame x right, y down, z forward:")
    print(np.array2string(rotation, precision=3, suppress_small=True))


if __name__ == "__main__":
    run_main(main)
