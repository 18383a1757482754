"""data/tokenizer.py: ids as documented, ranks by hand, any text comes back, bad files are named."""

import base64
import functools

import numpy as np
import pytest
import regex
from tiktoken.load import load_tiktoken_bpe

from data import tokenizer
from data.tokenizer import NUMBER_BASE, NUMBERS, PATTERN, load_encoding, merge, read_ranks, train_ranks, write_ranks

TEXTS = [
    "open the top drawer of the cabinet, please",
    "Where is the top drawer of the cabinet? (37,52)",
    "Is it possible to open the bottom drawer? no, the bottom drawer is already open",
    "aaaa aaaaa aaaaaa banana bananas ananas",  # runs that overlap themselves
    "Predict the contact point and direction: open the lid. 37 52 05 71 93",
]
FIRST_LEARNED = NUMBER_BASE + NUMBERS


def learned(texts, n):
    """The first n tokens that are learned, in their order."""
    ranks = train_ranks(texts, FIRST_LEARNED + n)
    assert sorted(ranks.values()) == list(range(len(ranks)))
    return sorted(ranks, key=ranks.get)[FIRST_LEARNED:]


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.tiktoken"
    write_ranks(path, train_ranks(TEXTS, 420))
    return load_encoding(path)


def test_merge_is_greedy_from_the_left():
    assert merge([b"a"] * 5, b"aa") == [b"aa", b"aa", b"a"]
    assert merge([b"ab", b"a", b"b", b"c"], b"ab") == [b"ab", b"ab", b"c"]
    assert merge([b"a", b"bc", b"ab", b"c"], b"abc") == [b"abc", b"abc"]  # both spellings


def test_ranks_worked_by_hand():
    assert learned(["aXbX aXbX 1212", "bX"], 9) == [b"bX", b"XbX", b"aXbX", b" aXbX"]  # 3, 2, 2, 1 times; no digits
    assert learned(["zb za"], 1) == [b" z"] == learned(["za zb"], 1)  # all pairs once: the smallest bytes
    assert learned(["aaaa"], 9) == [b"aa", b"aaaa"]  # pairs that overlap are counted three times, joined twice
    assert learned(["abc", "bcX"], 2) == [b"bc", b"abc"]  # b"bcX" once too, but larger
    assert learned(["abc ab"] * 2, 3)[:2] == [b"ab", b" ab"]
    assert learned(TEXTS, 0) == [] and b" cabinet" in learned(TEXTS, 10_000)  # until there are no pairs
    assert train_ranks(TEXTS, 420) == train_ranks(TEXTS[::-1], 420) == train_ranks(iter(TEXTS), 420)


def test_tiktoken_cuts_words_as_they_were_cut_in_training(tmp_path):
    write_ranks(tmp_path / "v", train_ranks(TEXTS, 400))
    encoding = load_encoding(tmp_path / "v")
    lengths = set()
    for word in {word for text in TEXTS for word in regex.findall(PATTERN, text) if not word.isdecimal()}:
        pieces = functools.reduce(merge, learned(TEXTS, 400 - FIRST_LEARNED), [bytes([b]) for b in word.encode()])
        assert encoding.decode_tokens_bytes(encoding.encode_ordinary(word)) == pieces
        lengths.add(len(pieces))
    assert min(lengths) == 1 < max(lengths)


def test_every_number_is_one_token_with_its_documented_id(encoding):
    for n in range(NUMBERS):
        assert encoding.encode_ordinary(f"{n:02d}") == [NUMBER_BASE + n]
        for text in (f" {n:02d}", f"at {n:02d}.", f"x{n:02d}y", f"({n:02d},{n:02d})"):
            assert NUMBER_BASE + n in encoding.encode_ordinary(text)
    assert len(encoding.encode_ordinary("(37,52)")) == 5
    assert len(encoding.encode_ordinary("37 52 05 71 93")) == 9
    for word in (" the", " drawer"):  # frequent words are one token, with their space
        assert len(encoding.encode_ordinary(word)) == 1 and encoding.encode_ordinary(word)[0] >= FIRST_LEARNED
    ids = encoding.encode_ordinary("2024123")
    assert [encoding.decode([i]) for i in ids] == ["20", "24", "12", "3"]


