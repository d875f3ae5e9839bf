import json
import math
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

from vlkd_lab import tasks
from vlkd_lab.data import load_pairs
from vlkd_lab.features import Features, recall
from vlkd_lab.fusion import (
    BlipShape,
    answer,
    new_blip,
    rank_answers,
    student_shape,
    train_wordpiece,
    trimmed,
    write_captions,
)
from vlkd_lab.methods.dlip import Dlip, open_dlip
from vlkd_lab.models import evaluating
from vlkd_lab.samples import caption, make_scene, questions
from vlkd_lab.tasks import (
    Answers,
    Gallery,
    Retrieval,
    SceneFacts,
    answer_accuracy,
    answer_all,
    caption_pairs,
    caption_scores,
    common_answers,
    compare_tasks,
    hit,
    is_true,
    job_tasks,
    measure_tasks,
    plain_answer,
    rerank,
    scene_facts,
    score_tasks,
    show_tasks,
    some_questions,
)
from vlkd_lab.trainers import check_parameters, train

SIZES = dict(image_layers=1, image_width=32, image_heads=2, text_layers=1, text_width=32, text_heads=2, fusion_layers=1, decoder_layers=1)
SHAPE = BlipShape(**SIZES, image_neurons=32, text_neurons=32, image_size=32, patch_size=16, joint_width=8)


@pytest.fixture(scope="module")
def pairs(scenes):
    return load_pairs(scenes / "val-000000.tar")


@pytest.fixture(scope="module")
def blip(pairs, tmp_path_factory):
    "An untrained model whose matching head says something else of every pair"
    texts = [*pairs.captions, *(text for asked in pairs.questions for q in asked for text in q[:2])]
    made = new_blip(SHAPE, train_wordpiece(texts, tmp_path_factory.mktemp("words"), 300, 32), seed=1)
    made.model.itm_head.weight.data *= 100
    return replace(made, name="teacher")


def slow_retrieval(blip, pairs, k):
    "Every pair scored one by one, every candidate list sorted by hand"
    texts, words = list(dict.fromkeys(pairs.captions)), blip.tokenizer
    cosines, yes = torch.zeros(len(pairs), len(texts)), torch.zeros(len(pairs), len(texts))
    with evaluating(blip.model):
        for i in range(len(pairs)):
            image = blip.preprocess(pairs.pil(i))[None]
            for j, text in enumerate(texts):
                tokens, mask = trimmed(words([text]), words.pad)
                cosines[i, j] = blip.encode_image(image)[0] @ blip.encode_text(tokens)[0]
                tokens[0, 0] = words.enc
                yes[i, j] = blip.model.match(blip.model.run_text(tokens, mask, blip.model.run_image(image).states)).logits[0, 1]

    def found(cosines, yes, right):
        hits = dict.fromkeys((1, 5, 10), 0)
        for scores, logits, own in zip(cosines, yes, right, strict=True):
            order = sorted(range(len(scores)), key=lambda c: -scores[c])
            order = sorted(order[:k], key=lambda c: -(scores[c] + logits[c])) + order[k:]
            for top in hits:
                hits[top] += any(own[c] for c in order[:top]) / len(cosines)
        return hits

    right = torch.tensor([[text == own for text in texts] for own in pairs.captions])
    ways = {"image_to_text": found(cosines, yes, right), "text_to_image": found(cosines.T, yes.T, right.T)}
    return cosines + yes, {f"{way}_r{top}": share for way, hits in ways.items() for top, share in hits.items()}


