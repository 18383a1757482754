"""RoboMamba's model shapes, their JSON and the presets (listed by `python -m extras.costs`). Letters: robomamba.py."""

import math
from dataclasses import asdict, dataclass, field

from common.weights import dataclass_from_dict


@dataclass
class VisionConfig:  # the image encoder; defaults: the `tiny` preset but for `fine`; CLIP's own shapes: CLIP_L below
    image_size: int = 128  # S, pixels
    patch_size: int = 16  # pixels
    width: int = 192  # W
    n_layer: int = 4
    n_head: int = 6
    mlp_ratio: int = 4
    stem: tuple = (24, 48, 96)  # channels of all but the last 3x3 stride-2 convolution; () = CLIP's patch convolution
    select_layer: int = -1  # block whose output is returned; -1 = the last, -2 = the one before it (the paper's)
    output_norm: bool = True  # apply post_layernorm to the tokens (CLIP's recipe for LLaVA-like models: no)
    depth: bool = False  # RGB-D: 4 more channels, relative depth and the normal's x, y, z (data/depth.py, `geometry`)
    fine: int = 0  # channels of the fine map that the pointing head reads, 4 x 4 cells per patch; 0 = no map, no head
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class LMConfig:  # the language model; fields named as in Mamba's own config where it has them
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

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.d_model / 16)


@dataclass
class HeadConfig:  # the policy head (paper section 3.3, appendix Table 6)
    kind: str = "two_mlp"  # separate MLPs for pixel and rotation (the paper's choice) | "one_mlp": one with 8 outputs
    hidden: tuple = (8,)  # hidden widths; the paper's text fits (d_model / 4, d_model / 8)
    pool: str = "last"  # "last" | "first_last" (the paper's code) | "mean" of the text states
    turn: float = 180.0  # maximum degrees a depth image may turn a predicted direction; set by finetune_policy.py


@dataclass
class RoboMambaConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    lm: LMConfig = field(default_factory=LMConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    projector_hidden: tuple = (384,)
    position_code: bool = True  # fixed 2-D sine code on the visual tokens

    def __post_init__(self):
        vision, head = self.vision, self.head
        if vision.image_size % vision.patch_size:
            raise ValueError(f"vision: patch_size {vision.patch_size} must divide image_size {vision.image_size}")
        if vision.width % vision.n_head:
            raise ValueError(f"vision: n_head {vision.n_head} must divide width {vision.width}")
        if not -vision.n_layer - 1 <= vision.select_layer <= vision.n_layer:
            raise ValueError(f"vision.select_layer: {vision.select_layer} is not a layer")
        if vision.fine and (len(vision.stem) < 2 or vision.fine % 8):
            raise ValueError(f"vision.fine: {vision.fine}: a multiple of 8, with a stem of two layers or more")
        if vision.stem and 2 ** (len(vision.stem) + 1) != vision.patch_size:
            raise ValueError(f"vision.stem: {vision.stem} does not make patches of patch_size {vision.patch_size}")
        if len(vision.image_mean) != 3 or len(vision.image_std) != 3 or min(vision.image_std) < 1e-3:
            raise ValueError("vision: image_mean and image_std must be three numbers each, image_std at least 0.001")
        if self.position_code and self.lm.d_model % 4:
            raise ValueError("lm.d_model: must be a multiple of 4 for position_code")
        if head.kind not in ("two_mlp", "one_mlp") or head.pool not in ("last", "first_last", "mean"):
            raise ValueError(f"head: no kind {head.kind!r} with pool {head.pool!r}; common/config.py lists them")
        if not 0 <= head.turn <= 180:
            raise ValueError(f"head.turn: {head.turn} is no angle of 0 .. 180 degrees")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict, source: str = "config") -> "RoboMambaConfig":
        """From JSON. Raises: ValueError naming `source` and the key that is unknown or has an impossible value."""
        return dataclass_from_dict(cls, values, source)


CLIP_L = VisionConfig(224, 14, 1024, 24, 16, stem=(), select_layer=-2, output_norm=False)
MAMBA = dict(vocab_size=50280, d_state=16, dt_min=0.001, dt_max=0.1, a_min=1.0, a_max=16.0, bc_norm=False)


def paper_config(vision: VisionConfig, lm: LMConfig) -> RoboMambaConfig:
    """The paper's projector, policy head and pooling around an encoder and a language model of any size."""
    head = HeadConfig(hidden=(lm.d_model // 4, lm.d_model // 8), pool="first_last")
    return RoboMambaConfig(vision, lm, head, projector_hidden=(4096, lm.d_model), position_code=False)


PRESETS = {
    "tiny": RoboMambaConfig(VisionConfig(fine=48)),
    "tiny-rgbd": RoboMambaConfig(VisionConfig(depth=True, fine=48)),
    "small": RoboMambaConfig(
        VisionConfig(128, 16, 384, 8, depth=True, fine=96), LMConfig(384, 8, 1024, 16), HeadConfig(hidden=(24,)), (768,)
    ),
    "mamba-130m": paper_config(CLIP_L, LMConfig(d_model=768, n_layer=24, **MAMBA)),
    "robomamba-2.8b": paper_config(CLIP_L, LMConfig(d_model=2560, n_layer=64, **MAMBA)),
}
