"""pytest tests/test_extras_published.py

Published weights: parity with `transformers`, both ways; the published tokenizer; all stages from published parts;
files of strangers.

Nothing is downloaded: configs, random weights and a small byte-pair vocabulary are made here, in the published formats.
"""

import importlib.util
import json
import pickle
import random
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import train as train_module
from common.weights import load_tensors
from data.dataset import Conversations
from data.tokenizer import ASSISTANT, END, USER, PublishedEncoding, load_encoding, write_encoding
from extras.published import (
    mamba_config,
    open_tensors,
    read_clip,
    read_mamba,
    read_parts,
    save_clip,
    save_mamba,
    weight_files,
)
from finetune_policy import PolicyConfig, finetune
from robomamba import LMConfig, MambaLM, RoboMamba, VisionConfig, VisionTransformer
from train import TrainConfig, train

PARITY = 1e-4  # largest gap as a share of the largest value; measured 1e-6, an off-by-one in any layer gives 1e-1
VOCABULARY = 504  # rows of the miniature embedding; the miniature tokenizer has 500 tokens, USER and ASSISTANT get 2
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install '.[parity]'"
)


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in EVERY parameter: norms of one, biases of zero would hide a wrong name."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if p.ndim < 2 or name.endswith("A_log") else p[0].numel() ** -0.5
            p.add_(scale * torch.randn_like(p))
    return model.eval()


def fails(pattern: str, call, *args, **options) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


# ---- miniature published models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def their_mamba():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=40, num_hidden_layers=3, vocab_size=VOCABULARY, state_size=5, conv_kernel=3, expand=2)
    return shake(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, layer_norm_epsilon=2e-5)))


@pytest.fixture(scope="module")
def their_clip():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=3)
    text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
    text |= dict(max_position_embeddings=8, bos_token_id=0, eos_token_id=1)
    vision |= dict(image_size=32, patch_size=8)
    return shake(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)))


@pytest.fixture(scope="module")
def our_mamba(tmp_path_factory):
    """A -hf folder written without transformers, so that the tests of bad files always run."""
    cfg = LMConfig(32, 2, VOCABULARY, d_state=4, bc_norm=False)
    folder = tmp_path_factory.mktemp("ours") / "mamba"
    torch.manual_seed(0)
    lm = MambaLM(cfg)
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_mamba(lm, folder)
    return folder


@pytest.fixture(scope="module")
def our_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "clip"
    vision = VisionConfig(32, 8, 24, 3, 3, 2, stem=(), select_layer=-2, output_norm=False)
    torch.manual_seed(1)
    tower = VisionTransformer(vision)
    torch.nn.init.normal_(tower.embeddings.class_embedding, std=0.1)
    save_clip(tower, folder)
    return folder


def original(their_mamba, folder: Path, head: bool) -> Path:
    """The same weights as mamba_ssm names them: a .bin, `embedding`, its own config."""
    weights = {k.replace("embeddings", "embedding"): v for k, v in their_mamba.state_dict().items()}
    if not head:
        del weights["lm_head.weight"]
    config = {"d_model": 40, "n_layer": 3, "vocab_size": VOCABULARY - 3, "ssm_cfg": {"d_state": 5, "d_conv": 3}}
    config |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


# ---- parity: Mamba


@needs_transformers
@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 17, 65])
def test_logits_and_every_layers_states_equal_those_of_transformers(their_mamba, tmp_path, length):
    their_mamba.save_pretrained(tmp_path)
    lm, states = read_mamba(tmp_path), []
    assert lm.lm_head.weight is lm.backbone.embedding.weight and lm.cfg.norm_eps == 2e-5
    for block in lm.backbone.layers:
        block.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
    lm.backbone.norm_f.register_forward_hook(lambda module, inputs, output: states.append(output))
    tokens = torch.randint(0, VOCABULARY, (2, length))
    ours, theirs = lm(tokens), their_mamba(tokens, output_hidden_states=True)
    gaps = [gap(ours, theirs.logits), *(gap(a, b) for a, b in zip(states, theirs.hidden_states, strict=True))]
    print(f"length {length}: largest gap of logits {gaps[0]:.1e}, of {len(states)} layers' states {max(gaps[1:]):.1e}")
    assert len(states) == 4 and max(gaps) < PARITY