@pytest.mark.parametrize("candidates", (2, 6, 99), ids=lambda k: f"{k} candidates")
def test_reranking_is_the_slow_way_made_fast(blip, pairs, candidates):
    some = pairs[:9]
    some = replace(some, captions=(*some.captions[:8], some.captions[2]))
    found = rerank(blip, some, candidates, batch_size=5)
    scores, recalls = slow_retrieval(blip, some, candidates)
    assert found.after == pytest.approx(recalls, abs=1e-6)
    for final, reach in ((found.of_images, found.of_images), (found.of_texts, found.of_texts.T)):
        assert torch.allclose(final[final > -1000].float(), scores[final > -1000], atol=1e-3)
        assert ((reach > -1000).sum(1) == min(candidates, reach.shape[1])).all()
    with evaluating(blip.model):
        images = blip.encode_image(torch.stack([blip.preprocess(some.pil(i)) for i in range(9)]))
        features = Features(images, blip.encode_text(blip.tokenizer(list(some.captions))), torch.ones(()))
    assert found.before == pytest.approx(recall(features, captions=some.captions))


def test_reranking_only_reorders_the_candidates(blip, pairs):
    plain, few, many = (rerank(blip, pairs, k) for k in (0, 5, 10))
    assert plain.after == plain.before == few.before and plain.matched == 0 < few.matched < many.matched
    for k, found in ((5, few), (10, many)):
        assert found.after[f"image_to_text_r{k}"] == plain.before[f"image_to_text_r{k}"]
        assert found.after[f"text_to_image_r{k}"] == plain.before[f"text_to_image_r{k}"]
    assert not torch.equal(few.of_images.argsort(1), plain.of_images.argsort(1)) and not torch.equal(few.of_images, many.of_images)
    kept = few.of_images < -1000  # no candidates: in the order that they had
    for row in range(len(pairs)):
        assert torch.equal(few.of_images[row][kept[row]].argsort(), plain.cosines[row][kept[row]].argsort())
    assert torch.equal(rerank(blip, pairs, 5, hold=False).of_texts, few.of_texts)


def test_the_image_tower_runs_once_for_each_picture(blip, pairs):
    seen = []
    hook = blip.model.vision_model.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    rerank(blip, pairs, 4, batch_size=20)
    assert seen == [20, 20, 8]
    rerank(blip, pairs, 4, batch_size=20, hold=False)
    assert seen == [20, 20, 8] * 3
    seen.clear()
    answer_all(blip, pairs[:8], beams=1, batch_size=8, longest=1)
    hook.remove()
    assert seen == [8]


def test_equal_captions_share_their_text(blip, pairs):
    same = replace(pairs[:6], captions=("a red star",) * 6)
    found = rerank(blip, same, 4)
    assert found.cosines.shape == (6, 1) and found.right.all() and set(found.after.values()) == {1.0}


def test_ties_count_against_the_model(blip, pairs):
    flat = torch.zeros(5, 5)
    found = Retrieval(flat, flat, flat, torch.eye(5).bool(), 2, 10)
    assert found.after["image_to_text_r1"] == 0 and found.after["text_to_image_r5"] == 1
    chosen = tasks._candidates(flat, torch.eye(5).bool(), 4)
    assert not chosen.diagonal().any() and (chosen.sum(1) == 4).all(), "the right one is not let in by luck"
    broken = replace(found, of_images=flat.fill_(math.nan))
    assert math.isnan(broken.after["image_to_text_r1"])


def test_retrieval_refuses_what_it_cannot_do(blip, pairs):
    with pytest.raises(ValueError, match="not made for matching"):
        rerank(replace(blip, tasks=("retrieval",)), pairs)
    with pytest.raises(ValueError, match="not made for retrieval"):
        rerank(replace(blip, tasks=("captioning",)), pairs, candidates=0)
    with pytest.raises(ValueError, match="candidates=-1"):
        rerank(blip, pairs, candidates=-1)
    assert rerank(replace(blip, tasks=("retrieval",)), pairs, candidates=0).matched == 0