def test_any_text_comes_back(encoding):
    rng = np.random.default_rng(1)
    points = [p for p in rng.integers(1, 0x110000, 3000) if not 0xD800 <= p < 0xE000]  # all planes, no lone surrogates
    texts = [
        "",
        " ",
        "  \n\t\r\n  x  ",
        "naïve Ünïcødé",
        "日本語 テスト",
        "👩‍👩‍👧‍👦 ok",
        "١٢٣ ½ ²",
        "e\u0301 \x00\x1c\x85",
        "don't--now!!",
    ]
    texts += ["".join(map(chr, points[i : i + 20])) for i in range(0, len(points), 20)]
    texts += ["".join(rng.choice(list(" \n\tab1(é,'"), 30)) for _ in range(100)]
    for text in texts:
        assert encoding.decode(encoding.encode_ordinary(text)) == text
        assert "".join(regex.findall(PATTERN, text)) == text  # nothing falls between the branches of the pattern


def test_special_tokens_follow_the_ranks(encoding):
    ranks = encoding.n_vocab - 3
    assert ranks == 420
    assert [encoding.encode_single_token(t) for t in tokenizer.SPECIAL_TOKENS] == [ranks, ranks + 1, ranks + 2]
    assert encoding.eot_token == ranks
    typed = encoding.encode_ordinary("<|user|> hello")  # written by a person: plain characters
    assert max(typed) < ranks and encoding.decode(typed) == "<|user|> hello"


def test_file_is_in_tiktokens_format(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # or tiktoken's own loader would keep a copy of the file for ever
    ranks = train_ranks(TEXTS, 400)
    write_ranks(tmp_path / "v", ranks)
    assert load_tiktoken_bpe(str(tmp_path / "v")) == ranks == read_ranks(tmp_path / "v")
    assert (tmp_path / "v").read_bytes().splitlines()[356 - 99] == base64.b64encode(b"01") + b" 257"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "v"
    write_ranks(path, train_ranks(TEXTS, 400))
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: open(tmp_path / "missing" / "folder"))
    with pytest.raises(ValueError, match=r"v: cannot be written"):
        write_ranks(path, train_ranks(TEXTS, 380))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["v"]


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "v"
    with pytest.raises(FileNotFoundError, match="no such vocabulary"):
        load_encoding(path)
    with pytest.raises(ValueError, match="size=355"):
        train_ranks(TEXTS, 355)
    write_ranks(path, train_ranks(TEXTS, 360))
    good = path.read_text().splitlines()
    cases = {
        "line 7: expected": good[:6] + ["not base64! 6"] + good[7:],
        "line 8: expected": good[:7] + ["QQ== seven"] + good[8:],
        "line 66: expected": good[:65] + ["QQ!== 65"] + good[66:],
        "line 9: expected": good[:8] + ["QQ=="] + good[9:],
        "line 3: expected": good[:2] + [""] + good[3:],
        "line 4: .*empty": good[:3] + [" 3"] + good[4:],
        "line 361: token": good + [good[0]],
        "line 361: .*rank 5 occurs twice": good + [base64.b64encode(b"new one").decode() + " 5"],
        "no rank for byte 0xff": good[:255] + good[256:],
        "0 .. 360 without a gap": good + [base64.b64encode(b"new one").decode() + " 400"],
        "no rank for byte 0x00": [],
    }
    for message, lines in cases.items():
        path.write_text("".join(line + "\n" for line in lines))
        with pytest.raises(ValueError, match=message) as error:
            load_encoding(path)
        assert str(path) in str(error.value)
