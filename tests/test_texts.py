"Texts are computed no further than they reach, in every job, with the same result"

import io
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import lines_of, tiny_job, train_watched
from transformers import BertConfig, BertModel

from vlkd_lab import models, trainers
from vlkd_lab.features import Batch, Texts
from vlkd_lab.models import encode_texts, train_tokenizer
from vlkd_lab.trainers import Learner, open_job, train

JOBS = {
    "TinyCLIP": dict(inheritance="manual", stages=1),
    "TinyCLIP with gates": dict(inheritance="auto", stages=1, gate_share=0.5),
    "Distil": dict(losses="affinity_mimicking=1, contrastive=1, feature_mimicking=1"),
    "Distil from a store": dict(teacher_features="stored"),
    "Distil in parts": dict(micro_batch=3),
    "Distil with two readers": dict(workers=2),
    "Distil that recomputes": dict(checkpoint_activations=True),
    "Distil in bf16": dict(precision="bf16"),
    "ClipCid": dict(clusters=4, map_images=8),
    "DimeFm": dict(sentence_batch=12),
    "Contrastive": dict(image_size=32, vocabulary=300, context_length=24),
}


@pytest.fixture(scope="module")
def short_captions(scenes, tmp_path_factory):
    "The scenes, with captions of three to thirteen letters"
    folder = tmp_path_factory.mktemp("short")
    for shard in Path(scenes).glob("*.tar"):
        with tarfile.open(shard) as old, tarfile.open(folder / shard.name, "w") as new:
            for number, member in enumerate(old):
                content = old.extractfile(member).read()
                if member.name.endswith(".txt"):
                    content = content[: 3 + 2 * (number % 6)]
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def computed(monkeypatch):
    "Places of texts that were computed part by part, and how many these texts have"
    counts = {"computed": 0, "of": 0}
    encode = models.vlm._encode_short

    def counting(model, ids):
        counts["computed"] += ids.numel()
        counts["of"] += len(ids) * len(getattr(model, "text", model).positional_embedding)
        return encode(model, ids)

    monkeypatch.setattr(models.vlm, "_encode_short", counting)
    return counts


@pytest.mark.parametrize("name", JOBS)
def test_a_job_computes_less_and_learns_the_same(name, short_captions, tiny_teacher, tmp_path, monkeypatch, computed):
    method = name.split()[0]
    given = dict(batch_size=16, steps=3) | JOBS[name]
    train(open_job(method, tiny_job(short_captions, tiny_teacher, tmp_path / "short", method, **given)))
    assert 0 < computed["computed"] < 0.8 * computed["of"]
    monkeypatch.setattr(models.vlm, "_reads_to_its_end", lambda model: False)
    before = computed["computed"]
    train(open_job(method, tiny_job(short_captions, tiny_teacher, tmp_path / "whole", method, **given)))
    assert computed["computed"] == before
    lines = zip(lines_of(tmp_path / "short"), lines_of(tmp_path / "whole"), strict=True)
    if "gates" in name:  # their first update has the sign of gradients that are rounding alone, at a high rate
        lines = [next(lines)]
    loose = dict(rel=0.05, abs=1e-2) if "bf16" in name else dict(rel=1e-3, abs=1e-5)
    for short, whole in lines:
        for key, value in whole.items():
            assert short[key] == (pytest.approx(value, **loose) if isinstance(value, float) else value), key


def test_a_step_computes_no_place_that_changes_nothing(tiny_teacher):
    "Ninety-six texts of 3 to 18 of 24 places"
    vlm = models.load_model(tiny_teacher, "cpu")
    ids = torch.zeros(96, 24, dtype=torch.long)
    end = len(vlm.model.token_embedding.weight) - 1
    for row in range(96):
        ids[row, : 3 + row % 16] = torch.randint(1, end, (3 + row % 16,))
        ids[row, 2 + row % 16] = end
    sizes = []
    block = vlm.model.transformer.resblocks[0]
    watching = block.register_forward_hook(lambda block, inputs, output: sizes.append(tuple(output.shape[:2])))
    batch = Batch(torch.zeros(0, 3, 32, 32), Texts.of(ids))
    with torch.no_grad():
        rows = vlm.encode_text(batch.texts)
        assert sizes == [(32, 8), (32, 13), (32, 18)]
        torch.testing.assert_close(rows, vlm.encode_text(ids), rtol=1e-5, atol=1e-6)
    watching.remove()
    assert sizes[3:] == [(96, 24)]


def test_a_forward_pass_of_ones_own_gets_token_ids():
    class Own(Learner):
        def forward(self, image, text, draw=None):
            assert isinstance(text, torch.Tensor)
            return super().forward(image, text, draw)

    class Heir(Learner):
        pass

    class Knowing(Learner):
        takes_texts = True

        def forward(self, image, text, draw=None):
            return super().forward(image, text, draw)

    assert (Own.takes_texts, Heir.takes_texts, Knowing.takes_texts, Learner.takes_texts) == (False, True, True, True)