def test_captions_scored_by_hand():
    # 4 of 4 words, 3 of 3 pairs, 2 of 2 triples, 1 of 1 quadruple, and one word is missing: exp(1 - 5/4)
    scores = caption_scores(["a red star there", "a b"], [["a red star there now"], ["x y"]])
    assert scores["bleu4"] == pytest.approx(100 * (4 / 6 * 3 / 4 * 1 * 1) ** 0.25 * math.exp(1 - 7 / 6))
    # cosines: words 3/4 shared of equal weight ln 2, pairs 2/3, triples 1/2, quadruple 0; 2nd caption shares nothing
    scores = caption_scores(["w x y q", "n m"], [["w x y z"], ["e f"]])
    assert scores["cider"] == pytest.approx(10 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4 / 2) and scores["bleu4"] == 0
    two = caption_scores(["w x y q", "n m"], [["w x y z", "something else entirely here"], ["e f"]])
    assert two["cider"] == pytest.approx(10 * (3 / 4 + 2 / 3 + 1 / 2) / 4 / 2 / 2)


def test_perfect_captions_score_100_and_10():
    said = ["A red star, on the grass!", "two small boats at sea", "a large fish in water"]
    scores = caption_scores(said, [[text.lower().replace("!", " .")] for text in said])
    assert scores["bleu4"] == pytest.approx(100) and scores["cider"] == pytest.approx(10) and scores["true_share"] is None
    assert caption_scores([said[0], "x", ""], [[text] for text in said])["cider"] == pytest.approx(10 / 3)
    assert caption_scores(["z", "x", ""], [[text] for text in said])["bleu4"] == 0
    assert math.isnan(caption_scores(said[:1], [said[:1]])["cider"])


@pytest.mark.parametrize(
    "written, references, said",
    [("", [], "at least one"), ("a", [["a"], ["b"]], "and 2 lists"), ("ab", [["a"], []], "caption 1"), ("a", [["a", "?"]], "caption 0")],
    ids=("nothing", "unequal", "no reference", "no words"),
)
def test_captions_that_cannot_be_scored(written, references, said):
    with pytest.raises(ValueError, match=said):
        caption_scores(written, references)


def facts_of(scene):
    "What the generator's own scene says, by the way that shards take"
    asked = tuple((qa.question, qa.answer, qa.type) for qa in questions(scene))
    return tasks._facts(asked, ["small", "large"].index(scene.things[0].size))


def test_what_the_generator_says_of_a_scene_is_true_and_of_another_hardly_ever():
    made = [make_scene(k, "truth") for k in range(150)]
    facts = [facts_of(scene) for scene in made]
    for scene, fact in zip(made, facts, strict=True):
        assert [thing["kind"] for thing in fact.things] == [thing.kind for thing in scene.things]
        assert (fact.setting, fact.relation, fact.things[0]["size"]) == (scene.setting, scene.relation, scene.things[0].size)
        assert all(is_true(caption(scene, variant), fact) for variant in range(4)), caption(scene)
    strangers = [is_true(caption(scene), fact) for scene, fact in zip(made[1:], facts, strict=False)]
    assert sum(strangers) < 3


STAR = {"kind": "star", "colour": "red", "size": "large", "texture": "plain"}
SCENE = SceneFacts((STAR, {"kind": "boat", "colour": "blue"}, {"kind": "cup", "colour": "white"}), "grass", "left")


TRUE = (
    "A big red star, on the grass.", "a ship to the right of a star", "three shapes in a meadow, the biggest is a plain star",
    "a striped boat and a star", "a star over a mug", "a red star, it is large and plain", "a red star left of a boat, it is red",
)  # fmt: skip
FALSE = (
    "a small star", "a red star, it is small and plain", "a red star, it is blue", "a red boat", "a star right of a boat", "a house",
    "a boat left of a star", "a star at sea", "two shapes, a star", "a star alone", "the biggest is a boat", "a star and a star",
    "a star left of", "a red", "", "a star and a dog", "a large small boat", "left of a star", "on the grass",
)  # fmt: skip


@pytest.mark.parametrize("text", TRUE + FALSE, ids=lambda text: text or "nothing")
def test_a_caption_is_held_against_the_facts(text):
    assert is_true(text, SCENE) is (text in TRUE)


