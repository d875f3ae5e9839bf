"A teacher that begins with towers from elsewhere trains, continues, teaches and ships as any other"

import json
import shutil

import open_clip
import pytest
import torch
from conftest import lines_of, tiny_job, train_watched
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, RobertaConfig

from vlkd_lab import trainers
from vlkd_lab.export import export_student
from vlkd_lab.methods import contrastive
from vlkd_lab.models import image_tower, load_model, new_model, save_model, train_tokenizer, with_towers
from vlkd_lab.models.students import _encoder_config
from vlkd_lab.runs import Run
from vlkd_lab.trainers import find_finished, open_job, train


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    "A folder with a small BERT of transformers and words of its own, pooled at its first place"
    folder = tmp_path_factory.mktemp("bert")
    train_tokenizer(["a red star", "a large blue house on the grass"] * 9, folder, 300, 24)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32)
    torch.manual_seed(3)
    BertModel(BertConfig(vocab_size=400, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **sizes)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return folder


@pytest.fixture
def given(scenes, tiny_teacher, encoder, tmp_path):
    "Parameters of a job that begins with both towers"

    def of(out="run", **changes):
        own = dict(image_tower=str(tiny_teacher), text_tower=str(encoder), context_length=20, embed_dim=24)
        return tiny_job(scenes, tiny_teacher, tmp_path / out, "Contrastive", **own | changes)

    return of


def test_towers_stay_where_they_are_locked_and_their_projections_have_the_new_width(given, encoder, tiny_teacher):
    train(open_job("Contrastive", given(lock_text=True, lock_image=True, unlocked_image_layers=1, learning_rate=1e-2)))
    made = find_finished(given()["out"])
    began = load_file(encoder / "model.safetensors")
    text = made.model.text.state_dict()
    assert all(torch.equal(weight, text[f"transformer.{name}"]) for name, weight in began.items() if f"transformer.{name}" in text)
    teacher = load_model(tiny_teacher, "cpu").model.visual.state_dict()
    same = {name for name, weight in made.model.visual.state_dict().items() if weight.shape == teacher[name].shape and torch.equal(weight, teacher[name])}
    assert "conv1.weight" in same and "transformer.resblocks.0.mlp.c_fc.weight" in same and "proj" not in same
    assert made.model.visual.proj.shape[1] == made.model.text.proj.out_features == 24
    assert made.config["model_cfg"]["text_cfg"]["context_length"] == 20
    assert type(made.model.text.pooler).__name__ == "ClsLastHiddenStatePooler", "as its folder says"


def test_a_locked_tower_drops_nothing_at_random(given, encoder, tmp_path):
    "MiniLM drops a tenth of everything in training; a tower that stays as it is says the same to the same caption"
    config = BertConfig.from_pretrained(encoder, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    dropping = tmp_path / "dropping"
    dropping.mkdir()
    for file in encoder.glob("*.*"):
        (dropping / file.name).write_bytes(file.read_bytes())
    config.save_pretrained(dropping)
    modes = []

    def watched(step, loop, batch):
        text = loop.learner.model.text
        modes.append([layer.training for layer in text.transformer.encoder.layer] + [text.transformer.embeddings.training])
        return step(loop, batch)

    for number, (locked, layers) in enumerate([(True, 0), (True, 1), (False, 0)]):
        changes = dict(text_tower=str(dropping), steps=1, lock_text=locked, unlocked_text_layers=layers)
        train_watched(open_job("Contrastive", given(f"run-{number}", **changes)), watched)
    assert modes == [[False, False, False], [False, True, False], [True, True, True]]


def test_it_continues_as_if_undisturbed(given, killed_in_its_fourth_step):
    whole, killed = given("whole", steps=6), given("killed", steps=6)
    train(open_job("Contrastive", whole))
    killed_in_its_fourth_step(lambda: open_job("Contrastive", killed))
    assert lines_of(killed["out"]) == lines_of(whole["out"])


def test_it_goes_on_only_with_the_towers_that_it_began_with(given, encoder, tiny_teacher, tmp_path):
    train(open_job("Contrastive", given()))
    other = new_model(str(tiny_teacher), tokenizer=load_model(tiny_teacher, "cpu").tokenizer, seed=9)
    save_model(other, tmp_path / "other")
    with pytest.raises(ValueError, match="image_tower"):
        open_job("Contrastive", given(image_tower=str(tmp_path / "other")))


def test_it_teaches_and_its_text_tower_is_taken_on(given, scenes, tiny_teacher, tmp_path):
    train(open_job("Contrastive", given()))
    folder = Run(given()["out"]).folder / "teacher" / "student"
    student = dict(inheritance="none", student=str(tiny_teacher), losses="affinity_mimicking=1")
    train(open_job("Distil", tiny_job(scenes, folder, tmp_path / "student", "Distil", **student)))
    assert find_finished(str(tmp_path / "student")).model.token_embedding.num_embeddings >= 300
    train(open_job("Contrastive", given("second", text_tower=given()["out"], architecture="timm:resnet10t", image_tower="", image_size=32)))
    second = find_finished(given("second")["out"])
    assert type(second.model.visual.trunk).__name__ == "ResNet" and second.model.visual.image_size == (32, 32)
    assert second.tokenizer(["a red star"]).shape == (1, 20)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(text_tower="nobody/nothing"), "text_tower='nobody/nothing' is neither a folder"),
        (dict(context_length=99), "reads at most 32 tokens"),
        (dict(image_tower="data_samples/none"), "no model"),
        (dict(start_from="data_samples/teacher"), "leave image_tower empty"),
        (dict(architecture="timm:resnet10t"), "both say what it sees with"),
        (dict(image_tower="", lock_image=True), "or a tower to begin with"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(given, tmp_path, changes, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        open_job("Contrastive", given(**changes))
    assert not (tmp_path / "run" / "config.json").exists()


def test_no_pickle_is_read(given, encoder, tmp_path):
    "An encoder whose weights are a pickle is refused"
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in encoder.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(encoder / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no safetensors of an encoder"):
        open_job("Contrastive", given(text_tower=str(folder)))


def test_a_projection_that_begins_at_random_is_trained_under_any_lock(given):
    job = open_job("Contrastive", given(lock_text=True, lock_image=True, unlocked_image_layers=1, steps=1, learning_rate=1e-2))
    before = {name: weight.clone() for name, weight in job.teacher.model.state_dict().items()}
    assert job.teacher.model.fresh_weights == {"visual.proj", "text.proj.weight"}
    train(job)
    after = find_finished(given()["out"]).model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"visual.proj", "text.proj.weight"} <= moved and not any(name.startswith("text.transformer") for name in moved)


@pytest.mark.parametrize("pooling, says", [("pooling_mode_max_tokens", "max_tokens"), ("pooling_mode_lasttoken", "lasttoken")])
def test_a_pooling_that_open_clip_has_not_is_refused(given, encoder, tmp_path, pooling, says):
    folder = tmp_path / "pooled"
    shutil.copytree(encoder, folder)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, pooling: True}))
    with pytest.raises(ValueError, match=f"pools by pooling_mode_{says}, which open_clip cannot"):
        open_job("Contrastive", given(text_tower=str(folder)))


