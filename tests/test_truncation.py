"What share of captions a tokenizer cuts: asked of the tokenizer itself"

import io
import tarfile

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from vlkd_lab.data import inspect_shards, shard_captions, truncated_share
from vlkd_lab.fusion import train_wordpiece
from vlkd_lab.models import train_tokenizer

WORDS = "a small red star left of a large blue house on the grass number"


def shards(folder, captions, each=50, pictures=b""):
    for start in range(0, len(captions), each):
        with tarfile.open(folder / f"{start:06d}.tar", "w") as tar:
            for k, caption in enumerate(captions[start : start + each]):
                for name, content in ((f"{k:04d}.jpg", pictures), (f"{k:04d}.txt", caption.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return inspect_shards(folder, cache=False, progress=False)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    texts = [WORDS, *(str(k) for k in range(100))] * 3
    own = train_tokenizer(texts, folder / "own", 400, 24)
    blip = train_wordpiece(texts, folder / "blip", 200, 24)
    return {"open_clip": SimpleTokenizer(context_length=24), "Hugging Face": own, "BLIP": blip}


@pytest.mark.parametrize("name", ["open_clip", "Hugging Face", "BLIP"])
def test_captions_that_differ_only_at_their_ends_are_found(tmp_path, tokenizers, name):
    tokenizer = tokenizers[name]
    ends = [f"{WORDS} {WORDS} {k}" for k in range(60)]
    report = shards(tmp_path, [*ends, *(f"a star {k}" for k in range(60))])
    found = truncated_share(report, tokenizer)
    assert (found.captions, found.cut, found.alike, found.length, found.certain) == (120, 60, 60, 24, True)
    assert str(found) == ("50.0% of 120 captions are longer than the model's 24 tokens and lose their ends; "
                          "60 of them are trained as the same text as another")  # fmt: skip
    assert "\n" not in str(found) and found.share == 0.5
    unasked = truncated_share(report, lambda texts: tokenizer(texts))
    assert (unasked.cut, unasked.alike, unasked.certain) == (60, 60, False) and "fill, or do not fit into," in str(unasked)


@pytest.mark.parametrize("name", ["open_clip", "Hugging Face", "BLIP"])
def test_a_caption_that_just_fits_is_not_cut(tmp_path, tokenizers, name):
    tokenizer, words = tokenizers[name], []
    pad = tokenizer([""])[0, -1]
    while tokenizer([" ".join(words)])[0, -1] == pad:
        words.append("star")
    full, longer = " ".join(words), " ".join([*words, "star"])
    for captions, cut in (([full, "star"], 0), ([longer, "star"], 1), ([full, longer], 1)):
        folder = tmp_path / f"{cut}{len(captions[0])}{len(captions[1])}"
        folder.mkdir()
        found = truncated_share(shards(folder, captions), tokenizer)
        assert (found.cut if found else 0) == cut, captions


def test_nothing_to_say(tmp_path, tokenizers):
    report = shards(tmp_path, ["a star"] * 9)
    assert truncated_share(report, None) is None and truncated_share(report, tokenizers["open_clip"]) is None
    assert truncated_share(report, lambda texts: torch.zeros(len(texts), 5, dtype=torch.long)) is None


def test_a_padding_that_is_the_end_mark_hides_nothing(tmp_path):
    plain = SimpleTokenizer(context_length=8)

    def padded(texts, context_length=None):
        tokens = plain(texts, context_length)
        return tokens.masked_fill(tokens == 0, plain.eot_token_id)

    words = "one two three four five six seven eight".split()
    report = shards(tmp_path, [" ".join(words[:count]) for count in (6, 7, 8)])
    assert truncated_share(report, padded).cut == 2


def test_all_captions_of_a_sample_from_several_shards_up_to_a_limit_without_pictures(tmp_path, tokenizers):
    captions = [f"{WORDS} {WORDS} {k}\na star {k}" for k in range(1000)]
    report = shards(tmp_path, captions, each=50, pictures=bytes(20_000))
    found = truncated_share(report, tokenizers["open_clip"], limit=400)
    assert (found.captions, found.cut) == (400, 200)
    assert len(list(shard_captions(report.shards[0].path))) == 100 and len(list(shard_captions(report.shards[0].path, most=10))) == 10
    assert truncated_share(report, tokenizers["open_clip"], limit=5).captions == 5
