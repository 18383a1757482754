"""Greedy answers to many questions at once: the same as RoboMamba.generate one by one, but several times faster.

    answers = generate_batch(model, [image, image, ..], ["what is this object?", ..])

Prompts differ in length, but nothing is padded: one pass reads each prompt up to the length of the shortest; after
that, each step feeds every row its next prompt token or its last generated one. Finished rows leave the batch.
"""

import os

import torch


def generate_batch(model, images, questions: list[str], max_new_tokens: int = 64) -> list[str]:
    """Answers to `questions`, in order. Raises: ValueError like RoboMamba.generate, and for lists of unequal length.

    images: one image (as RoboMamba.generate takes it, or None) for all questions, or a list with one per question; an
    image that occurs several times is encoded once.
    """
    return [model.text(ids) for ids in generate_ids(model, images, questions, max_new_tokens)]


@torch.inference_mode()
def generate_ids(model, images, questions: list[str], max_new_tokens: int = 64) -> list[list[int]]:
    """`generate_batch` as token ids, without the end token."""
    prompts = [model.prompt(question) for question in questions]
    answers = [[] for _ in questions]
    if not prompts:
        return answers
    backbone = model.lm.backbone
    device = model.lm.lm_head.weight.device
    t = min(map(len, prompts))
    words = torch.tensor([prompt[:t] for prompt in prompts], device=device)
    h, states = backbone(backbone.embedding(words), _prefill(model, images, len(prompts)))
    h = h[:, -1]
    rows = list(range(len(prompts)))  # the questions still in the batch
    while True:
        logits = model.lm.lm_head(h)
        if not logits.isfinite().all():
            raise ValueError("the logits are not finite: these weights cannot be used")
        said = logits.argmax(-1).tolist()
        kept, fed = [], []
        for i, row in enumerate(rows):
            if t < len(prompts[row]):
                token = prompts[row][t]
            elif len(answers[row]) == max_new_tokens or said[i] == model.encoding.eot_token:
                continue
            else:
                token = said[i]
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


def _prefill(model, images, n: int) -> list | None:
    """Every block's state before `n` questions: after one image for all, or a list with one each; None: no image."""
    if images is None:
        return None
    images = list(images) if isinstance(images, list | tuple) else [images] * n
    if len(images) != n:
        raise ValueError(f"images: {len(images)} for {n} questions; give one, or one each")
    keys = [str(image) if isinstance(image, str | os.PathLike) else id(image) for image in images]
    different = dict(zip(keys, images, strict=True))
    owners = [list(different).index(key) for key in keys]
    states = model.encode_image(torch.cat([model.image_tensor(image) for image in different.values()]))
    return [state._make(s[owners] for s in state) for state in states]