def test_towers_that_read_all_places_compute_them_all(monkeypatch):
    "SigLIP's reads without a mask, CoCa's has a token of its own behind the text; both are computed as open_clip does"
    text = dict(context_length=12, vocab_size=400, width=32, heads=2, layers=1)
    vision = dict(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
    kinds = {
        "siglip": text | dict(no_causal_mask=True, pool_type="last", proj_bias=True),
        "own token": text | dict(embed_cls=True, output_tokens=False),
        "first": text | dict(pool_type="first"),
    }
    ids = torch.randint(1, 300, (8, 12))
    ids[:, 5:] = 0
    ids[:, 4] = 399
    for name, text_cfg in kinds.items():
        torch.manual_seed(0)
        model = open_clip.model.CustomTextCLIP(16, vision, text_cfg)
        monkeypatch.setattr(models.vlm, "_encode_short", None)  # nothing may call it
        with torch.no_grad():
            assert torch.equal(encode_texts(model, Texts.of(ids)), model.encode_text(ids, normalize=True)), name


def hugging(folder, **changes):
    "A model whose text tower is a small BERT of transformers, with words that are filled up with 0"
    train_tokenizer(["a red star", "a large blue house on the grass"] * 9, folder, 300, 24)
    sizes = dict(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32)
    BertModel(BertConfig(**sizes | changes)).save_pretrained(folder)
    vision = dict(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
    return models.with_towers(dict(embed_dim=16, vision_cfg=vision, text_cfg={}), text=folder, context_length=24)


@pytest.mark.parametrize("padding", [0, 7])
def test_a_tower_of_transformers_leaves_out_what_its_mask_hides(tmp_path, padding):
    "Where its mask hides another id than its tokenizer fills up with, every place counts"
    vlm = hugging(tmp_path, pad_token_id=padding)
    vlm.model.eval()
    texts = Texts.read(["a red star" + " red" * (row % 8) for row in range(96)], vlm.tokenizer)
    assert texts.pad == 0 and max(texts.ends) < 24
    sizes = []
    watching = vlm.model.text.transformer.encoder.layer[0].register_forward_hook(
        lambda block, inputs, output: sizes.append(tuple(inputs[0].shape[:2]))
    )
    with torch.no_grad():
        rows = vlm.encode_text(texts)
        watching.remove()
        torch.testing.assert_close(rows, vlm.encode_text(texts.ids), rtol=1e-5, atol=1e-6)
    ends = sorted(texts.ends)
    assert sizes == ([(96, 24)] if padding else [(32, ends[31]), (32, ends[63]), (32, ends[95])])


def test_a_compiled_tower_is_not_compiled_for_every_length(tiny_teacher):
    vlm = models.load_model(tiny_teacher, "cpu")
    ids = vlm.tokenizer(["a red star", "a blue house on the grass", "a"] * 20)
    assert models.vlm._reads_to_its_end(vlm.model)
    vlm.model.transformer.compile(backend="eager")
    assert not models.vlm._reads_to_its_end(vlm.model)
    torch.testing.assert_close(encode_texts(vlm.model, Texts.of(ids)), vlm.model.encode_text(ids, normalize=True))


def test_a_teacher_is_asked_only_while_a_term_needs_it(short_captions, tiny_teacher, tmp_path, monkeypatch):
    "In its first step, for the width of its rows; then when a weight that somebody has raised needs it"
    ask, asked = trainers.learner.ask, []
    monkeypatch.setattr(trainers.learner, "ask", lambda teacher, batch: (asked.append(1), ask(teacher, batch))[1])
    given = dict(batch_size=16, steps=5, losses="contrastive=1, affinity_mimicking=0")
    job = open_job("Distil", tiny_job(short_captions, tiny_teacher, tmp_path / "run", "Distil", **given))
    before = []

    def watched(step, loop, batch):
        before.append(len(asked))
        if loop.step == 2:
            job.run.control(weights={"affinity_mimicking": 1.0})
        return step(loop, batch)

    train_watched(job, watched)
    counts = [later - earlier for earlier, later in zip(before, [*before[1:], len(asked)], strict=True)]
    assert counts == [2, 0, 0, 2, 1], "twice where an objective is new, to find which weights it reaches"
    assert ["affinity_mimicking" in line for line in job.run.metrics() if "total" in line] == [False, False, False, True, True]


def test_a_filling_that_is_the_largest_id_costs_no_text_its_end(tiny_teacher, tmp_path):
    "As where somebody has added [PAD] to a tokenizer that had none: the tower looks for the largest id"
    config = models.load_model(tiny_teacher, "cpu").config["model_cfg"]
    words = train_tokenizer(["a red star", "a large blue house on the grass"] * 9, tmp_path, 290, 24)
    vlm = models.new_model(config | dict(text_cfg=config["text_cfg"] | dict(vocab_size=400)), tokenizer=words)
    words.tokenizer.add_special_tokens({"pad_token": "[LAST]"})
    texts = Texts.read(["a red star", "a large blue house on the grass"] * 40 + ["red"] * 16, words)
    assert texts.pad == int(texts.ids.max()) == len(words.tokenizer) - 1
    with torch.no_grad():
        torch.testing.assert_close(vlm.encode_text(texts), vlm.encode_text(texts.ids), rtol=1e-5, atol=1e-6)