@needs_transformers
@torch.no_grad()
def test_generation_by_steps_equals_that_of_transformers_token_for_token(their_mamba, tmp_path):
    their_mamba.save_pretrained(tmp_path)
    lm = read_mamba(tmp_path)
    prompt = torch.randint(2, VOCABULARY, (2, 9))
    wanted = their_mamba.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    h, states = lm.backbone(lm.backbone.embedding(prompt))
    h, tokens = h[:, -1], [prompt]
    for _ in range(24):
        tokens.append(lm.lm_head(h).argmax(-1, keepdim=True))
        h, states = lm.backbone.step(lm.backbone.embedding(tokens[-1][:, 0]), states)
    assert torch.equal(torch.cat(tokens, 1), wanted)
    assert len(set(wanted[0, 9:].tolist())) > 3  # not one token for ever


@needs_transformers
@torch.no_grad()
@pytest.mark.parametrize("layout", ["parts", "bin", "bin parts", "both keys", "original", "original, no head"])
def test_every_published_layout_loads_to_the_same_logits(their_mamba, tmp_path, layout):
    folder = tmp_path / "m"
    if layout.startswith("original"):
        original(their_mamba, folder, head="no head" not in layout)
    else:
        their_mamba.save_pretrained(folder, **({"max_shard_size": "20KB"} if layout == "parts" else {}))
    if layout == "parts":
        assert len(weight_files(folder)) > 2 and not (folder / "model.safetensors").exists()
    if layout.startswith("bin"):  # as transformers wrote them until 2023
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if layout == "bin":
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            names = sorted(weights)
            where = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
            for part in set(where.values()):
                torch.save({n: weights[n] for n in names if where[n] == part}, folder / part)
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    if layout == "both keys":  # state-spaces/mamba-130m-hf holds the original's keys beside its own
        config = json.loads((folder / "config.json").read_text())
        config |= {"d_model": 40, "n_layer": 3, "ssm_cfg": {}, "d_inner": 80, "rms_norm": True}
        (folder / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(0, VOCABULARY, (2, 11))
    lm = read_mamba(folder)
    if layout.startswith("original"):
        for block in (*lm.backbone.layers, lm.backbone):  # its config cannot say 2e-5
            (block.norm if hasattr(block, "norm") else block.norm_f).eps = 2e-5
    assert gap(lm(tokens), their_mamba(tokens).logits) < PARITY


@needs_transformers
@torch.no_grad()
@pytest.mark.parametrize("naming", ["hf", "original"])
def test_mamba_weights_saved_here_load_there(our_mamba, tmp_path, naming):
    import transformers

    lm = MambaLM.from_pretrained(our_mamba)
    save_mamba(lm, tmp_path / naming, naming)
    again = read_mamba(tmp_path / naming)
    tokens = torch.randint(0, VOCABULARY, (2, 13))
    assert torch.equal(again(tokens), lm(tokens)) and again.cfg == lm.cfg
    if naming == "hf":
        load = transformers.MambaForCausalLM.from_pretrained
        theirs, report = load(tmp_path / naming, output_loading_info=True)
        assert not report["unexpected_keys"] and not set(report["missing_keys"]) - {"lm_head.weight"}
    else:  # mamba_ssm needs CUDA; its names and config are checked, its weights through transformers' model
        config = json.loads((tmp_path / naming / "config.json").read_text())
        assert (config["d_model"], config["n_layer"], config["vocab_size"]) == (32, 2, VOCABULARY)
        weights = torch.load(tmp_path / naming / "pytorch_model.bin", weights_only=True)
        sizes = dict(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4)
        theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
        theirs.load_state_dict({k.replace("embedding", "embeddings"): v for k, v in weights.items()})
    assert gap(lm(tokens), theirs.eval()(tokens).logits) < PARITY


def test_only_what_can_be_published_is_saved(tmp_path):
    fails("bc_norm", save_mamba, MambaLM(LMConfig(32, 1, 300)), tmp_path / "m")
    fails("stem", save_clip, VisionTransformer(VisionConfig(width=24, n_layer=1, n_head=2)), tmp_path / "v")
    fails("naming: 'gguf'", save_mamba, MambaLM(LMConfig(32, 1, 300, bc_norm=False)), tmp_path / "m", "gguf")
    assert not list(tmp_path.iterdir())


# ---- parity: CLIP


@needs_transformers
@torch.no_grad()
@pytest.mark.parametrize("layout", ["whole", "tower", "old names"])
def test_clip_states_of_every_layer_equal_those_of_transformers(their_clip, tmp_path, layout):
    tower = their_clip.vision_model
    if layout == "whole":
        their_clip.save_pretrained(tmp_path)
    else:
        import transformers

        theirs = transformers.CLIPVisionModel(their_clip.config.vision_config)
        theirs.load_state_dict({k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()})
        theirs.save_pretrained(tmp_path)
    if (
        layout == "old names"
    ):  # a .bin with a prefix, half precision and a table of positions, as openai/clip-* has them
        weights = {f"vision_model.{k}": v for k, v in load_file(tmp_path / "model.safetensors").items()}
        weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        (tmp_path / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "pytorch_model.bin")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    vision = read_clip(tmp_path)
    wanted = tower(vision.normalise(images), output_hidden_states=True).hidden_states
    assert len(wanted) == 5 and vision.cfg.select_layer == -2
    gaps = [gap(vision(images), wanted[-2][:, 1:])]  # by default the paper's layer, without the class token
    for layer, states in enumerate(wanted):
        gaps.append(gap(read_clip(tmp_path, layer)(images), states[:, 1:]))
    print(f"CLIP, {layout}: largest gap {max(gaps):.1e}")
    assert max(gaps) < PARITY
    assert gap(vision(images), wanted[-1][:, 1:]) > 0.01  # another layer is another thing


@needs_transformers
@torch.no_grad()
def test_clip_weights_saved_here_load_there(our_clip):
    import transformers

    theirs, report = transformers.CLIPVisionModel.from_pretrained(our_clip, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    vision = VisionTransformer.from_pretrained(our_clip)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    states = theirs.eval()(vision.normalise(images), output_hidden_states=True).hidden_states
    assert gap(vision(images), states[-2][:, 1:]) < PARITY


# ---- the published tokenizer -----------------------------------------------------------------------------------------


def random_text(rng: random.Random) -> str:
    """Words, runs of white space, repetitions, composed and decomposed marks, and any character of Unicode 3.2."""
    words = [" the", "the", " cabinet", "don't", " 2024", "======", "aaaaaaa", "e\u0301", "Å", "\n\n", " \n ", "\t"]

    def piece() -> str:
        draw = rng.random()
        if draw < 0.4:
            return rng.choice(words)
        if draw < 0.55:
            return " " * rng.randrange(1, 60)
        while True:  # newer characters are classed by newer tables, which differ between libraries
            c = chr(rng.randrange(32, 0x3000 if draw < 0.85 else 0x30000))
            if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs"):
                return c

    return "".join(piece() for _ in range(rng.randrange(1, 30)))


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A small byte-pair vocabulary in GPT-NeoX-20b's file format, trained here by the `tokenizers` package."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install '.[published]'")
    one = tokenizers.Tokenizer(tokenizers.models.BPE())
    one.normalizer = tokenizers.normalizers.NFC()
    one.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = tokenizers.decoders.ByteLevel()
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(300)] + ["open the top drawer of the cabinet ==== aaaa aaaaaa"] * 40
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=477,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    one.train_from_iterator(texts, trainer)
    one.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    one.save(str(path))
    return path


def test_the_published_tokenizer_and_its_saved_copy_cut_text_as_the_file_says(tokenizer_file, tmp_path):
    import tokenizers

    theirs, ours = tokenizers.Tokenizer.from_file(str(tokenizer_file)), PublishedEncoding(tokenizer_file)
    theirs.encode_special_tokens = True  # typed "<|endoftext|>" is plain text
    write_encoding(tmp_path, ours)
    stored = load_encoding(tmp_path / "vocab.tiktoken")
    rng = random.Random(2)
    for text in [*(random_text(rng) for _ in range(3000)), "", "<|endoftext|> <|user|>", "  x   y"]:
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids == stored.encode_ordinary(text), repr(text)
        assert ours.decode(ids) == unicodedata.normalize("NFC", text)
    theirs.enable_padding(length=50)
    theirs.enable_truncation(3)
    theirs.save(str(tmp_path / "padded.json"))
    padded = PublishedEncoding(tmp_path / "padded.json")
    assert padded.encode_ordinary("open the drawer") == ours.encode_ordinary("open the drawer")
    for encoding in (ours, stored):
        assert encoding.eot_token == 0 and encoding.n_vocab == 502
        assert [encoding.encode_single_token(t) for t in (END, USER, ASSISTANT)] == [0, 500, 501]
        assert {0, 1, 500, 501}.isdisjoint(encoding.encode_ordinary("<|user|> <|endoftext|> <|padding|>"))


def test_a_tokenizer_that_cannot_be_read_is_named(tokenizer_file, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    file = json.loads(tokenizer_file.read_text())
    file["added_tokens"].pop(0)
    del file["model"]["vocab"]["<|endoftext|>"]
    nested = "[" * 100_000
    whole = json.loads(tokenizer_file.read_text())
    words = {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "<|padding|>": 1, "open": 2, "?": 3}, "unk_token": "?"}
    for pattern, text in (
        ("no token '<|endoftext|>'", json.dumps(file)),
        ("not a tokenizer.json", nested),
        ("not a tokenizer.json", "{}"),
        ("not a byte-level tokenizer", json.dumps(whole | {"model": words})),
    ):
        path.write_text(text)
        fails(f"tokenizer.json: {pattern}", PublishedEncoding, path)
    with pytest.raises(FileNotFoundError, match="gone.json: no such file; published Mamba"):
        PublishedEncoding(tmp_path / "gone.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    fails("read by the package tokenizers; `pip install tokenizers`", PublishedEncoding, tokenizer_file)


# ---- published parts make a RoboMamba --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(our_clip, our_mamba, tokenizer_file):
    """(CLIP folder, Mamba -hf folder with its tokenizer)."""
    (our_mamba / "tokenizer.json").write_text(tokenizer_file.read_text())
    return our_clip, our_mamba


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A user's own data: a conversation file in LLaVA's layout, pictures of several sizes, contacts, dense targets."""
    folder, rng = tmp_path_factory.mktemp("llava"), np.random.default_rng(0)
    records, contacts, n = [], [], 6
    for i in range(n):
        image = f"coco/{i:012d}.jpg"
        (folder / "coco").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30 + i, 41, 3), dtype=np.uint8)).save(folder / image)
        said = [("human", "<image>\nWhat is in the   picture?"), ("gpt", f"A cabinet with {i} drawers at (37,52).")]
        said += [("human", "Can the lid be opened?"), ("gpt", "Yes.")] if i % 2 else []
        turns = [{"from": who, "value": text} for who, text in said]
        records.append({"id": str(i), "image": image, "conversations": turns})
        contact = {"image": image, "instruction": "open the drawer", "u": 4.0 + i, "v": 20.0 - i}
        contacts.append(contact | {"approach": [0, 0, 1], "rotation6d": [0, 0, 1, 1, 0, 0]})
    (folder / "conversations.json").write_text(json.dumps(records))
    (folder / "manipulation.jsonl").write_text("".join(json.dumps(c) + "\n" for c in contacts))
    target = rng.random((n, 16, 16, 7)).round().astype(np.float32)
    labels = {k: rng.integers(0, 3, shape) for k, shape in (("kinds", (n, 16, 16)), ("category", n), ("colour", n))}
    np.savez(folder / "dense.npz", targets=target, **labels)
    return folder


def test_read_parts_holds_both_models_and_the_papers_new_parts(parts):
    torch.manual_seed(0)
    model = read_parts(*parts)
    config, d = model.config, 32
    assert (config.projector_hidden, config.head.hidden) == ((4096, d), (d // 4, d // 8))
    assert (config.position_code, config.head.pool, config.vision.select_layer) == (False, "first_last", -2)
    for part, wanted in ((model.vision, read_clip(parts[0])), (model.lm, None)):
        wanted = wanted or read_mamba(parts[1])
        assert all(torch.equal(p, q) for p, q in zip(part.parameters(), wanted.parameters(), strict=True))
    assert model.lm.lm_head.weight is model.lm.backbone.embedding.weight
    assert all(p.device.type == "cpu" and p.isfinite().all() and p.requires_grad for p in model.parameters())
    assert all(p.abs().max() > 0 for p in (*model.projector[0].parameters(),)[:1])
    tiny = read_parts(*parts, preset="tiny").config
    assert (tiny.projector_hidden, tiny.head.pool, tiny.position_code) == ((384,), "last", True)
    fails("preset 'huge'", read_parts, *parts, preset="huge")


def test_read_parts_survives_a_save_with_its_tokenizer(parts, tmp_path):
    torch.manual_seed(0)
    model = read_parts(*parts, preset="tiny")
    model.save_pretrained(tmp_path / "m")
    again = RoboMamba.from_pretrained(tmp_path / "m")
    question, picture = "what   is naïve e\u0301?", np.full((32, 32, 3), 90, np.uint8)
    assert again.prompt(question) == model.prompt(question) and again.prompt(question)[0] == 500
    assert np.array_equal(
        again.predict_action(picture, "open").rotation, model.predict_action(picture, "open").rotation
    )
    assert again.generate(picture, question, 6) == model.generate(picture, question, 6)


def test_read_parts_in_bfloat16_is_close_and_its_projector_can_be_trained(parts):
    models = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        models.append(read_parts(*parts, preset="tiny", dtype=dtype))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(2, 500, (2, 9))
    lengths = torch.tensor([9, 9])
    (full, _), (half, loss) = (model(images, tokens, lengths, tokens) for model in models)
    assert half.dtype == torch.bfloat16 and gap(half.float(), full) < 3e-2
    mixer = models[1].lm.backbone.layers[0].mixer
    assert {p.dtype for p in (mixer.A_log, mixer.D, mixer.dt_proj.bias)} == {torch.float32}
    assert mixer.in_proj.weight.dtype == models[1].vision.pre_layrnorm.weight.dtype == torch.bfloat16
    for part in (models[1].vision, models[1].lm):
        part.requires_grad_(False)
    loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.abs().max() > 0 for p in models[1].projector.parameters())


def test_a_published_vocabulary_has_no_number_tokens(parts, llava):
    encoding = PublishedEncoding(parts[1] / "tokenizer.json")
    data = Conversations(llava / "conversations.json", encoding, 32)
    assert all(item.numbers == [] for items in data.items for item in items)  # ids 256 .. 355 are plain pieces
    assert any(256 <= t < 356 for items in data.items for item in items for t in item.tokens)


def test_all_stages_run_from_published_folders_on_llava_data(parts, llava, tmp_path, monkeypatch):
    flags = "--val= --device cpu --max-steps 3 --batch-size 2"

    def run(stage, *more):
        command = ["train.py", "--stage", stage, "--data", str(llava), "--out", str(tmp_path / stage), *flags.split()]
        monkeypatch.setattr("sys.argv", [*command, *more])
        train_module.main()
        return RoboMamba.from_pretrained(tmp_path / stage)

    start = ("--vision-weights", str(parts[0]), "--lm-weights", str(parts[1]))
    before = read_mamba(parts[1])
    run("vision", *start)
    align = run("align", *start, "--preset", "robomamba-2.8b", "--data", str(llava / "conversations.json"))
    assert all(torch.equal(p, q) for p, q in zip(align.lm.parameters(), before.parameters(), strict=True))
    assert align.config.projector_hidden == (4096, 32)
    more = ("--init", str(tmp_path / "align"), "--turns", "pack", "--val", str(llava))
    cotrain = run("cotrain", *more)
    assert any(not torch.equal(p, q) for p, q in zip(cotrain.lm.parameters(), before.parameters(), strict=True))
    assert "exact.all" in (tmp_path / "cotrain/metrics.csv").read_text()
    policy = dict(checkpoint=str(tmp_path / "cotrain"), data=str(llava), val="", device="cpu", epochs=2, keep_head=True)
    result = finetune(PolicyConfig(**policy, out=str(tmp_path / "policy")))
    model = RoboMamba.from_pretrained(tmp_path / "policy")
    assert (
        model.config.head == cotrain.config.head and result["head_parameters"] == 2 * (32 * 8 + 8 + 8 * 4 + 4) + 4 * 8
    )
    assert all(torch.equal(p, q) for p, q in zip(model.lm.parameters(), cotrain.lm.parameters(), strict=True))
    action = model.predict_action(llava / "coco/000000000001.jpg", "open the drawer")
    assert 0 <= action.u < 32 and np.isfinite(action.rotation).all()
    with pytest.raises(ValueError, match="give both"):
        train(TrainConfig(data=str(llava), val="", vision_weights=str(parts[0]), out=str(tmp_path / "x")))


# ---- files of strangers ----------------------------------------------------------------------------------------------


class Code:
    """What a hostile pickle holds: unpickling it calls `Path(marker).touch()`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def folder(our_mamba, tmp_path):
    """A good Mamba folder that a test may spoil."""
    (tmp_path / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "m" / name).write_bytes((our_mamba / name).read_bytes())
    return tmp_path / "m"


@pytest.mark.parametrize("form", ["zip", "plain pickle", "old torch.save"])
def test_a_pickle_with_code_is_refused_and_not_run(folder, tmp_path, form):
    weights, marker = load_file(folder / "model.safetensors"), tmp_path / "was here"
    (folder / "model.safetensors").unlink()
    hostile = weights | {"backbone.norm_f.weight": Code(marker)}
    pickle.loads(pickle.dumps(Code(tmp_path / "control")))
    assert (tmp_path / "control").exists()  # such a pickle is dangerous: this is what must not happen below
    if form == "plain pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    fails("pytorch_model.bin: refused, this pickle", read_mamba, folder)
    assert not marker.exists()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([1, 2]))
    fails("pytorch_model.bin: ", read_mamba, folder)
    odd = (torch.eye(2).to_sparse(), torch.empty(32, device="meta"))
    for content in ([torch.zeros(2)], *(weights | {"backbone.norm_f.weight": tensor} for tensor in odd)):
        torch.save(content, folder / "pytorch_model.bin")
        fails("not a table of tensors", read_mamba, folder)


def test_truncated_files_are_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        fails("model.safetensors: not a readable safetensors file", read_mamba, folder)
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + whole[8:])  # a header of 4 exabytes
    fails("model.safetensors: not a readable safetensors file", read_mamba, folder)
    (folder / "model.safetensors").write_bytes(whole)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (folder / "pytorch_model.bin").write_bytes(whole[:size])
        fails("pytorch_model.bin: ", read_mamba, folder)