def test_other_pictures_have_no_facts(pairs):
    assert all(scene_facts(pairs)) and scene_facts(replace(pairs, questions=(), sets={})) == [None] * len(pairs)
    other = replace(pairs[:3], questions=((("what colour is the dog?", "red", "colour"),), (("is it day?", "yes", "other"),), ()))
    assert scene_facts(other) == [None] * 3
    less = replace(pairs, questions=tuple(asked[1:] for asked in pairs.questions))
    assert scene_facts(less) == [None] * len(pairs), "one shape was not asked about"
    references = [[text] for text in pairs.captions]
    assert caption_scores(pairs.captions, references, scene_facts(pairs))["true_share"] == 1
    half = [fact if row % 2 else None for row, fact in enumerate(scene_facts(pairs))]
    assert caption_scores(["a dog"] * len(pairs), references, half)["true_share"] == 0


SAME = {"A Star.": "star", "the sea": "sea", "Two": "2", "ten": "10", "1,000": "1000", "it's": "its", "yes!": "YES", "left-of": "left of"}


@pytest.mark.parametrize("one, other", SAME.items(), ids=lambda text: text)
def test_answers_that_are_the_same(one, other):
    assert plain_answer(one) == plain_answer(other) != ""


def test_answers_that_are_not():
    assert len({plain_answer(text) for text in ("a", "an", "star", "stars", "1.5", "15", "no", "none")}) == 8
    assert hit("?", ["!"]) == 0 and hit("", [""]) == 0


def test_several_people_are_asked():
    people = ["red"] + ["blue"] * 2 + ["green"] * 7
    assert [hit(text, people) for text in ("red", "Blue", "the green", "pink")] == [1 / 3, 2 / 3, 1, 0]
    assert hit("red", ["red"]) == 1 and hit("red", ["red", "blue"]) == 0.5 and hit("red", []) == 0
    table = answer_accuracy(Answers((0, 1), ("?", "?"), ("b", "a"), (tuple(people), ("x",)), ("blue", "y")))
    assert table["accuracy"].to_dict() == {"a": 0, "b": 2 / 3, "all": 1 / 3} and table["questions"].to_dict() == {"a": 1, "b": 1, "all": 2}


def test_answers_and_captions_are_those_of_single_pictures(blip, pairs):
    few = some_questions(replace(pairs[:5], questions=(*pairs.questions[:2], (), *pairs.questions[3:5])), 2)
    found = answer_all(blip, few, beams=2, batch_size=3, longest=4)
    images = torch.stack([blip.preprocess(few.pil(row)) for row in range(5)])
    assert found.rows == (0, 0, 1, 1, 3, 3, 4, 4)
    for row, question, written in zip(found.rows, found.questions, found.written, strict=True):
        assert answer(blip, images[row][None], [question], 2, 4) == [written]
    assert caption_pairs(blip, few, 2, batch_size=2, longest=5) == [write_captions(blip, image[None], 2, 5)[0] for image in images]
    with pytest.raises(ValueError, match="no questions"):
        answer_all(blip, replace(pairs, questions=()))
    with pytest.raises(ValueError, match="-1 questions"):
        some_questions(pairs, -1)


def test_each_question_is_asked_of_its_own_picture(blip, pairs, monkeypatch):
    monkeypatch.setattr(tasks, "_answered", lambda blip, states, *given: [f"{state[0, 0]:.3f}" for state in states])
    found = answer_all(blip, some_questions(pairs[:7], 2), batch_size=3)
    with evaluating(blip.model):
        states = blip.model.run_image(torch.stack([blip.preprocess(pairs.pil(row)) for row in range(7)])).states
    assert found.written == tuple(f"{states[row, 0, 0]:.3f}" for row in found.rows) and len(set(found.written)) == 7


