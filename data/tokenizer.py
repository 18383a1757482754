"""The tokenizer: byte-pair encoding learned here, read by tiktoken from a file on disk. Nothing is ever downloaded.

    ranks = train_ranks(texts, size=768)            # learn merges on our own questions and answers
    write_ranks("data/vocab.tiktoken", ranks)       # tiktoken's file format: base64(token) rank, one per line
    python -m data.tokenizer "open the top drawer: (37,52)" [data/vocab.tiktoken]     # look at the pieces

    0 .. 255      the single bytes: any Unicode text can be written
    256 .. 355    the numbers "00" .. "99": number n is id NUMBER_BASE + n, so a coordinate is ONE token out of 100
    356 .. R-1    the most frequent pieces of words, in the order they were learned
    R, R+1, R+2   (R = number of ranks) <|endoftext|> (also the padding), <|user|>, <|assistant|>

Numbers never include the space before them ("at 37" is "at", " ", "37"), or each would have two ids to learn. Longer
numbers are split into pairs from the left ("123" = "12" "3"). Text written by people goes through
`encoding.encode_ordinary(text)`, which treats a typed "<|user|>" as plain characters.

Source: Sennrich et al. 2016 (byte-pair encoding); github.com/openai/tiktoken (file format, merges by lowest rank).
Differs: RoboMamba uses GPT-NeoX's 50,280 tokens, too many to learn on a laptop. Published weights come with those, in a
tokenizer.json (`PublishedEncoding`), without the number tokens above.
"""

import base64
import collections
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import regex  # comes with tiktoken, and reads \p{L} the way tiktoken does
import tiktoken

from common.files import write_text

# Two digits | a lone digit | a word or one mark, with the space before it | one white space. Every character must match
# some branch: tiktoken silently DROPS text that its pattern does not match.
PATTERN = r"[0-9]{2}|[0-9]| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}0-9]|\s"

NUMBER_BASE, NUMBERS = 256, 100  # number n is id NUMBER_BASE + n
SPECIAL_TOKENS = END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"  # ids R, R+1, R+2
SAMPLE = "a na\u00efve \u4e00 drawer"
FILES = RANKS, PUBLISHED = "vocab.tiktoken", "tokenizer.json"  # a checkpoint folder holds one of them


def merge(pieces: list[bytes], token: bytes) -> list[bytes]:
    """Join, from the left, each pair of neighbours that spells `token`: [a, b, a] and "ab" give [ab, a]."""
    out = []
    for piece in pieces:
        if out and len(out[-1]) + len(piece) == len(token) and out[-1] + piece == token:
            out[-1] = token  # cannot be joined a second time: it is already as long as `token`
        else:
            out.append(piece)
    return out


