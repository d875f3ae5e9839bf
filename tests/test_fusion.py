"""BLIP: published checkpoints in and out, equal to transformers'; sharing, padding, inheritance."""

import json
import math
import shutil
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlkd_lab import fusion
from vlkd_lab.blip_losses import language_modelling
from vlkd_lab.data import PairStream, View, asked_questions, load_pairs, read_once
from vlkd_lab.features import Batch
from vlkd_lab.fusion import (
    BlipShape,
    answer,
    blip_cost,
    export_blip,
    forward_batch,
    fused_batch,
    inherit_blip,
    is_blip,
    load_blip,
    new_blip,
    plan_blip,
    save_blip,
    shape_parameters,
    shrunk,
    student_shape,
    train_wordpiece,
    trimmed,
    write_captions,
)
from vlkd_lab.inheritance import Plan
from vlkd_lab.models import load_model
from vlkd_lab.trainers import find_model

WORDS = "a red blue star boat fish on the grass at sea two small large what colour is it ? yes no picture of".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMES = {"retrieval": "BlipForImageTextRetrieval", "captioning": "BlipForConditionalGeneration", "answering": "BlipForQuestionAnswering"}
TEXTS = ["a red star on the grass", "two small boat at sea", "a fish"]
QUESTIONS = ["what colour is the small red star on the grass ?", "is it red ?"]