def test_a_models_mode_is_left_as_it_was(blip, pairs):
    blip.model.train()
    try:
        score_tasks(blip, some_questions(pairs[:4], 1), beams=1, candidates=2)
        assert all(part.training for part in blip.model.modules())
    finally:
        blip.model.eval()


def test_one_table_of_scores_prices_and_shares(blip, pairs, monkeypatch):
    small = new_blip(student_shape(SHAPE, "image:1x16, text:1x16"), blip.tokenizer, like=blip, seed=2)
    small = replace(small, tasks=("retrieval", "captioning"))
    made = {"teacher": dict(retrieval_r1=0.8, cider=5.0, answer_accuracy=0.5), "<b>": dict(retrieval_r1=0.6, cider=0.0)}
    turns = []
    counted = lambda task, blip: lambda: turns.append((task, blip is small))  # noqa: E731
    monkeypatch.setattr(tasks, "_works", lambda blip, *given: {task: counted(task, blip) for task in blip.tasks})
    table = compare_tasks({"teacher": blip, "<b>": small}, pairs, scores=made, repeats=2)
    assert table["kept_retrieval"].tolist() == pytest.approx([1, 0.75]) and table["kept_captioning"].tolist() == [1, 0]
    assert table.loc["teacher", "kept_answering"] == 1 and math.isnan(table.loc["<b>", "kept_answering"])
    assert table.loc["<b>", "parameters"] == sum(p.numel() for p in small.model.parameters())
    assert math.isnan(table.loc["<b>", "ms_answering"]) and table.loc["<b>", "gmacs_captioning"] < table.loc["teacher", "gmacs_captioning"]
    assert [name for task, name in turns if task == "captioning"] == [False, True] * 3, "in turns, once more than is counted"
    assert turns[:3] == [("retrieval", False), ("retrieval", True), ("matching", False)]
    page = show_tasks(table).to_html()
    assert "&lt;b&gt;" in page and "<b>" not in page and "75.0%" in page and "—" in page
    for wrong, said in ((dict(repeats=0), "repeats=0"), (dict(batch_size=0), "batch_size=0")):
        with pytest.raises(ValueError, match=said):
            measure_tasks({"teacher": blip}, pairs, **wrong)
    with pytest.raises(ValueError, match="no model"):
        compare_tasks({}, pairs)