def test_places_of_a_roberta_begin_behind_its_filling(tmp_path):
    RobertaConfig(vocab_size=400, pad_token_id=1, max_position_embeddings=24).save_pretrained(tmp_path)
    assert _encoder_config(str(tmp_path), 22)["context_length"] == 22
    with pytest.raises(ValueError, match="reads at most 22 tokens"):
        _encoder_config(str(tmp_path), 23)


def test_the_activation_of_a_tower_of_timm_is_its_own(tiny_teacher):
    config = load_model(tiny_teacher, "cpu").config["model_cfg"]
    quick = new_model(config | dict(quick_gelu=True), tokenizer=load_model(tiny_teacher, "cpu").tokenizer)
    sees = new_model(config | dict(vision_cfg=dict(image_tower("timm:resnet10t"), image_size=32)), tokenizer=quick.tokenizer)
    made = with_towers(config, image=sees, text=quick)
    assert made.config["model_cfg"]["quick_gelu"] and type(made.model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


@pytest.mark.parametrize("name", ["TinyCLIP-ViT-8M-16-Text-3M", "ViT-B-32/openai"])
def test_a_released_model_is_no_encoder(name, monkeypatch):
    monkeypatch.setattr(trainers, "find_finished", lambda name: ("found", name))
    assert contrastive._text_tower(name) == ("found", name)


def test_patches_are_not_dropped_before_layers_that_stay(tiny_teacher):
    teacher = load_model(tiny_teacher, "cpu")
    vision = teacher.config["model_cfg"]["vision_cfg"] | dict(patch_dropout=0.5)
    model = new_model(teacher.config["model_cfg"] | dict(vision_cfg=vision), tokenizer=teacher.tokenizer).model.train()
    trainers.lock_towers(model, trainers.FitParameters(lock_image=True, unlocked_image_layers=1))
    assert not model.visual.patch_dropout.training and model.visual.transformer.resblocks[-1].training


@pytest.fixture
def moved(tiny_teacher, encoder, tmp_path):
    "A model with an encoder's text tower that lies elsewhere now, and whose encoder is gone"
    shutil.copytree(encoder, tmp_path / "encoder")
    made = with_towers(str(tiny_teacher), text=tmp_path / "encoder", context_length=20)
    save_model(made, tmp_path / "saved")
    shutil.rmtree(tmp_path / "encoder")
    return made, (tmp_path / "saved").rename(tmp_path / "moved")


def test_it_opens_where_its_encoder_is_not(moved, tmp_path):
    made, folder = moved
    opened = load_model(folder, "cpu")
    ids = made.tokenizer(["a red star", "a large blue house"])
    assert torch.equal(opened.tokenizer(["a red star", "a large blue house"]), ids)
    assert torch.equal(opened.encode_text(ids), made.model.eval().encode_text(ids, normalize=True))
    save_model(opened, tmp_path / "again")
    shutil.rmtree(folder)
    elsewhere = open_clip.create_model(f"local-dir:{tmp_path / 'again'}").eval()
    assert torch.equal(elsewhere.encode_text(ids, normalize=True), opened.encode_text(ids))


def test_it_leaves_as_a_repository_that_names_no_place_of_this_machine(moved, tmp_path, monkeypatch):
    made, folder = moved
    out = export_student(folder, tmp_path / "out", onnx=False, repository="ann/begun", licence="mit")
    for file in out.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
    ids = made.tokenizer(["a red star", "a large blue house"])
    assert torch.equal(load_model(out, "cpu").encode_text(ids), made.model.eval().encode_text(ids, normalize=True))
    shutil.copytree(out, tmp_path / "ann/begun")  # the hub's copy of it
    monkeypatch.chdir(tmp_path)
    elsewhere = open_clip.create_model(f"local-dir:{out}").eval()
    assert torch.equal(elsewhere.encode_text(ids, normalize=True), made.model.encode_text(ids, normalize=True))


def test_it_leaves_as_a_folder_that_open_clip_opens_from_everywhere(moved, tmp_path, monkeypatch):
    made, folder = moved
    out = export_student(folder, tmp_path / "out", onnx=False)
    ids = made.tokenizer(["a red star", "a large blue house"])
    monkeypatch.chdir(tmp_path)
    elsewhere = open_clip.create_model(f"local-dir:{out}").eval()
    assert torch.equal(elsewhere.encode_text(ids, normalize=True), made.model.eval().encode_text(ids, normalize=True))
    card = (out / "README.md").read_text()
    assert "before it goes elsewhere" in card and str(tmp_path) not in card
    out.rename(tmp_path / "other")
    assert torch.equal(load_model(tmp_path / "other", "cpu").encode_text(ids), made.model.encode_text(ids, normalize=True))