def published_config(kind, width=32):
    "config.json as the hub's repositories hold it: written by transformers of 2022, with what it wrote beside the sizes"
    every = {"_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None, "chunk_size_feed_forward": 0}
    every |= {"cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False}
    every |= {
        "early_stopping": False,
        "encoder_no_repeat_ngram_size": 0,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_encoder_decoder": False,
    }
    every |= {"label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0, "num_beams": 1}
    every |= {"num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "prefix": None, "pruned_heads": {}}
    every |= {
        "remove_invalid_values": False,
        "repetition_penalty": 1.0,
        "return_dict": True,
        "return_dict_in_generate": False,
        "sep_token_id": None,
    }
    every |= {"temperature": 1.0, "tie_encoder_decoder": False, "tie_word_embeddings": True, "top_k": 50, "top_p": 1.0, "torch_dtype": None}
    every |= {"torchscript": False, "transformers_version": "4.26.0.dev0", "typical_p": 1.0, "use_bfloat16": False, "eos_token_id": None}
    every |= {"initializer_factor": 1.0, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "initializer_range": 0.02}
    text = every | {
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": vocabulary() - 2,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sep_token_id": 3,
    }
    text |= {"encoder_hidden_size": 32, "hidden_dropout_prob": 0.0, "hidden_size": width, "intermediate_size": 40, "is_decoder": True}
    text |= {
        "max_position_embeddings": 48,
        "model_type": "blip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 768,
    }
    text |= {"use_cache": True, "vocab_size": vocabulary()}
    vision = every | {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_size": 32,
        "image_size": 32,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-5,
    }
    vision |= {
        "model_type": "blip_vision_model",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 8,
        "projection_dim": 512,
    }
    whole = {
        "_commit_hash": None,
        "architectures": [NAMES[kind]],
        "image_text_hidden_size": 16,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    }
    whole |= {
        "logit_scale_init_value": 2.6592,
        "model_type": "blip",
        "projection_dim": 512,
        "torch_dtype": "float32",
        "transformers_version": None,
    }
    return whole | {"text_config": text, "text_config_dict": None, "vision_config": vision, "vision_config_dict": None}


def vocabulary():
    return len(SPECIAL) + len(WORDS) + 2


def write_words(folder):
    "The tokenizer's files as the hub's repositories hold them; the vocabulary lacks [DEC] and [ENC]"
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    special = dict(cls_token="[CLS]", mask_token="[MASK]", pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    said = special | dict(
        do_basic_tokenize=True, do_lower_case=True, model_max_length=512, never_split=None, processor_class="BlipProcessor"
    )
    said |= dict(
        strip_accents=None, tokenize_chinese_chars=True, tokenizer_class="BertTokenizer", model_input_names=["input_ids", "attention_mask"]
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    eyes = dict(
        do_normalize=True, do_rescale=True, do_resize=True, image_processor_type="BlipImageProcessor", resample=3, rescale_factor=1 / 255
    )
    eyes |= dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
    eyes |= dict(processor_class="BlipProcessor", size={"height": 32, "width": 32}, size_divisor=32, do_pad=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(eyes))


def stirred(model, seed=0, spread=0.2):
    "No parameter at its initial value, so that each of them counts"
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=chance))
    return model.eval()


def published(folder, kind, form="bin", width=32, seed=0):
    "A small random checkpoint in the hub's form, and the model of transformers that it holds"
    import transformers

    plain = published_config(kind, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, NAMES[kind])(transformers.BlipConfig.from_dict(deepcopy(plain)))
    stirred(model, seed)
    write_words(folder)
    if form == "safetensors":
        model.save_pretrained(folder)
    else:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state |= {
            f"{n}.position_ids": torch.arange(48)[None]
            for n in ("text_encoder.embeddings", "text_decoder.bert.embeddings")
            if f"{n}.LayerNorm.weight" in state
        }
        torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(plain))
    return model


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return train_wordpiece([*TEXTS, *QUESTIONS, "large blue yes no"] * 3, tmp_path_factory.mktemp("words"), 90, 16)


SHAPES = {
    "equal": BlipShape(2, 32, 4, 2, 32, 4, 2, 2, 64, 48, 32, 8, positions=32, joint_width=16),
    "unequal_widths": BlipShape(2, 48, 3, 2, 24, 2, 2, 2, 64, 48, 32, 8, positions=32, joint_width=16),
    "shallow_decoder": BlipShape(1, 32, 2, 3, 24, 2, 3, 1, 64, 48, 32, 8, positions=32, joint_width=16),
    "deep_decoder": BlipShape(1, 24, 2, 2, 24, 3, 2, 5, 64, 48, 32, 8, positions=32, joint_width=16),
    "few_fusion_layers": BlipShape(1, 32, 2, 4, 24, 2, 1, 3, 64, 48, 32, 16, positions=32, joint_width=16),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def fresh(shape, words, seed=0, **given):
    made = new_blip(shape, words, seed=seed, **given)
    stirred(made.model, seed)
    return made


def everything(blip, pictures, texts=TEXTS):
    "All outputs of a BLIP with all parts, of three pictures"
    step = step_of(blip, pictures, texts)
    with torch.no_grad():
        seen = forward_batch(blip.model, step, blip.tokenizer, tasks=blip.tasks, maps=True)
    made = {name: run.states[run.mask] for name, run in seen.passes.items()}
    made |= {f"{name} logits": run.logits for name, run in seen.passes.items() if run.logits is not None and name == "pairs"}
    return made | {"image rows": seen.image, "text rows": seen.text}


def step_of(blip, pictures, texts=TEXTS):
    asked = tuple(((QUESTIONS[row % 2], "red", "colour"),) for row in range(len(texts)))
    batch = Batch(pictures, blip.tokenizer(list(texts)), keys=tuple(map(str, range(len(texts)))), captions=tuple(texts), questions=asked)
    return fused_batch(batch, blip.tokenizer, seed=0)


def with_start_token(tokens, first):
    tokens = tokens.clone()
    tokens[:, 0] = first
    return tokens


# Published checkpoints

forms = pytest.mark.parametrize("form", ["bin", "safetensors"])


@forms
def test_a_retrieval_checkpoint_scores_as_transformers_does(form, tmp_path, pictures):
    theirs = published(tmp_path, "retrieval", form)
    ours = load_blip(tmp_path, device="cpu")
    assert ours.tasks == ("retrieval", "matching") and ours.shape.fusion_layers == 2 and not ours.model.training
    assert (ours.tokenizer.dec, ours.tokenizer.enc) == (vocabulary() - 2, vocabulary() - 1) and ours.tokenizer.sep == 3
    tokens, mask = trimmed(ours.tokenizer(TEXTS), ours.tokenizer.pad)
    assert not mask.all()
    with torch.no_grad():
        cosines = theirs(tokens, pictures, attention_mask=mask.long(), use_itm_head=False).itm_score
        assert torch.allclose(ours.model.encode_image(pictures) @ ours.model.encode_text(ours.tokenizer(TEXTS)).T, cosines, atol=1e-5)
        image = ours.model.run_image(pictures).states
        for first in (ours.tokenizer.cls, ours.tokenizer.enc):
            mine = ours.model.match(ours.model.run_text(with_start_token(tokens, first), mask, image)).logits
            assert torch.allclose(mine, theirs(with_start_token(tokens, first), pictures, attention_mask=mask.long()).itm_score, atol=1e-5)
        left = theirs(tokens, pictures, attention_mask=mask.long()).itm_score
        paired = forward_batch(ours.model, step_of(ours, pictures), ours.tokenizer, tasks=ours.tasks).passes["pairs"].logits[:3]
    assert torch.allclose(paired, mine, atol=1e-5) and not torch.allclose(paired, left, atol=1e-3), "[ENC] stands first, not [CLS]"


@forms
@pytest.mark.parametrize("width", [32, 24], ids=["as_wide", "narrower_text"])
def test_a_captioning_checkpoint_writes_as_transformers_does(form, width, tmp_path, pictures):
    theirs = published(tmp_path, "captioning", form, width, seed=2)
    ours = load_blip(tmp_path, device="cpu")
    assert ours.tasks == ("captioning",) and ours.shape.text_width == width
    tokens, mask = trimmed(ours.tokenizer(TEXTS), ours.tokenizer.pad)
    tokens = with_start_token(tokens, ours.tokenizer.dec)
    with torch.no_grad():
        out = theirs(pictures, tokens, attention_mask=mask.long(), labels=tokens.masked_fill(~mask, -100))
        mine = ours.model.run_decoder(tokens, mask, ours.model.run_image(pictures).states)
        assert torch.allclose(mine.logits[mask], out.logits[mask], atol=1e-4)
        assert torch.allclose(language_modelling(mine.logits, mine.targets, smoothing=0.0), out.loss, atol=1e-4)
        for beams in (1, 3):
            said = theirs.generate(pictures, num_beams=beams, max_new_tokens=8, do_sample=False)
            assert write_captions(ours, pictures, beams, longest=8) == ours.tokenizer.decode(said)
        asked = ours.tokenizer.tokenizer(["a picture of"] * 3, return_tensors="pt")
        said = theirs.generate(pictures, asked.input_ids, asked.attention_mask, num_beams=3, max_new_tokens=6, do_sample=False)
    captions = write_captions(ours, pictures, 3, longest=6, prompt="a picture of ")
    assert captions == ours.tokenizer.decode(said) and all(text.startswith("a picture of") for text in captions)
    assert len(set(write_captions(ours, 3 * pictures, 3, longest=8))) > 1, "the picture matters"


@forms
def test_a_checkpoint_for_questions_answers_as_transformers_does_but_for_the_padding(form, tmp_path, pictures):
    theirs = published(tmp_path, "answering", form, seed=4)
    ours = load_blip(tmp_path, device="cpu")
    assert ours.tasks == ("answering",) and not ours.model.shared
    words, asked = ours.tokenizer, ours.tokenizer.tokenizer
    for picture in pictures.split(1):
        for question in QUESTIONS:
            tokens = with_start_token(asked([question], return_tensors="pt").input_ids, words.enc)
            said = theirs.generate(tokens, picture, attention_mask=torch.ones_like(tokens), num_beams=3, max_new_tokens=5, do_sample=False)
            assert answer(ours, picture, [question], beams=3, longest=5) == words.decode(said)
    tokens, mask = trimmed(words(QUESTIONS), words.pad)
    tokens = with_start_token(tokens, words.enc)
    with torch.no_grad():
        seen = ours.model.run_text(tokens, mask, ours.model.run_image(pictures[:2]).states)
        said = theirs.generate(tokens, pictures[:2], attention_mask=mask.long(), num_beams=3, max_new_tokens=5, do_sample=False)
        assert fusion.generate(ours, ours.model.question_states(seen), None, 3, 5) == words.decode(said), "the same fault, imitated"
        labels = torch.tensor([[words.dec, 6, 3], [words.dec, 7, 3]])
        loss = theirs(tokens, pictures[:2], attention_mask=mask.long(), labels=labels).loss
        for across in (mask, torch.ones_like(mask)):
            mine = ours.model.run_decoder(labels, torch.ones_like(labels).bool(), ours.model.question_states(seen), across)
            value = language_modelling(mine.logits, mine.targets, smoothing=0.0)
            heeded = bool(across.all())
            assert torch.allclose(value, loss, atol=1e-4) == heeded, "transformers looks at what stands behind a question"


def test_the_padding_of_questions_changes_what_transformers_answers(tmp_path, pictures):
    "The fault that is mended: if it is gone from transformers, the hook can go too"
    theirs = published(tmp_path, "answering", seed=4)
    layer = theirs.text_decoder.bert.encoder.layer[0].crossattention.self
    seen = {}
    layer.register_forward_pre_hook(lambda module, args, given: seen.update(given), with_kwargs=True)
    tokens = torch.tensor([[2, 6, 7, 3, 0]])
    theirs(tokens, pictures[:1], attention_mask=(tokens != 0).long(), labels=torch.tensor([[5, 6, 3]]))
    assert seen.get("encoder_attention_mask") is None and seen["attention_mask"] is not None


def test_pictures_are_seen_as_blips_processor_sees_them(tmp_path):
    from transformers import AutoImageProcessor

    published(tmp_path, "retrieval")
    said = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])))
    noise = torch.randint(0, 255, (5, 7, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy()).resize((70, 50), Image.BICUBIC)
    expected = torch.as_tensor(AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt").pixel_values)[0]
    mine = load_blip(tmp_path, device="cpu").preprocess(picture)
    assert mine.shape == expected.shape and (mine - expected).abs().max() < 0.05


def test_a_words_head_of_its_own_survives_loading_and_saving(tmp_path, pictures):
    published(tmp_path / "hub", "captioning")
    name = "text_decoder.cls.predictions.decoder.weight"
    state = torch.load(tmp_path / "hub" / "pytorch_model.bin")
    state[name] = state[name] + 0.5 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(0))
    torch.save(state, tmp_path / "hub" / "pytorch_model.bin")
    ours = load_blip(tmp_path / "hub", device="cpu")
    again = load_blip(save_blip(ours, tmp_path / "own"), device="cpu")
    for blip in (ours, again):
        held = blip.model.state_dict()
        assert torch.equal(held[name], state[name])
        assert torch.equal(
            held["text_decoder.bert.embeddings.word_embeddings.weight"], state["text_decoder.bert.embeddings.word_embeddings.weight"]
        )


@pytest.mark.parametrize("kind", NAMES)
def test_a_published_checkpoint_saved_as_our_own_stays_the_same(kind, tmp_path, pictures):
    published(tmp_path / "hub", kind)
    ours = load_blip(tmp_path / "hub", device="cpu")
    again = load_blip(save_blip(ours, tmp_path / "own"), device="cpu")
    assert again.tasks == ours.tasks and again.shape == ours.shape and again.model.shared == ours.model.shared
    a, b = ours.model.state_dict(), again.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(again.tokenizer(TEXTS), ours.tokenizer(TEXTS)) and again.tokenizer.enc == ours.tokenizer.enc
    assert again.config["preprocess_cfg"] == ours.config["preprocess_cfg"]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_runs(tmp_path):
    published(tmp_path, "captioning")
    state = torch.load(tmp_path / "pytorch_model.bin")
    torch.save(state | {"trap": Trap(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_blip(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


def spoilt(folder, change):
    state = torch.load(folder / "pytorch_model.bin")
    change(state)
    torch.save(state, folder / "pytorch_model.bin")


def test_weights_that_do_not_fit_are_named(tmp_path):
    published(tmp_path, "retrieval")
    spoilt(tmp_path, lambda state: state.pop("itm_head.bias"))
    with pytest.raises(ValueError, match="1 are missing .itm_head.bias"):
        load_blip(tmp_path, device="cpu")
    spoilt(tmp_path, lambda state: state.update({"itm_head.bias": torch.zeros(2), "text_pooler.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match="1 have no place .text_pooler.weight"):
        load_blip(tmp_path, device="cpu")


def test_weights_of_another_size_are_named(tmp_path):
    published(tmp_path, "retrieval")
    spoilt(tmp_path, lambda state: state.update({"itm_head.bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match="itm_head.bias"):
        load_blip(tmp_path, device="cpu")


def test_folders_that_hold_no_blip_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_blip(tmp_path)
    write_words(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(published_config("retrieval")))
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        load_blip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="of type 'bert'"):
        load_blip(tmp_path)


def test_two_towers_without_a_task_are_no_blip_for_this_page(tmp_path):
    import transformers

    write_words(tmp_path)
    transformers.BlipModel(transformers.BlipConfig.from_dict(published_config("retrieval"))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="text_model|no place"):
        load_blip(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["Salesforce/blip-not-there", "not a name"])
def test_what_neither_is_a_folder_nor_can_be_downloaded_is_named(name):
    with pytest.raises(FileNotFoundError, match=name):
        load_blip(name)


@forms
def test_a_name_on_the_hub_brings_weights_and_words_but_no_code(form, tmp_path, monkeypatch):
    import huggingface_hub

    published(tmp_path, "retrieval", form)
    given = {}
    monkeypatch.setattr(
        huggingface_hub, "list_repo_files", lambda name, **_: [p.name for p in tmp_path.iterdir()] + ["modeling.py", "tf_model.h5"]
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **rest: (given.update(name=name, **rest), str(tmp_path))[1])
    assert load_blip("Salesforce/blip-itm-tiny", device="cpu").name == "Salesforce/blip-itm-tiny"
    weights = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    from fnmatch import fnmatch

    fetched = {
        n
        for n in [*(p.name for p in tmp_path.iterdir()), "modeling.py", "tf_model.h5"]
        if any(fnmatch(n, p) for p in given["allow_patterns"])
    }
    assert given["name"] == "Salesforce/blip-itm-tiny" and {weights, "config.json", "vocab.txt", "tokenizer_config.json"} <= fetched
    assert not {"modeling.py", "tf_model.h5"} & fetched


def test_a_checkpoint_in_the_hubs_cache_opens_without_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    home = tmp_path / "models--Salesforce--blip-tiny"
    published(home / "snapshots" / ("0" * 40), "retrieval")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_blip("Salesforce/blip-tiny", device="cpu").tasks == ("retrieval", "matching")


# The way out


@pytest.mark.parametrize("task", NAMES)
def test_an_export_opens_in_transformers_and_says_the_same(task, tmp_path, words, pictures):
    import transformers

    blip = fresh(SHAPES["equal"], words)
    theirs = getattr(transformers, NAMES[task]).from_pretrained(export_blip(blip, tmp_path, task)).eval()
    tokens, mask = trimmed(words(TEXTS), words.pad)
    with torch.no_grad():
        image = blip.model.run_image(pictures).states
        if task == "retrieval":
            fused = blip.model.match(blip.model.run_text(with_start_token(tokens, words.enc), mask, image)).logits
            assert torch.allclose(theirs(with_start_token(tokens, words.enc), pictures, attention_mask=mask.long()).itm_score, fused, atol=1e-4)
            cosines = theirs(tokens, pictures, attention_mask=mask.long(), use_itm_head=False).itm_score
            assert torch.allclose(blip.model.encode_image(pictures) @ blip.model.encode_text(tokens).T, cosines, atol=1e-5)
        elif task == "captioning":
            tokens = with_start_token(tokens, words.dec)
            logits = theirs(pictures, tokens, attention_mask=mask.long()).logits[mask]
            assert torch.allclose(logits, blip.model.run_decoder(tokens, mask, image).logits[mask], atol=1e-4)
            assert words.decode(theirs.generate(pictures, num_beams=3, max_new_tokens=6)) == write_captions(blip, pictures, 3, 6)
        else:
            asked = with_start_token(words.tokenizer(QUESTIONS[:1], return_tensors="pt").input_ids, words.enc)
            said = theirs.generate(asked, pictures[:1], attention_mask=torch.ones_like(asked), num_beams=3, max_new_tokens=6)
            assert words.decode(said) == answer(blip, pictures[:1], QUESTIONS[:1], 3, 6)
    again = load_blip(tmp_path, device="cpu")
    assert task in again.tasks and again.tokenizer.context_length <= again.shape.positions
    assert torch.equal(trimmed(again.tokenizer(TEXTS), words.pad)[0], trimmed(words(TEXTS), words.pad)[0])


def test_what_transformers_cannot_say_is_refused(tmp_path, words):
    for name, task in [("few_fusion_layers", "retrieval"), ("shallow_decoder", "answering"), ("unequal_widths", "answering")]:
        with pytest.raises(ValueError, match="one depth"):
            export_blip(fresh(SHAPES[name], words), tmp_path / "no", task)
        assert not (tmp_path / "no").exists(), "nothing is begun"
    with pytest.raises(ValueError, match="retrieval, captioning, answering"):
        export_blip(fresh(SHAPES["equal"], words), tmp_path / "no", "vqa")
    with pytest.raises(ValueError, match="captioning"):
        export_blip(fresh(SHAPES["equal"], words, tasks=("retrieval", "matching")), tmp_path / "no", "captioning")


@pytest.mark.parametrize("name", ["unequal_widths", "shallow_decoder", "deep_decoder", "few_fusion_layers"])
def test_a_decoder_of_any_depth_and_width_can_be_exported_for_captions(name, tmp_path, words, pictures):
    from transformers import BlipForConditionalGeneration

    blip = fresh(SHAPES[name], words)
    theirs = BlipForConditionalGeneration.from_pretrained(export_blip(blip, tmp_path, "captioning")).eval()
    tokens, mask = trimmed(with_start_token(words(TEXTS), words.dec), words.pad)
    with torch.no_grad():
        mine = blip.model.run_decoder(tokens, mask, blip.model.run_image(pictures).states).logits
        assert torch.allclose(theirs(pictures, tokens, attention_mask=mask.long()).logits[mask], mine[mask], atol=1e-4)


# Sharing and sizes


def shared_pairs(network):
    "Parameters that the decoder has from the encoder, by both names"
    named = list(network.named_parameters(remove_duplicate=False))
    first = {}
    for name, parameter in named:
        first.setdefault(id(parameter), name)
    return {(first[id(parameter)], name) for name, parameter in named if first[id(parameter)] != name}


@shapes
def test_what_is_shared_stays_shared(shape, words, pictures, tmp_path):
    blip = fresh(shape, words)
    before, outputs = shared_pairs(blip.model), everything(blip, pictures)
    layers = blip.model.text_decoder.bert.encoder.layer
    kinds = {".".join(name.split(".")[5:-1]) for _, name in before if ".encoder.layer." in name}
    assert {"intermediate.dense", "output.dense", "output.LayerNorm", "crossattention.self.query"} <= kinds
    assert not any(kind.startswith("attention") for kind in kinds), "self-attention is the decoder's own"
    assert len({id(p) for p in layers.parameters()} & {id(p) for p in blip.model.text_encoder.parameters()}) > 0
    others = [
        deepcopy(blip.model),
        load_blip(save_blip(blip, tmp_path), device="cpu").model,
        deepcopy(blip.model).to(torch.float64).to(torch.float32),
    ]
    empty = new_blip(shape, words, seed=9).model.eval()
    empty.load_state_dict(blip.model.state_dict())
    for other in [*others, empty]:
        assert shared_pairs(other) == before
        made = everything(replace(blip, model=other), pictures)
        assert all(torch.allclose(made[name], outputs[name], atol=1e-5) for name in outputs)


def block_macs(rows, width, neurons, looked_at=0, looked_at_width=0):
    "Multiply-accumulates of a transformer block: self-attention, cross-attention where there is any, MLP"
    itself = rows * 4 * width**2 + 2 * rows**2 * width + rows * 2 * width * neurons
    across = rows * 2 * width**2 + looked_at * 2 * looked_at_width * width + 2 * rows * looked_at * width
    return itself + (across if looked_at else 0)


@shapes
def test_multiply_accumulates_are_those_of_the_formulas(shape, words, pictures):
    blip, count, answer_count = fresh(shape, words), 8, 3
    shape = blip.shape
    wide, narrow, patches = shape.image_width, shape.text_width, (shape.image_size // shape.patch_size) ** 2
    seen = patches + 1
    image = patches * 3 * shape.patch_size**2 * wide + shape.image_layers * block_macs(seen, wide, shape.image_neurons)
    plain = block_macs(count, narrow, shape.text_neurons)
    fused = block_macs(count, narrow, shape.text_neurons, seen, wide)
    encoder = (shape.text_layers - shape.fusion_layers) * plain + shape.fusion_layers * fused
    macs = blip_cost(blip, words=count, answer=answer_count).macs
    text_projections = shape.text_layers * plain + narrow * shape.joint_width
    assert macs["retrieval"] == image + wide * shape.joint_width + text_projections
    assert macs["matching"] == image + encoder + 2 * narrow, "the head says yes or no"
    words_out = narrow * (narrow + shape.vocabulary)  # of one place: a dense layer, then the scores of all words
    assert macs["captioning"] == image + shape.decoder_layers * fused + count * words_out
    asked = count * narrow * wide if narrow != wide else 0  # the question's states, as wide as an image's
    decoder = shape.decoder_layers * block_macs(answer_count, narrow, shape.text_neurons, count, wide)
    assert macs["answering"] == image + encoder + asked + decoder + answer_count * words_out


@shapes
def test_every_parameter_is_counted_and_trained_once(shape, words, pictures):
    blip = fresh(shape, words)
    counted = sum(p.numel() for p in blip.model.parameters())
    assert sum(shape_parameters(blip.shape).values()) == counted == blip_cost(blip, words=8, answer=3).total
    assert blip_cost(blip, words=8, answer=3).parameters == shape_parameters(blip.shape)
    optimizer = torch.optim.SGD(blip.model.parameters(), lr=0.1)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == counted
    pairs = shared_pairs(blip.model)
    seen = forward_batch(blip.model, step_of(blip, pictures), words)
    caption, logits = seen.passes["caption"], [seen.passes[name].logits for name in ("pairs", "answer")]
    (language_modelling(caption.logits, caption.targets) + sum(made.std() for made in logits) + (seen.image @ seen.text.T).std()).backward()
    idle = [name for name, p in blip.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert set(idle) <= {"logit_scale"}, "every part takes part"
    optimizer.step()
    assert shared_pairs(blip.model) == pairs


@shapes
def test_any_sizes_write_and_answer(shape, words, pictures):
    blip = fresh(shape, words)
    assert len(write_captions(blip, pictures, beams=2, longest=5)) == 3
    together = answer(blip, pictures[:2], QUESTIONS, beams=2, longest=4)
    assert together == [answer(blip, pictures[k : k + 1], QUESTIONS[k : k + 1], beams=2, longest=4)[0] for k in (0, 1)]


def test_a_layer_before_the_fusion_does_not_look_and_those_behind_do(words, pictures):
    blip = fresh(SHAPES["few_fusion_layers"], words)
    tokens, mask = trimmed(words(TEXTS), words.pad)
    states = []
    for layer in blip.model.text_encoder.encoder.layer:
        layer.register_forward_hook(lambda module, args, out: states.append(out if torch.is_tensor(out) else out[0]))
    with torch.no_grad():
        seen = [blip.model.run_text(tokens, mask, blip.model.run_image(images).states) for images in (pictures, pictures.flip(0))]
    assert all(torch.equal(states[k], states[k + 4]) for k in range(3)) and not torch.allclose(states[3], states[7])
    assert not torch.allclose(seen[0].states, seen[1].states)


def test_fresh_weights_are_spread_as_in_blip(words):
    for name, weight in new_blip(SHAPES["equal"], words).model.named_parameters():
        if weight.ndim > 1 and "word_embeddings" not in name:
            assert 0.008 < weight.std() < 0.2, name
    a, b, c = (new_blip(SHAPES["equal"], words, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["itm_head.weight"], c["itm_head.weight"])


# Padding


@shapes
def test_what_stands_behind_a_text_changes_nothing(shape, words, pictures):
    blip = fresh(shape, words)
    network = blip.model
    tokens, mask = trimmed(words(TEXTS[:1]), words.pad)
    longer, seen = words(TEXTS[:1]), words(TEXTS[:1]) != words.pad
    noise = longer.masked_fill(~seen, 7)
    assert longer.shape[1] > tokens.shape[1]
    with torch.no_grad():
        image = network.run_image(pictures[:1]).states
        for other in (longer, noise):
            count = int(mask.sum())
            for run in (
                lambda t, m: network.run_text(t, m),
                lambda t, m: network.run_text(t, m, image),
                lambda t, m: network.run_decoder(t, m, image),
            ):
                assert torch.allclose(run(tokens, mask).states[:, :count], run(other, seen).states[:, :count], atol=1e-5)
            short, long = (network.question_states(network.run_text(t, m, image)) for t, m in ((tokens, mask), (other, seen)))
            a, b = network.run_decoder(tokens, mask, short, mask).logits, network.run_decoder(tokens, mask, long, seen).logits
            assert torch.allclose(a, b, atol=1e-5)
            assert fusion.generate(blip, short, mask, 3, 5) == fusion.generate(blip, long, seen, 3, 5)
    assert torch.allclose(network.encode_text(tokens), network.encode_text(longer), atol=1e-6)


def test_the_maps_of_every_pass_are_shares_and_keep_off_padding(words, pictures):
    blip = fresh(SHAPES["few_fusion_layers"], words)
    step = step_of(blip, pictures)
    with torch.no_grad():
        seen = forward_batch(blip.model, step, words, maps=True)
    depth = dict(image=(1, 0), text=(4, 0), pairs=(4, 1), question=(4, 1), caption=(3, 3), answer=(3, 3))
    for name, run in seen.passes.items():
        assert (len(run.attention), len(run.cross_attention)) == depth[name], name
        assert all(torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5) for maps in (*run.attention, *run.cross_attention))
    assert all((maps.transpose(1, 3)[~step.question_mask] == 0).all() for maps in seen.passes["question"].attention)
    assert all((maps.transpose(1, 3)[~step.question_mask] == 0).all() for maps in seen.passes["answer"].cross_attention)
    assert all(maps.triu(1).abs().max() == 0 for name in ("caption", "answer") for maps in seen.passes[name].attention)
    assert torch.equal(seen.passes["answer"].cross_attention_mask, step.question_mask) and seen.passes["caption"].cross_attention_mask is None


# What a step looks at


def test_a_step_pairs_pictures_texts_and_questions_rightly(words, pictures):
    blip, step = fresh(SHAPES["equal"], words), None
    asked = ((), (("is it red ?", "yes", "colour"),), (("what colour is it ?", "red", "colour"),))
    batch = Batch(pictures, words(TEXTS), keys=("x", "y", "z"), captions=tuple(TEXTS), questions=asked)
    step = fused_batch(batch, words, seed=1)
    assert step.asks.tolist() == [1, 2] and words.decode(step.answer) == ["yes", "red"]
    wrong = (torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0]))
    with torch.no_grad():
        seen = forward_batch(blip.model, step, words, negatives=wrong)
        image = blip.model.run_image(pictures).states
        tokens = with_start_token(step.text, words.enc)
        pairs = [(k, k) for k in range(3)] + [(k, int(wrong[0][k])) for k in range(3)] + [(int(wrong[1][k]), k) for k in range(3)]
        for row, (i, t) in enumerate(pairs):
            alone = blip.model.match(blip.model.run_text(tokens[t : t + 1], step.text_mask[t : t + 1], image[i : i + 1])).logits[0]
            assert torch.allclose(seen.passes["pairs"].logits[row], alone, atol=1e-5)
        assert seen.passes["pairs"].targets.tolist() == [1] * 3 + [0] * 6
        question = blip.model.run_text(with_start_token(step.question, words.enc), step.question_mask, image[1:])
        assert torch.allclose(seen.passes["question"].states, question.states, atol=1e-5)
    assert seen.passes["answer"].targets[0].tolist()[:2] == [int(step.answer[0, 1]), words.sep]


@pytest.mark.parametrize("asked", [(), ((), (), ())], ids=["not_read", "none"])
def test_without_questions_nothing_is_asked(asked, words, pictures):
    blip = fresh(SHAPES["equal"], words)
    step = fused_batch(Batch(pictures, words(TEXTS), keys=tuple("xyz"), captions=tuple(TEXTS), questions=asked), words, seed=0)
    seen = forward_batch(blip.model, step, words)
    assert len(step.asks) == 0
    for name in ("question", "answer"):
        assert len(seen.passes[name].states) == len(seen.passes[name].mask) == 0, "what comes of no question is no row"
    assert len(seen.passes["caption"].states) == 3


def test_one_pair_has_no_hard_negative_and_too_long_texts_are_cut(words, pictures):
    blip = fresh(SHAPES["equal"], words)
    step = step_of(blip, pictures[:1], ["a red star " * 30])
    assert step.text.shape[1] == words.context_length and step.text[0, -1] == words.sep
    with pytest.raises(ValueError, match="at least 2 pairs"):
        forward_batch(blip.model, step, words)
    assert forward_batch(blip.model, step, words, tasks=("captioning", "answering")).passes["answer"].logits.isfinite().all()


def test_lower_precision_runs_through_everything(words, pictures):
    blip = fresh(SHAPES["few_fusion_layers"], words)
    exact = everything(blip, pictures)
    rough = everything(replace(blip, model=deepcopy(blip.model).bfloat16()), pictures.bfloat16())
    assert all(made.isfinite().all() for made in rough.values())
    assert (rough["text"].float() - exact["text"]).norm() / exact["text"].norm() < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert write_captions(blip, pictures, longest=3) and answer(blip, pictures[:2], QUESTIONS, longest=3)


# Sizes by word and by share


@pytest.mark.parametrize(
    "sizes",
    ["image", "image:2", "image:2x16x3", "fusion:2x3", "picture:2x16", "text:2x-24", "image:2x20", "image:x16", "fusion:9", "fusion:0"],
)
def test_sizes_that_make_no_sense_are_refused(sizes):
    with pytest.raises(ValueError, match="is not valid"):
        student_shape(SHAPES["unequal_widths"], sizes)


def test_sizes_are_read_and_the_rest_is_the_teachers():
    shape = student_shape(SHAPES["few_fusion_layers"], " text : 2x12 , image:1x16, decoder:1 ", image_size=64)
    wanted = dict(text_layers=2, text_width=12, text_heads=1, text_neurons=24, image_width=16, image_heads=1, image_neurons=32)
    assert shape == replace(SHAPES["few_fusion_layers"], **wanted, decoder_layers=1, image_size=64)
    assert student_shape(shape, "") == shape
    assert student_shape(SHAPES["deep_decoder"], "image:1x12").decoder_layers == 5, "what is not named stays"
    assert student_shape(SHAPES["equal"], "fusion:1, text:2x8") == student_shape(SHAPES["equal"], "text:2x8, fusion:1")
    assert (
        student_shape(SHAPES["deep_decoder"], "text:1x8").decoder_layers == 1
        and student_shape(SHAPES["equal"], "text:1x8").fusion_layers == 1
    )


def test_a_share_of_the_parameters_is_met_by_every_module():
    base = BlipShape(6, 384, 6, 6, 384, 6, 6, 6, 1536, 1536, 64, 8, vocabulary=500, positions=32)
    whole = shape_parameters(base)
    assert shrunk(base, 1.0) == base
    for share in (0.75, 0.5, 0.22):
        small = shrunk(base, share)
        counted = shape_parameters(small)
        assert abs(sum(counted.values()) / sum(whole.values()) - share) < 0.03
        assert all(0.4 * share < counted[module] / whole[module] < 2.2 * share for module in whole)
        assert small.image_width // small.image_heads == small.text_width // small.text_heads == 64


# Inheritance


def slow_slice(name, weight, want, heads):
    "The leading part of a weight, by whole heads where query, key and value are one"
    if ".qkv." in name:
        thirds = []
        for third in weight.chunk(3):
            kept = [third[k * len(third) // heads[0] : (k + 1) * len(third) // heads[0]] for k in range(heads[1])]
            thirds.append(torch.cat(kept))
        weight = torch.cat(thirds)
    for axis, size in enumerate(want):
        weight = weight.narrow(axis, 0, size)
    return weight


@pytest.mark.parametrize("fusion_layers", [2, 3], ids=["as_deep", "fusion_in_more_layers_than_the_teacher"])
def test_a_student_gets_exactly_the_leading_parts_of_chosen_layers(fusion_layers, words):
    big = BlipShape(3, 48, 3, 4, 36, 3, 2, 3, 64, 72, 32, 8, positions=32, joint_width=16)
    teacher = fresh(big, words, seed=1)
    small = replace(big, image_layers=2, image_width=32, image_heads=2, image_neurons=40, text_layers=3, text_width=24, text_heads=2)
    student = fresh(replace(small, text_neurons=30, fusion_layers=fusion_layers, decoder_layers=2, joint_width=8), words, seed=2)
    kept, layers = teacher.model.state_dict(), {"image": (2, 0), "text": (0, 2, 3), "decoder": (0, 1)}
    before = {name: weight.clone() for name, weight in kept.items()}
    plan = plan_blip(teacher, student, layers)
    inherit_blip(teacher, student, plan)
    assert plan.layers == layers and Plan.from_json(plan.to_json()) == plan
    for name, weight in student.model.named_parameters():
        if "question_proj" in name:
            assert torch.equal(weight, kept[name][: weight.shape[0], : weight.shape[1]] if weight.ndim == 2 else kept[name][: len(weight)])
            continue
        parts = name.split(".")
        tower = "image" if parts[0].startswith("vision") else "decoder" if parts[0] == "text_decoder" else "text"
        at = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        if at is not None:
            parts[at] = str(layers[tower][int(parts[at])])
            if tower == "text" and "crossattention" in parts:
                parts[at] = str(max(int(parts[at]), 2))
        source = kept[".".join(parts)]
        assert torch.equal(weight, slow_slice(name, source, weight.shape, (3, 2))), name
    assert all(torch.equal(before[name], kept[name]) for name in kept), "the teacher is as it was"
    rows = plan.rows()
    assert [(row["tower"], row["source"]) for row in rows] == [(t, k) for t in ("image", "text", "decoder") for k in layers[t]]
    assert rows[0]["heads"] == (2, 3) and rows[2]["width"] == (24, 36) and rows[2]["neurons"] == (30, 72)


@shapes
def test_a_student_of_the_same_size_is_the_teacher(shape, words, pictures):
    teacher, student = fresh(shape, words, seed=1), fresh(shape, words, seed=2)
    inherit_blip(teacher, student, plan_blip(teacher, student))
    a, b = everything(teacher, pictures), everything(student, pictures)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(student.model.logit_scale, teacher.model.logit_scale)


def test_students_inherit_from_published_checkpoints(tmp_path, pictures):
    published(tmp_path, "captioning")
    teacher = load_blip(tmp_path, device="cpu")
    small = new_blip(student_shape(teacher.shape, "image:1x16,decoder:1"), teacher.tokenizer, like=teacher, tasks=("captioning",))
    inherit_blip(teacher, small, plan_blip(teacher, small))
    assert len(write_captions(small, pictures, longest=4)) == 3
    with pytest.raises(ValueError, match="teacher"):
        plan_blip(teacher, new_blip(teacher.shape, teacher.tokenizer, tasks=("retrieval", "matching")))


def test_image_positions_are_fitted_as_transformers_fits_them(words):
    teacher = fresh(SHAPES["equal"], words, seed=1)
    student = fresh(replace(SHAPES["equal"], image_size=48), words, seed=2)
    inherit_blip(teacher, student, plan_blip(teacher, student))
    eyes = teacher.model.vision_model.embeddings
    expected = eyes.interpolate_pos_encoding(torch.zeros(1, 37, 32), 48, 48)
    assert torch.allclose(student.model.vision_model.embeddings.position_embedding, expected, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [dict(image_heads=2), dict(text_heads=2), dict(image_layers=3), dict(text_width=48, text_heads=6), dict(patch_size=16)],
    ids=str,
)
def test_plans_that_cannot_be_are_refused(change, words):
    teacher, student = fresh(SHAPES["equal"], words), fresh(replace(SHAPES["equal"], **change), words)
    with pytest.raises(ValueError):
        plan_blip(teacher, student)


def test_a_plan_for_another_student_is_refused(words):
    teacher = fresh(SHAPES["few_fusion_layers"], words)
    students = [fresh(student_shape(teacher.shape, sizes), words) for sizes in ("text:2x24", "text:3x24", "text:2x12")]
    for planned in students:
        for other in students:
            if planned is not other:
                with pytest.raises(ValueError, match="plan"):
                    inherit_blip(teacher, other, plan_blip(teacher, planned))


@pytest.mark.parametrize(
    "towers", [("image",), ("text",), ("decoder",), ("image", "decoder"), ()], ids=lambda towers: "+".join(towers) or "none"
)
def test_only_the_towers_that_are_named_inherit(towers, words):
    teacher, student = fresh(SHAPES["unequal_widths"], words, 1), fresh(SHAPES["unequal_widths"], words, 2)
    before = {name: weight.clone() for name, weight in student.model.named_parameters()}
    inherit_blip(teacher, student, plan_blip(teacher, student, towers=towers))
    given = dict(teacher.model.named_parameters())
    for name, weight in student.model.named_parameters():
        tower = "image" if name.startswith("vision_") else "decoder" if name.startswith("text_decoder") else "text"
        if name != "logit_scale":
            assert torch.equal(weight, given[name] if tower in towers else before[name]), name


def test_a_misspelt_tower_is_refused(words):
    teacher = fresh(SHAPES["equal"], words)
    with pytest.raises(ValueError, match="vision"):
        plan_blip(teacher, fresh(SHAPES["equal"], words, 1), layers={"vision": (1, 0)})
    with pytest.raises(ValueError, match="vision"):
        plan_blip(teacher, fresh(SHAPES["equal"], words, 1), towers=("vision",))


# What is wrong is said at once


def test_pictures_of_another_size_are_refused(words):
    blip = fresh(SHAPES["equal"], words)
    for size in ((16, 16), (48, 48), (16, 64)):
        with pytest.raises(ValueError, match="32"):
            blip.model.encode_image(torch.zeros(1, 3, *size))


def test_writing_refuses_what_it_cannot_do(words, pictures):
    blip = fresh(SHAPES["equal"], words)
    with pytest.raises(ValueError, match="beams=0"):
        write_captions(blip, pictures, beams=0)
    with pytest.raises(ValueError, match="questions"):
        answer(blip, pictures, QUESTIONS)
    with pytest.raises(ValueError, match="longest"):
        write_captions(blip, pictures, longest=100)
    assert write_captions(blip, pictures[:0]) == [] == answer(blip, pictures[:0], [])
    with pytest.raises(ValueError, match="captioning"):
        write_captions(fresh(SHAPES["equal"], words, tasks=("retrieval", "matching")), pictures)


@pytest.mark.parametrize("tasks", [("fly",), ()], ids=["unknown", "none"])
def test_tasks_that_do_not_exist_are_refused(tasks, words):
    with pytest.raises(ValueError, match="retrieval, matching, captioning, answering"):
        new_blip(SHAPES["equal"], words, tasks=tasks)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, math.nan, 0.001])
def test_shares_that_cannot_be_met_are_refused(share):
    with pytest.raises(ValueError, match="share|nearest"):
        shrunk(SHAPES["equal"], share)


def test_special_tokens_written_in_a_caption_are_only_text(words):
    tokens = words(["a red [SEP] star [PAD] [DEC] [ENC]"])[0]
    assert (tokens == words.sep).sum() == 1 and words.dec not in tokens and words.enc not in tokens


def test_models_with_other_words_do_not_share_a_view(words, tmp_path):
    other = train_wordpiece(["zz qq ww vv xx"] * 9 + TEXTS * 3, tmp_path, len(words.tokenizer), 16)
    other.vocabulary = words.vocabulary
    a, b = fresh(SHAPES["equal"], words), fresh(SHAPES["equal"], other)
    assert a.same_view(a) and not a.same_view(b)


# Questions in the data


def asked(found):
    return asked_questions({"json": json.dumps({"questions": found}).encode()})


@pytest.mark.parametrize(
    "wrong", [3, "abc", ["a"], {"question": "q"}, {"answer": "a"}, ["q", "a", 1], ["q", None, "t"], ["", "a", "t"], ["q", ""]], ids=str
)
def test_what_is_no_question_is_left_out_and_the_others_stay(wrong):
    assert asked([["is it  red\u202e?", "yes", "colour"], wrong, ["where?", "here", ""]]) == (
        ("is it red ?", "yes", "colour"),
        ("where?", "here", ""),
    )


def test_a_question_needs_no_type_and_may_be_an_object():
    found = asked([["where?", "here"], {"answer": "yes", "question": "is it?", "id": 3}, {"question": "q", "answer": "a", "type": "t"}])
    assert found == (("where?", "here", "other"), ("is it?", "yes", "other"), ("q", "a", "t"))


@pytest.mark.parametrize(
    "json_", [b"", b"[]", b"3", b"{}", b'{"questions": "abc"}', b'{"questions": {"abc": 1}}', b'{"questions": null}', b"\xff"], ids=repr
)
def test_data_without_questions_has_none(json_):
    assert asked_questions({"json": json_}) == () == asked_questions({})


def test_every_reader_brings_the_same_questions(scenes, words):
    shards = str(scenes / "val-000000.tar")
    pairs, blip = load_pairs(shards), fresh(SHAPES["equal"], words)
    view, silent = View(blip.preprocess, words, questions=True), View(blip.preprocess, words)
    told = dict(zip(pairs.keys, pairs.questions, strict=True))
    assert len(told) == 48 and all(len(q) == 3 and all(q) for found in told.values() for q in found)
    part = pairs[[5, 3]]
    assert part.questions == (pairs.questions[5], pairs.questions[3]) and pairs[7:9].questions == pairs.questions[7:9]
    streams = [islice(PairStream(shards, view, 7, crop_scale=scale).batches(), 9) for scale in (1.0, 0.6)]
    for batches in (*streams, read_once(shards, view, 20), pairs.batches(view, 20)):
        for batch in batches:
            assert len(batch.questions) == len(batch) and all(
                told[key] == found for key, found in zip(batch.keys, batch.questions, strict=True)
            )
    for batches in (islice(PairStream(shards, silent, 7).batches(), 1), read_once(shards, silent, 20), pairs.batches(silent, 20)):
        assert next(iter(batches)).questions == ()
    bare = replace(pairs, questions=())
    assert bare[2:4].questions == () == next(bare.batches(view, 5)).questions
    assert batch.to("cpu").questions == batch.questions == batch.for_teacher().questions


# Salesforce's own files

TO_ORIGINAL = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".layer_norm", ".norm"),
)


def original_file(folder, tasks, momentum=True):
    "A random BLIP of ours, and a file of its weights as Salesforce's code saves them"
    shape = BlipShape(2, 64, 1, 2, 64, 1, 2, 2, image_neurons=48, text_neurons=80, image_size=32, patch_size=8, joint_width=16)
    said = ["a small red star left of a large blue house on the grass", "what colour is the star?"]
    blip = new_blip(shape, train_wordpiece(said * 9, folder, 120, 32), seed=5, tasks=tasks)
    torch.manual_seed(1)
    for weight in blip.model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    for norm in (part for part in blip.model.vision_model.modules() if isinstance(part, torch.nn.LayerNorm)):
        norm.eps = 1e-6
    state = {}
    for name, weight in blip.model.named_parameters(remove_duplicate=False):
        for ours, theirs in TO_ORIGINAL if name.startswith("vision_model.") else ():
            name = name.replace(ours, theirs)
        if name != "logit_scale" and not name.startswith("question_proj"):
            state[name] = weight.detach().clone()
    extra = {f"{part}_m.x": torch.ones(2) for part in ("visual_encoder", "vision_proj", "text_encoder", "text_proj")} if momentum else {}
    extra |= dict(temp=1 / blip.model.logit_scale.exp().detach(), image_queue=torch.ones(16, 4), text_queue=torch.ones(16, 4))
    extra |= dict(ptr_queue=torch.zeros(1, dtype=torch.long))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    torch.save(dict(model=state | extra, optimizer=optimizer, config=dict(vit="base", image_size=32), epoch=5), folder / "model_base.pth")
    return blip, folder / "model_base.pth"


@pytest.mark.parametrize(
    "tasks", [("retrieval", "matching"), ("captioning",), ("answering",), ("retrieval", "matching", "captioning")], ids="-".join
)
def test_salesforces_own_files_are_read(tasks, tmp_path):
    blip, file = original_file(tmp_path, tasks)
    assert is_blip(file) and not is_blip(tmp_path / "vocab.txt")
    again = load_blip(file, "cpu")
    shape = again.shape if "retrieval" in tasks else replace(again.shape, joint_width=16)  # which only the projections show
    assert again.tasks == tasks and shape == blip.shape and again.config["preprocess_cfg"] == blip.config["preprocess_cfg"]
    images, texts = torch.randn(2, 3, 32, 32), ["a red star", "a house"]
    tokens = blip.tokenizer(texts, 40)
    mask, one, other = tokens != blip.tokenizer.pad, blip.model, again.model
    assert torch.equal(tokens, again.tokenizer(texts)) and again.model.shared == one.shared
    with torch.no_grad():
        seen = one.run_image(images).states
        assert torch.equal(seen, other.run_image(images).states)
        if "retrieval" in tasks:
            assert torch.equal(one.encode_text(tokens), other.encode_text(tokens)) and torch.allclose(blip.scale, again.scale)
            assert torch.equal(*(network.match(network.run_text(tokens, mask, seen)).logits for network in (one, other)))
        else:
            assert torch.equal(one.run_decoder(tokens, mask, seen).logits, other.run_decoder(tokens, mask, seen).logits)
        saved = load_blip(save_blip(again, tmp_path / "saved"), "cpu")
        assert torch.equal(saved.model.run_image(images).states, seen)


def test_salesforces_files_without_words_or_with_more_than_a_blip_say_so(tmp_path):
    file = original_file(tmp_path, ("retrieval", "matching"))[1]
    held = torch.load(file, weights_only=True)
    weights = held["model"] | {"text_encoder.encoder.layer.0.crossattention.self0.query.weight": torch.zeros(64, 64)}
    torch.save(dict(model=weights), tmp_path / "nlvr.pth")
    with pytest.raises(ValueError, match="crossattention.self0"):
        load_blip(tmp_path / "nlvr.pth", "cpu")
    (tmp_path / "alone").mkdir()
    shutil.copy(file, tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match="vocab.txt"):
        load_blip(tmp_path / "alone" / file.name, "cpu")
    with pytest.raises(ValueError, match="is a BLIP"):
        find_model(file)
    with pytest.raises(ValueError, match="load_blip reads it"):
        load_model(file, "cpu")
    assert find_model(file, fused=True).tasks == ("retrieval", "matching")


@pytest.mark.parametrize("former, name", [("see", "forward_batch"), ("begun", "with_start_token"), ("write_about", "generate")])
def test_a_function_is_found_under_its_former_name_with_a_warning(former, name):
    with pytest.warns(DeprecationWarning, match=name):
        assert getattr(fusion, former) is getattr(fusion, name)
    with pytest.raises(AttributeError, match="wrote_about"):
        _ = fusion.wrote_about