class NothingAllocated(TorchDispatchMode):
    """Fails when an operation inside makes a tensor of more than a thousand elements off the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, torch.Tensor) or out.is_meta or out.numel() <= 1000, f"{func} allocates {out.shape}"
        return out


@pytest.mark.parametrize(
    "change, pattern",
    [
        ({"hidden_size": 10**12}, "hidden_size: 1000000000000 is outside 1 .. 1048576"),
        ({"hidden_size": 2**20}, "is .*, expected .*1048576"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000 is outside 1 .. 1024"),
        ({"hidden_size": -4}, "hidden_size: -4 is outside"),
        ({"hidden_size": "40"}, "hidden_size: expected int, got '40'"),
        ({"vocab_size": True}, "vocab_size: expected int, got True"),
        ({"state_size": 2.5}, "state_size: expected int, got 2.5"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: nan is outside"),
        ({"vocab_size": None}, "vocab_size: expected int, got None"),
        ({"model_type": "mamba2"}, "model_type is 'mamba2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_bias": True}, "use_bias is True"),
    ],
)
def test_absurd_or_unknown_values_in_a_config_are_refused_before_anything_is_allocated(folder, change, pattern):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with NothingAllocated(), pytest.raises(AssertionError):
        torch.empty(10**6)  # the guard is awake
    with NothingAllocated():
        fails(pattern, read_mamba, folder)


def test_unknown_keys_and_models_in_an_original_config_are_refused(folder):
    good = {"d_model": 32, "n_layer": 2, "vocab_size": 500, "ssm_cfg": {"d_state": 4}, "pad_vocab_size_multiple": 8}
    cases = {
        "unknown key 'colour'": {"colour": 1},
        "layer is 'Mamba2'": {"ssm_cfg": {"layer": "Mamba2"}},
        "attn_layer_idx is": {"attn_layer_idx": [3]},
        "d_model: 0 is outside": {"d_model": 0},
        "ssm_cfg is 3": {"ssm_cfg": 3},
        "pad_vocab_size_multiple: 0": {"pad_vocab_size_multiple": 0},
        "dt_rank: expected int, got 'some'": {"ssm_cfg": {"dt_rank": "some"}},
    }
    for pattern, change in cases.items():
        (folder / "config.json").write_text(json.dumps(good | change))
        fails(pattern, read_mamba, folder)
    (folder / "config.json").write_text(json.dumps(good))
    assert mamba_config(folder)["vocab_size"] == 504  # padded to a multiple, as the published embedding is
    for text, pattern in (("{", "not valid JSON"), ("[" * 10**5, "not valid JSON"), ("[]", "expected a JSON object")):
        (folder / "config.json").write_text(text)
        fails(pattern, read_mamba, folder)


@pytest.mark.parametrize("where", ["../secret.safetensors", "/SECRET", "sub/x.safetensors", "..", "a\\..\\x.bin", "x"])
def test_an_index_that_points_outside_its_folder_is_refused(folder, tmp_path, where):
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")  # good weights, but not in the folder
    where = where.replace("/SECRET", str(tmp_path / "secret.safetensors"))
    weights = load_file(tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, where)}))
    fails("index.json: .* is not the name of a weights file in the index's own folder", read_mamba, folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "gone.safetensors")}))
    fails("gone.safetensors: no such file", read_mamba, folder)
    for table in ([], {}, None, {"a": 1}):
        index.write_text(json.dumps({"weight_map": table}))
        fails("`weight_map` is not a table", read_mamba, folder)
    index.unlink()
    fails("no model.safetensors, pytorch_model.bin", read_mamba, folder)


def test_all_misfits_are_named_in_one_error(folder, our_clip, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["backbone.layers.1.mixer.D"], weights["backbone.norm_f.weight"]
    weights["surprise"] = torch.zeros(1)
    weights["backbone.layers.0.mixer.A_log"] = torch.zeros(64, 5)
    weights["backbone.layers.0.mixer.conv1d.bias"] = torch.zeros(64, dtype=torch.int64)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        read_mamba(folder)
    text = str(caught.value)
    for problem in (
        "missing backbone.layers.1.mixer.D",
        "missing backbone.norm_f.weight",
        "surplus surprise",
        "mixer.A_log is (64, 5), expected (64, 4)",
        "conv1d.bias is I64, expected (64,)",
    ):
        assert problem in text
    assert text.count(";") == 4
    (folder / "model.safetensors").rename(folder / "bad")
    torch.save(load_file(folder / "bad"), folder / "pytorch_model.bin")
    with pytest.raises(ValueError) as caught:
        read_mamba(folder)
    tail = lambda text: text.split(": ", 1)[1].replace("torch.int64", "I64")  # noqa: E731
    assert tail(str(caught.value)) == tail(text)
    towers = load_file(our_clip / "model.safetensors")
    towers["vision_model.more"] = towers.pop("vision_model.pre_layrnorm.weight")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.json").write_bytes((our_clip / "config.json").read_bytes())
    save_file(towers, tmp_path / "c/model.safetensors")
    fails("missing pre_layrnorm.weight; surplus more", read_clip, tmp_path / "c")
    twice = [folder / "pytorch_model.bin"] * 2
    layer = torch.nn.Linear(2, 2, device="meta")
    fails("surprise twice", load_tensors, layer, twice, open_file=open_tensors)


def test_an_untied_head_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    head = weights["backbone.embeddings.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    read_mamba(folder)
    head[3, 3] += 1
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    fails("lm_head.weight differs from backbone.embedding.weight", read_mamba, folder)


def test_other_encoders_than_clip_are_refused(our_clip, tmp_path):
    config = json.loads((our_clip / "config.json").read_text())
    cases = {
        "model_type is 'siglip'": {"model_type": "siglip"},
        "hidden_act is 'gelu'": {"hidden_act": "gelu"},
        "intermediate_size 49 is no multiple": {"intermediate_size": 49},
        "image_size: 1000000 is outside": {"image_size": 10**6},
        "patch_size 7 must divide": {"patch_size": 7},
        "vision_config is 3": {"vision_config": 3},
    }
    for pattern, change in cases.items():
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        fails(pattern, read_clip, tmp_path)
    fails("select_layer: -9", read_clip, our_clip, -9)


def test_train_names_a_bad_published_folder_in_one_line(parts, llava, tmp_path, refused):
    flags = ("--stage", "align", "--data", llava, "--val=", "--out", tmp_path / "o")
    weights = ("--vision-weights", "nowhere", "--lm-weights", parts[1])
    refused("nowhere/config.json: no such file", train_module, *flags, *weights)