def train_ranks(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Learn byte-pair ranks: repeatedly turn the most frequent pair of neighbours inside words into a token.

    Args     texts: any strings, each read once. size: number of ranks wanted, >= 356, not counting special tokens.
    Returns  token -> rank, ranks 0 .. len-1; fewer than `size` if the texts run out of pairs. Ties go to the smaller
             bytes, whatever the order of the texts. Raises ValueError for size < 356.
    Differs  from the textbook: pairs are counted by what they SPELL ("a"+"bc" and "ab"+"c" are one entry), because
             tiktoken joins any two neighbours whose spelling has a rank. So it splits words as they were split here.
    """
    if size < NUMBER_BASE + NUMBERS:
        raise ValueError(f"size={size}: {NUMBER_BASE} bytes and {NUMBERS} numbers need {NUMBER_BASE + NUMBERS}")
    pieces = [*(bytes([b]) for b in range(NUMBER_BASE)), *(b"%02d" % n for n in range(NUMBERS))]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    # Each distinct word is kept once, with its count. The texts of data.build use only a few hundred words, so it is
    # cheap to recount all pairs after every merge. Numbers are left out: they already have ranks.
    found = (word for text in texts for word in regex.findall(PATTERN, text))
    counts = collections.Counter(word for word in found if not word.isdecimal())
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    while len(ranks) < size:
        pairs = collections.Counter()  # spelling of a pair -> how often it occurs
        for word, pieces in words.items():
            for a, b in itertools.pairwise(pieces):
                pairs[a + b] += counts[word]
        if not pairs:
            break
        token = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[token] = len(ranks)
        words = {word: merge(pieces, token) for word, pieces in words.items()}
    return ranks


def write_ranks(path: str | Path, ranks: dict[bytes, int]) -> None:
    """Write tiktoken's own format, one "base64(token) rank" per line. Atomic."""
    in_order = sorted(ranks, key=ranks.__getitem__)
    write_text(path, "".join(f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in in_order))


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Read and check a ranks file.

    Raises: FileNotFoundError; ValueError naming file and line where it is not "base64 rank" or repeats a token or rank,
    and naming the file for a byte without rank or a gap in the ranks.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such vocabulary file; `python -m data.build` writes one")
    ranks, seen = {}, set()
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            word, rank = line.split(b" ")
            token, rank = base64.b64decode(word, validate=True), int(rank)
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected 'base64 rank', got {line[:60]!r}") from None
        if not token or token in ranks or rank in seen:
            raise ValueError(f"{path}, line {number}: token {token!r} is empty, or it or rank {rank} occurs twice")
        ranks[token] = rank
        seen.add(rank)
    if missing := [b for b in range(NUMBER_BASE) if bytes([b]) not in ranks]:
        raise ValueError(f"{path}: no rank for byte {missing[0]:#04x} ({len(missing)} of 256 missing); cut or not ours")
    if seen != set(range(len(seen))):
        raise ValueError(f"{path}: ranks must be 0 .. {len(seen) - 1} without a gap, found {min(seen)} .. {max(seen)}")
    return ranks


class PublishedEncoding:
    """A published tokenizer.json (GPT-NeoX-20b's) with the part of tiktoken.Encoding's interface that is used here.

    USER and ASSISTANT get the first ids after the file's own: GPT-NeoX's 50,277 tokens leave 3 spare rows in the
    embedding of 50,280. Raises: ValueError naming the file and what is wrong with it, or that the package is missing;
    FileNotFoundError.
    """

    def __init__(self, path: str | Path):
        try:
            from tokenizers import Tokenizer  # an optional extra that only published weights need
        except ModuleNotFoundError:
            raise ValueError(f"{path}: read by the package tokenizers; `pip install tokenizers`") from None
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file; published Mamba -hf folders hold one")
        try:
            self.file = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more precise
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from None
        if self.file.token_to_id(END) is None:
            raise ValueError(f"{path}: no token {END!r}, which ends every answer")
        self.file.no_padding()  # a file may ask for either
        self.file.no_truncation()
        self.file.add_special_tokens([USER, ASSISTANT])
        self.file.encode_special_tokens = True  # typed "<|user|>" is plain text
        self.eot_token = self.file.token_to_id(END)
        ids = [*self.file.get_vocab().values()]
        self.n_vocab = max(ids) + 1
        if len(set(ids)) != len(ids):
            raise ValueError(f"{path}: an id is used twice")
        if self.decode(self.encode_ordinary(SAMPLE)) != SAMPLE:
            raise ValueError(f"{path}: not a byte-level tokenizer: it does not give {SAMPLE!r} back")

    def encode_single_token(self, name: str) -> int:
        return self.file.token_to_id(name)

    def encode_ordinary(self, text: str) -> list[int]:
        return self.file.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.file.decode(ids, skip_special_tokens=False)


def load_encoding(path: str | Path) -> tiktoken.Encoding | PublishedEncoding:
    """The tokenizer from a file written by `write_ranks`, or from a tokenizer.json in the same folder.

    `n_vocab` is the size of the embedding, `eot_token` the end and padding token. Raises: like the two readers above.
    """
    published = Path(path).with_name(PUBLISHED)
    if published.is_file():
        return PublishedEncoding(published)
    ranks = read_ranks(path)
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("robomamba", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def write_encoding(folder: Path, encoding: tiktoken.Encoding | PublishedEncoding) -> None:
    """Write one of FILES into a folder."""
    if isinstance(encoding, PublishedEncoding):
        write_text(folder / PUBLISHED, encoding.file.to_str(pretty=True))
    else:
        write_ranks(folder / RANKS, encoding._mergeable_ranks)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit('usage: python -m data.tokenizer "some text" [vocabulary file]')
    shown = load_encoding(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).with_name("vocab.tiktoken"))
    for token_id in shown.encode_ordinary(sys.argv[1]):
        print(f"{token_id:6d}  {shown.decode([token_id])!r}")