def test_nothing_hostile_gets_out_of_the_gallery(blip, pairs):
    bad = "<img src=x onerror=alert(1)>\u202e"
    hostile = replace(pairs[:2], captions=(bad, "a star"), questions=(((bad, bad, "colour"),), ()))
    shown = Gallery({bad: blip, "mute": replace(blip, tasks=("retrieval",))}, hostile, [0, 1], beams=1)
    shown.captions[bad][0] = bad
    shown.answers[bad] = replace(shown.answers[bad], written=(bad,))
    page = shown._repr_html_()
    assert page.count("<img") == 2 and "\u202e" not in page and page.count("&lt;img src=x") == 6
    assert page.count("✓") == 1 and "✗" not in page, "only the answer is known to be right"
    assert re.search("#1a7f37'>✓ &lt;img", page) and "—" in page
    shown.answers[bad] = replace(shown.answers[bad], written=("blue",))
    assert re.search("#c62828'>✗ blue", shown._repr_html_())
    for rows in ([], [2], [-1]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            Gallery({"teacher": blip}, hostile, rows)


def test_a_gallery_marks_captions_of_scenes(blip, pairs):
    shown = Gallery({"teacher": blip}, pairs, [3, 1], questions=0, beams=1)
    assert shown.truths == [pairs.captions[3], pairs.captions[1]]
    shown.captions["teacher"] = [pairs.captions[3], "a dog"]
    page = shown._repr_html_()
    assert f"✓ {pairs.captions[3]}" in page and "✗ a dog" in page and "?" not in page.replace("image/jpeg", "")


def test_a_jobs_scores_are_kept(blip, scenes, tmp_path, monkeypatch):
    blip.save(tmp_path / "teacher")
    asked = dict(data=str(scenes / "train-000000.tar"), val=str(scenes / "val-000000.tar"), compare_scratch=False, device="cpu")
    asked |= dict(teacher=str(tmp_path / "teacher"), out=str(tmp_path / "run"), steps=1, batch_size=8, validate_pairs=8, workers=0)
    job = open_dlip(check_parameters(Dlip, asked))
    before, scored = job_tasks(job, beams=1, questions=1, candidates=2), []
    assert list(before.index) == ["teacher"]
    train(job)
    own = tasks.score_tasks
    monkeypatch.setattr(tasks, "score_tasks", lambda blip, *given, **more: scored.append(blip) or own(blip, *given, **more))
    first = job_tasks(job, beams=1, questions=1, candidates=2)
    assert list(first.index) == ["teacher", "student"] and len(scored) == 1, "the teacher was scored before"
    assert first.loc["teacher", "cider"] == before.loc["teacher", "cider"]
    monkeypatch.setattr(tasks, "compare_tasks", None)
    pd.testing.assert_frame_equal(job_tasks(job, beams=1, questions=1, candidates=2), first)
    assert len(json.loads((job.run.folder / "tasks.json").read_text())["tables"]) == 2
    with pytest.raises(TypeError):
        job_tasks(job, job.val[:4], beams=1, questions=1, candidates=2)  # other pairs: asked anew


def test_answers_of_a_list_are_ranked_as_one_by_one(blip, pairs):
    "Two steps: candidates by their first token, then whole texts, against every answer by itself"
    some = some_questions(pairs[:6], 2)
    listed = common_answers("data_samples/scenes/val-000000.tar", most=9, samples=60)
    assert len(listed) == len(set(listed)) == 9
    answered = answer_all(blip, some, batch_size=4, answer_list=listed, progress=False)
    images = torch.stack([blip.preprocess(some.pil(row)) for row in answered.rows]).to(blip.device)
    assert list(answered.written) == rank_answers(blip, images, answered.questions, listed)
    assert set(answered.written) <= set(listed) and answered.written == answer_all(blip, some, answer_list=listed * 2, progress=False).written
    only = replace(blip, tasks=("answering",))
    scores = score_tasks(only, some, 1, progress=False, answer_list=listed)
    assert scores["answer_accuracy"] == answer_accuracy(answered).loc["all", "accuracy"]
    assert compare_tasks({"one": only}, some, 1, repeats=1, progress=False, answer_list=listed).loc["one", "answer_accuracy"] == scores["answer_accuracy"]


def test_answers_of_people_count_as_in_vqa(blip, pairs):
    three = (("what?", ("red", "Red", "blue"), "colour"), ("how many?", (("two", 0.2),), "count"), ("where?", "here", "setting"))
    some = replace(pairs[:1], questions=(three,))
    truths = answer_all(blip, some, 1, progress=False, answer_list=["red"]).truths
    assert truths == (("red", "Red", "blue"), ("two",) * 10, ("here",)), "weights are so many of ten people"
    assert answer_all(blip, some, 1, progress=False, answer_list=["red"]).hits == [2 / 3, 0, 0]


def test_weights_of_answers_are_opinions_of_ten_people():
    "As BLIP's training data has them: what is nearly all of the weight is right, whatever else was said"
    weighted = tasks._people((("red", 0.6), ("crimson", 0.3), ("dark red", 0.1)))
    assert [hit(text, weighted) for text in ("red", "crimson", "dark red", "blue")] == [1, 1, 1 / 3, 0]
    assert hit("yes", tasks._people((("yes", 0.9), ("no", 0.1)))) == 1 and hit("two", tasks._people((("two", 0.2),))) == 1
    assert tasks._people("red") == ("red",) and tasks._people(("red", "red", "blue")) == ("red", "red", "blue")
