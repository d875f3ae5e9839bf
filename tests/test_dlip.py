"DLIP as a job: what a step learns, that a killed one ends as if undisturbed, and what is refused before any work"

import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import forked
import pytest
import torch
from conftest import TINY_BLIP, in_two_processes, train_watched
from webdataset import TarWriter

from vlkd_lab import fusion, trainers
from vlkd_lab.blip_terms import GROUPS, blip_terms
from vlkd_lab.data import raw_samples
from vlkd_lab.fusion import TASKS, forward_batch, load_blip
from vlkd_lab.losses import Objective
from vlkd_lab.methods import blip_learner, dlip, tinyclip
from vlkd_lab.methods.blip_learner import BlipLearner
from vlkd_lab.methods.blip_training import BlipTraining, find_blip, open_blip_training
from vlkd_lab.methods.dlip import Dlip, dlip_objective, make_student, open_dlip, student_sizes
from vlkd_lab.runs import Run, kept_snapshots, read_json, read_snapshot
from vlkd_lab.samples import write_shards
from vlkd_lab.trainers import Loop, Phase, check_parameters, current_student, make_accelerator, start, train


@pytest.fixture
def tiny(scenes, tiny_blip, tmp_path):
    "Parameters of a job that takes seconds"
    given = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", teacher=str(tiny_blip), device="cpu")
    given |= dict(steps=6, batch_size=8, warmup=2, validate_every=3, validate_pairs=24, queue=21)
    return given | dict(out=str(tmp_path / "run"), compare_scratch=False, probe_pairs=6, student="image:1x16, text:1x16")


def asked_otherwise(scenes, folder, change):
    "The scenes, each with the questions that `change` makes of its number in the shard and its own"
    for number, shard in enumerate(sorted(scenes.glob("train-*.tar"))):
        with TarWriter(str(folder / f"asked-{number:06d}.tar")) as out:
            for k, sample in enumerate(raw_samples(shard)):
                facts = json.loads(sample["json"])
                facts["questions"] = change(k, facts["questions"])
                out.write({"__key__": sample["__key__"], **{e: sample[e] for e in ("jpg", "txt")}, "json": json.dumps(facts).encode()})
    return f"{folder}/asked-{{000000..000002}}.tar"


@pytest.fixture
def partly_asked(scenes, tmp_path):
    "Shards in which few pictures have a question"
    return asked_otherwise(scenes, tmp_path, lambda k, questions: questions if k % 9 == 0 else [])


def job_of(tiny, **changes):
    return open_dlip(check_parameters(Dlip, tiny | changes))


def first_step(job, **changes):
    "Terms and gradients of a job's first step, the student in double precision"
    options = trainers.check_parameters(Dlip, {**vars(job.options), **changes})
    student = make_student(job)[0]
    objective = dlip_objective(options, job.teacher, student, job.tasks)
    learner = BlipLearner(student.model.train(), student, job.tasks, options)
    trial = Loop(
        Run(job.run.folder / "trial"), Phase("student", "distil", 6), learner, objective, options, make_accelerator(options), job.teacher
    )
    sums, seen, taught = learner.learn(trial, next(job.batches(0)))
    return trainers.as_numbers(sums), {n: p.grad for n, p in student.model.named_parameters() if p.grad is not None}, learner, seen, taught


def test_a_step_has_every_term_and_moves_every_part(tiny):
    job = job_of(tiny)
    sums, grads, learner, seen, taught = first_step(job)
    assert set(sums) == {term.name for term in blip_terms()} | {"total"} and all(math.isfinite(value) for value in sums.values())
    assert sums["total"] == pytest.approx(sum(value for name, value in sums.items() if name != "total"), rel=1e-5)
    still = {name for name, _ in learner.model.named_parameters()} - set(grads)
    assert not still, still
    assert all(p.grad is None for p in job.teacher.model.parameters()) and all(p.grad is None for p in learner.momentum_encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(seen.negatives, taught.negatives or seen.negatives, strict=True))
    assert torch.equal(seen.passes["pairs"].targets, taught.passes["pairs"].targets), "both judge the same pairs"


def test_the_base_losses_are_their_formulas(tiny):
    job = job_of(tiny, losses="base:1", queue=0, soft_share=0.0)
    sums, _, learner, *_ = first_step(job)
    batch, words = next(job.batches(0)), learner.blip.tokenizer
    student = make_student(job)[0].model
    with torch.no_grad():
        image, text = student.encode_image(batch.image), student.encode_text(batch.text)
        logits, same = (
            student.logit_scale.exp() * image @ text.T,
            torch.tensor([[a == b for b in batch.captions] for a in batch.captions]).double(),
        )
        expected = (
            -((same / same.sum(1, keepdim=True)) * logits.log_softmax(1)).sum(1).mean()
            - ((same / same.sum(1)) * logits.T.log_softmax(1)).sum(1).mean()
        )
        assert sums["image_text_contrast"] == pytest.approx(float(expected / 2), rel=1e-4)
        tokens, mask = fusion.trimmed(batch.text, words.pad)
        written = student.run_decoder(fusion.with_start_token(tokens, words.dec), mask, student.run_image(batch.image).states)
        nats = []
        for row in range(len(tokens)):
            for place in range(int(mask[row].sum()) - 1):
                shares = written.logits[row, place].log_softmax(0)
                nats.append(float(-0.9 * shares[tokens[row, place + 1]] - 0.1 * shares.mean()))
    assert sums["language_modelling"] == pytest.approx(sum(nats) / len(nats), rel=1e-4)


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "partly"])
def test_micro_batches_give_the_same_step(asked, tiny, partly_asked):
    losses = "image_text_contrast:1, language_modelling:1, answering:1, image:1, text:1, decoder:1"  # all that draw no hard negatives
    tiny = tiny if asked else tiny | dict(data=partly_asked)
    whole, wanted, learner, *_ = first_step(job_of(tiny, losses=losses))
    for micro in (2, 3, 5):
        sums, grads, other, *_ = first_step(job_of(tiny, losses=losses), micro_batch=micro)
        assert sums == pytest.approx(whole, rel=1e-4)
        assert set(grads) == set(wanted)
        for name in wanted:
            assert (grads[name] - wanted[name]).abs().max() <= 1e-3 * max(float(wanted[name].abs().max()), 1e-3), name
        assert torch.allclose(other.queue.rows()[0], learner.queue.rows()[0], atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, dict(micro_batch=3), dict(image_size=16), dict(tasks="captioning, answering")], ids=["plain", "micro", "size", "words"]
)
def test_killed_in_the_middle_it_ends_as_if_undisturbed(changes, tiny, ends_as_if_undisturbed):
    ends_as_if_undisturbed(lambda out: job_of(tiny | changes, checkpoint_seconds=0.0, out=out))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(tiny):
    job = job_of(tiny, student="image:2x32", losses="distillation:1")
    sums, *_ = first_step(job)
    assert all(abs(value) < 1e-4 for value in sums.values()), sums


def test_scratch_has_the_students_sizes_and_no_weight_of_the_teacher(tiny):
    job = job_of(tiny, compare_scratch=True, steps=2)
    train(job)
    student, scratch = (load_blip(job.run.folder / stage / "student", "cpu") for stage in ("student", "scratch"))
    init = load_blip(job.run.folder / "scratch" / "init", "cpu")
    assert student.shape == scratch.shape == student_sizes(job.options, job.teacher)
    inherited = make_student(job)[0].model.state_dict()
    assert not torch.equal(init.model.state_dict()["text_encoder.embeddings.word_embeddings.weight"],
                           inherited["text_encoder.embeddings.word_embeddings.weight"])  # fmt: skip
    lines = [line for line in job.run.metrics() if "total" in line and line["stage"] == "scratch"]
    assert set(lines[0]) & set(GROUPS["distillation"]) == set() and set(GROUPS["base"]) <= set(lines[0])


def test_what_no_term_asks_for_is_not_run(tiny, monkeypatch):
    job, made = job_of(tiny, losses="language_modelling:1"), []
    monkeypatch.setattr(
        "vlkd_lab.methods.blip_learner.forward_batch", lambda *given, **more: made.append(given[3] if len(given) > 3 else more["tasks"]) or forward_batch(*given, **more)
    )
    first_step(job)
    assert made and all(tuple(tasks) == ("captioning",) for tasks in made)


def test_the_momentum_encoder_and_the_queue_are_those_of_the_formula(tiny):
    job = job_of(tiny, momentum=0.9, steps=3, checkpoint_seconds=0.0, keep_snapshots=0)
    seen = []

    def watched(step, loop, batch):
        before = {n: w.clone() for n, w in loop.learner.momentum_encoder.named_parameters()}
        found = step(loop, batch)
        own = dict(loop.learner.model.named_parameters())
        for name, weight in loop.learner.momentum_encoder.named_parameters():
            torch.testing.assert_close(weight, 0.9 * before[name] + 0.1 * own[name])
        seen.append((int(loop.learner.queue.seen), len(loop.learner.queue.rows()[0])))
        return found

    train_watched(job, watched)
    assert seen == [(8, 8), (16, 16), (24, 21)], "a queue of 21 pairs, which 8 does not divide"


def test_a_checkpoint_under_former_names_is_taken_up(tiny):
    job = job_of(tiny)
    _, _, learner, *_ = first_step(job)
    with torch.no_grad():
        for weight in learner.momentum_encoder.parameters():
            weight.add_(0.25)
    state = {name: value.clone() for name, value in learner.state_dict().items()}
    names = {name: name.replace("momentum_encoder.", "slow.").replace("queue.caption_ids", "queue.names") for name in state}
    former = {names[name]: value for name, value in state.items()}
    assert "queue.names" in former and sum(name.startswith("slow.") for name in former) == len(learner.momentum_encoder.state_dict()) > 20
    student = make_student(job)[0]
    for checkpoint in (former, state):
        other = BlipLearner(make_student(job)[0].model, student, job.tasks, job.options)
        assert not torch.equal(other.momentum_encoder.text_proj.weight, learner.momentum_encoder.text_proj.weight)
        other.load_state_dict(checkpoint)
        assert other.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match="slow_copy"):
        other.load_state_dict({name.replace("slow.", "slow_copy."): value for name, value in former.items()})


def test_views_find_where_words_look(tiny):
    job = job_of(tiny)
    train(job)
    about = read_json(job.run.folder / "probe.json")
    assert len(about["words"]) == 6 and about["words"][0][-1] == "[SEP]"
    taught, _ = read_snapshot(job.run.folder / "probe.safetensors")
    files = kept_snapshots(job.run)
    seen, _ = read_snapshot(files[-1] if not isinstance(files[-1], tuple) else files[-1][0])
    for name in ("cross_fusion", "cross_decoder"):
        mine, theirs = seen[f"student_{name}"], taught[f"teacher_{name}"]
        assert mine.shape == theirs.shape and mine.shape[0] == 6 and mine.shape[2] == 16
        assert (theirs.astype(float).sum(-1)[0, : len(about["words"][0])] > 0.2).all() and theirs.astype(float).sum(-1).max() < 1.01
        lengths = [len(words) for words in about["words"]]
        assert min(lengths) < max(lengths) == mine.shape[1], "some texts end before others"
        for student_maps, teacher_maps, length in zip(mine, theirs, lengths, strict=True):
            assert (student_maps[length:] == 0).all() and (teacher_maps[length:] == 0).all(), "nothing behind the end"
            assert (student_maps[:length] > 0).any(axis=1).all(), "every word looks somewhere"


def test_one_text_stands_for_its_attention(tiny):
    "The views' maps are the mean over heads and layers of what the passes kept"
    job = job_of(tiny)
    maps = job.probed()[0]["teacher_cross_decoder"]
    batch, words = job.probe, job.teacher.tokenizer
    tokens, mask = fusion.trimmed(batch.text, words.pad)
    with torch.no_grad():
        made = job.teacher.model.run_decoder(
            fusion.with_start_token(tokens, words.dec), mask, job.teacher.model.run_image(batch.image).states, maps=True
        )
    by_hand = sum(layer[2, head, 1, 1:] for layer in made.cross_attention for head in range(layer.shape[1])) / (
        len(made.cross_attention) * made.cross_attention[0].shape[1]
    )
    torch.testing.assert_close(maps[2, 1].float(), by_hand, atol=1e-3, rtol=1e-2)


def test_weights_change_in_mid_run_and_foreign_terms_are_refused(tiny):
    job = job_of(tiny, steps=40, losses="base:1")
    training = start(job, beside=True)
    job.run.control(weights={"decoder_features": 2.0})
    training.join()
    changed = [m for m in job.run.metrics() if m.get("event") == "control"]
    assert changed and changed[0]["weights"] == {"decoder_features": 2.0}
    after = [m for m in job.run.metrics() if "total" in m and m["step"] > changed[0]["step"]]
    assert after and all("decoder_features" in m for m in after)
    student, phase = make_student(job)[0], Phase("student", "distil", 2)
    learner = BlipLearner(student.model, student, job.tasks, job.options)
    objective = dlip_objective(job.options, job.teacher, student, job.tasks)
    loop = Loop(Run(job.run.folder / "trial"), phase, learner, objective, job.options, make_accelerator(job.options), job.teacher)
    with pytest.raises(ValueError, match="affinity_mimicking is a term of two towers"):
        trainers.change(loop, {"weights": {"affinity_mimicking": 1.0}})
    assert "affinity_mimicking" not in loop.objective.weights


def test_what_is_distilled_of_the_fusion_reads_questions_too():
    objective = dlip.Objective({}, *(replace(term, weight=float(term.name == "fusion_features")) for term in blip_terms()))
    assert blip_learner.needed_tasks(objective, TASKS) == ("retrieval", "matching", "answering")
    assert blip_learner.needed_tasks(objective, ("answering",)) == ("answering",)


def test_the_student_to_look_at_is_not_the_one_it_is_compared_with(tiny):
    job = job_of(tiny, compare_scratch=True, steps=2)
    train(job)
    weights = lambda stage: load_blip(job.run.folder / stage / "student", "cpu").model.state_dict()  # noqa: E731
    for given, stage in (({}, "student"), (dict(stage="scratch"), "scratch")):
        found = current_student(job.run, **given).model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in weights(stage).items()), stage


def test_a_stopped_job_has_a_student_to_look_at(tiny):
    job = job_of(tiny, steps=500)
    training = start(job, beside=True)
    found = current_student(job.run)
    job.run.control(stop=True)
    assert training.join() == "stopped"
    assert isinstance(found, fusion.Blip) and fusion.write_captions(found, job.probe.image[:1], longest=4)


@pytest.mark.parametrize("task", ["captioning", "answering", "retrieval"])
def test_a_published_teacher_teaches_what_it_has(task, tiny, tiny_blip, tmp_path):
    fusion.export_blip(load_blip(tiny_blip, "cpu"), tmp_path / "out", task)
    job = job_of(tiny, teacher=str(tmp_path / "out"), steps=2)
    train(job)
    wanted = {"captioning": ("captioning",), "answering": ("answering",), "retrieval": ("retrieval", "matching")}[task]
    assert job.tasks == wanted and load_blip(job.run.folder / "student" / "student", "cpu").tasks == wanted
    line = [m for m in job.run.metrics() if "total" in m][-1]
    assert ("decoder_logits" in line) == (task != "retrieval") and ("similarities" in line) == (task == "retrieval")
    with pytest.raises(ValueError, match="is not computed for"):
        job_of(
            tiny,
            teacher=str(tmp_path / "out"),
            out=str(tmp_path / "no"),
            losses="base:1, decoder_logits:1" if task == "retrieval" else "base:1, text_features:1",
        )


def test_a_teacher_from_nothing_learns_and_can_be_trained_on(tiny, tmp_path):
    given = {name: tiny[name] for name in ("data", "val", "device", "batch_size", "validate_every", "validate_pairs", "queue")}
    small = dict(
        sizes="image:1x32, text:1x32, fusion:1, decoder:1", image_size=32, head_width=16, joint_width=8, context_length=24, warmup=2
    )
    job = open_blip_training(check_parameters(BlipTraining, given | small | dict(steps=9, out=str(tmp_path / "first"))))
    train(job)
    scores = [m for m in job.run.metrics() if m.get("event") == "validation"]
    assert scores[-1]["caption_loss"] < scores[0]["caption_loss"] and job.tasks == tuple(TASKS)
    with pytest.raises(ValueError, match="sizes='image:6x32' is not valid: .* all of them"):
        open_blip_training(check_parameters(BlipTraining, given | dict(sizes="image:6x32", out=str(tmp_path / "no"))))
    made = tmp_path / "first" / "teacher" / "student"
    again = open_blip_training(check_parameters(BlipTraining, given | dict(start_from=str(made), steps=1, out=str(tmp_path / "second"))))
    assert again.teacher.shape == load_blip(made, "cpu").shape
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.teacher.model.state_dict().values(), load_blip(made, "cpu").model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(losses="decoder_logit:1"), "no term or group 'decoder_logit'"),
        (dict(losses="affinity_mimicking:1"), "no term or group 'affinity_mimicking'"),
        (dict(losses="base"), "write NAME:WEIGHT"),
        (dict(losses="base:0"), "no term has a weight"),
        (dict(losses="base:1, base:2"), "each name once"),
        (dict(losses="base:-1"), "finite numbers from 0 up|is not valid"),
        (dict(student="image:2"), "image:LAYERSxWIDTH"),
        (dict(student="image:2x33"), "multiple"),
        (dict(student="image:3x32"), "deeper|larger"),
        (dict(student_share=0.0), "student_share=0.0 is not valid"),
        (dict(tasks="retrieval, cooking"), "no task 'cooking'"),
        (dict(tasks="matching"), "name both"),
        (dict(teacher="data_samples/teacher"), "config.json"),
        (dict(teacher="no/such-blip"), "no BLIP 'no/such-blip'"),
        (dict(teacher_features="stored"), "teacher_features='stored' is not valid"),
        (dict(batch_size=1), "batch_size=1 is not valid"),
        (dict(batch_size=2, processes=2), "batch_size=2 is 1 a process"),
        (dict(augmentations=4), "augmentations=4 is not valid with crop_scale=1"),
        (dict(features="stored"), "features='stored' is not valid"),
        (dict(image_size=30), "patch_size"),
        (dict(start_from="data_samples/teacher"), "config.json"),
    ],
    ids=str,
)
def test_bad_parameters_stop_before_any_work(changes, said, tiny):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        job_of(tiny, **changes)
    assert not Run(tiny["out"]).metrics()


def test_questions_are_needed_for_answers_only(tiny, tmp_path):
    import tarfile

    write_shards(tmp_path / "plain", 40, 0, split="train", per_shard=40, size=32)
    source = next((tmp_path / "plain").glob("*.tar"))
    bare = tmp_path / "bare" / "train-000000.tar"
    bare.parent.mkdir()
    with tarfile.open(source) as full, tarfile.open(bare, "w") as kept:
        for member in full.getmembers():
            if not member.name.endswith("json"):
                kept.addfile(member, full.extractfile(member))
    job = job_of(tiny, data=str(bare), steps=1)
    assert job.tasks == ("retrieval", "matching", "captioning") and "answering" not in job.run.config()["terms"]
    train(job)
    with pytest.raises(ValueError, match="has no `questions`"):
        job_of(tiny, data=str(bare), tasks="answering", out=str(tmp_path / "no"))
    asking = tmp_path / "bare" / "train-000001.tar"
    asking.write_bytes(source.read_bytes())
    assert "answering" in job_of(tiny, data=f"{bare},{asking}", out=str(tmp_path / "both")).tasks, "questions in a later shard count"
    only = fusion.new_blip(job.teacher.shape, job.teacher.tokenizer, tasks=("answering",))
    with pytest.raises(ValueError, match="the teacher was made for answering"):
        job_of(tiny, data=str(bare), teacher=str(only.save(tmp_path / "only")), out=str(tmp_path / "no"))


def test_the_command_line_starts_and_continues_it_in_two_processes(tiny):
    out = in_two_processes("Dlip", tiny | dict(losses="base:1, image_features:1, similarities:1", keep_snapshots=0, probe_pairs=0))
    assert all(math.isfinite(m["total"]) for m in Run(out).metrics() if "total" in m)
    assert load_blip(out / "student" / "student", "cpu").tasks == tuple(TASKS)


HALF = """
import json, sys
from dataclasses import replace
import torch
from vlkd_lab import trainers
from vlkd_lab.methods import dlip
from vlkd_lab.runs import Run
from vlkd_lab.features import Batch
job = dlip.open_dlip(trainers.check_parameters(dlip.Dlip, json.loads(sys.argv[1])))
rank, world = job.accelerator.process_index, job.accelerator.num_processes
student = dlip.make_student(job)[0]
objective = dlip.dlip_objective(job.options, job.teacher, student, job.tasks)
learner = dlip.BlipLearner(student.model.train(), student, job.tasks, job.options)
phase = trainers.Phase("student", "distil", 6)
loop = trainers.Loop(Run(job.run.folder / "trial"), phase, learner, objective, job.options, job.accelerator, job.teacher)
batch = next(job.val.batches(job.view, batch_size=8))
batch = replace(batch, questions=tuple(asked if k < 3 else () for k, asked in enumerate(batch.questions)))
part = slice(rank * 8 // world, (rank + 1) * 8 // world)
mine = Batch(batch.image[part], batch.text[part], keys=batch.keys[part], captions=batch.captions[part], questions=batch.questions[part])
loop.shares, learner.measured_at = True, 0.0 if rank == 0 else float("inf")  # clocks of processes differ
sums, *_ = learner.learn(loop, mine)
assert abs(sum(learner.gradient_shares.values()) - 1) < 1e-4
if rank == 0:
    grads = {n: p.grad for n, p in student.model.named_parameters()}
    numbers = {name: float(value) for name, value in sums.items()}
    torch.save({"grads": grads, "queue": learner.queue.rows()[0], "sums": numbers}, sys.argv[2])
"""


def test_the_gradient_of_two_processes_is_that_of_one(tiny, tmp_path):
    losses = "image_text_contrast:1, similarities:1, language_modelling:1, answering:1, image:1, text:1, decoder:1"
    (tmp_path / "half.py").write_text(HALF)
    found = []
    for world in (1, 2):
        given = json.dumps(tiny | dict(losses=losses, batch_size=8, out=str(tmp_path / f"of-{world}")))
        forked.run(str(tmp_path / "half.py"), given, str(tmp_path / f"{world}.pt"), processes=world)
        found.append(torch.load(tmp_path / f"{world}.pt", weights_only=True))
    one, two = found
    assert torch.allclose(one["queue"], two["queue"], atol=1e-6), "all processes' pairs enter the queue, in rank order"
    assert one["sums"] == pytest.approx(two["sums"], rel=1e-4)
    for name, whole in one["grads"].items():
        if whole is not None:
            assert (two["grads"][name] - whole).abs().max() <= 1e-3 * max(float(whole.abs().max()), 1e-3), name


def test_the_shipped_shape_of_a_run_folder(tiny):
    job = job_of(tiny)
    config = job.run.config()
    assert config["method"] == "Dlip" and set(config["terms"]) == {term.name for term in blip_terms()}
    assert config["objective"]["fusion_cross_attention"] == 1.0 and json.dumps(config["student"])
    assert Objective({}, *blip_terms()).weights.keys() == config["objective"].keys()
    assert find_blip(job.options.teacher).shape == job.teacher.shape and job.teacher.shape.image_width == TINY_BLIP.image_width
    assert job.view.questions and next(job.batches(0)).questions[0], "questions are read with the pairs"


def test_a_blip_is_no_teacher_for_two_towers_but_can_be_looked_at(tiny_blip, tiny):
    from vlkd_lab.methods.dime_fm import DimeFm, open_dime_fm

    with pytest.raises(ValueError, match="is a BLIP: what is wanted here has two towers"):
        open_dime_fm(check_parameters(DimeFm, dict(teacher=str(tiny_blip), data=tiny["data"], val=tiny["val"], device="cpu")))
    given = dict(teacher=str(tiny_blip), data=tiny["data"], val=tiny["val"], device="cpu")
    with pytest.raises(ValueError, match="is a BLIP"):
        tinyclip.open_tinyclip(check_parameters(tinyclip.TinyCLIP, given))
    assert isinstance(trainers.find_model(tiny_blip, fused=True), fusion.Blip)


@pytest.mark.parametrize("name", ["BlipTraining", "BlipLearner", "open_blip_training", "read_texts", "needed_tasks", "plot_progress"])
def test_what_has_moved_is_found_in_its_former_room_with_a_warning(name):
    room = blip_learner if name in blip_learner.__all__ else sys.modules[BlipTraining.__module__]
    with pytest.warns(DeprecationWarning, match=room.__name__):
        assert getattr(dlip, name) is getattr(room, name)
    with pytest.raises(AttributeError, match="open_blip_trainings"):
        _ = dlip.open_blip_trainings


def test_the_room_of_dlip_brings_the_training_of_a_blip_along():
    "An installation of former times names the entry point `dlip` alone"
    code = "import vlkd_lab.methods.dlip; from vlkd_lab.methods import METHODS; print(*sorted(METHODS.known()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["BlipTraining", "Dlip"]


@pytest.fixture
def of_people(scenes, tmp_path):
    "Shards whose questions have several answers, as VQA's people and as Visual Genome's weights"
    kinds = [lambda a: [a, a, "yes"], lambda a: {a: 0.2}, lambda a: a, lambda a: [a, "red", "blue", a]]
    return asked_otherwise(scenes, tmp_path, lambda k, questions: [[asked, kinds[k % 4](text), kind] for asked, text, kind in questions])


def answers_by_hand(job, answer_loss):
    "The loss of answers of a first step, one word at a time"
    student, batch = make_student(job)[0], next(job.batches(0))
    words, network = student.tokenizer, student.model.eval()
    seed = trainers.seed_of(job.options.seed, "student/distil", 0, 0)
    total, divisor = 0.0, 0.0
    for picture, (key, questions) in enumerate(zip(batch.keys, batch.questions, strict=True)):
        question, given, _ = random.Random(f"{seed} {key}").choice(questions)
        if isinstance(given, str):
            weights = {given: 1.0}
        elif isinstance(given[0], str):
            weights = {text: given.count(text) / len(given) for text in given}
        else:
            weights = dict(given)
        tokens = fusion.with_start_token(words([question]), words.enc)
        mask = tokens != words.pad
        read = network.run_text(tokens, mask, network.run_image(batch.image[[picture]]).states)
        for text, weight in weights.items():
            ids = fusion.with_start_token(words([text]), words.dec)
            ids = ids[:, ids[0] != words.pad]
            shares = network.run_decoder(ids, torch.ones_like(ids).bool(), network.question_states(read), mask).logits[0].log_softmax(1)
            nats = [-0.9 * shares[place, token] - 0.1 * shares[place].mean() for place, token in enumerate(ids[0, 1:].tolist())]
            total += weight * float(sum(nats))
            divisor += weight * len(nats) if answer_loss == "mean" else 0.0
        divisor += 1.0 if answer_loss == "sum" else 0.0
    return total / divisor


@pytest.mark.parametrize("answer_loss", ["mean", "sum"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_answers_are_weighted_and_summed_as_asked(several, answer_loss, tiny, of_people):
    given = tiny | (dict(data=of_people) if several else {})
    job = job_of(given, losses="answering:1, language_modelling:1", answer_loss=answer_loss)
    with torch.no_grad():
        expected = answers_by_hand(job, answer_loss)
    sums, whole, *_ = first_step(job)
    assert sums["answering"] == pytest.approx(expected, rel=1e-4)
    for micro in (2, 5):
        parts, grads, *_ = first_step(job, micro_batch=micro)
        assert parts == pytest.approx(sums, rel=1e-4)
        for name, gradient in whole.items():
            assert (grads[name] - gradient).abs().max() <= 1e-3 * max(float(gradient.abs().max()), 1e-3), name
    train(job)
    lines = [line for line in job.run.metrics() if "total" in line]
    assert len(lines) == 6 and lines[0]["answering"] == pytest.approx(expected, rel=1e-3)


def test_two_processes_sum_answers_as_one(tiny, of_people, tmp_path):
    (tmp_path / "half.py").write_text(HALF)
    found = []
    for world in (1, 2):
        given = tiny | dict(losses="answering:1, language_modelling:1", answer_loss="sum", val=of_people.replace("{000000..000002}", "000000"))
        forked.run(str(tmp_path / "half.py"), json.dumps(given | dict(out=str(tmp_path / f"of-{world}"))), str(tmp_path / f"{world}.pt"), processes=world)
        found.append(torch.load(tmp_path / f"{world}.pt", weights_only=True))
    one, two = found
    assert one["sums"] == pytest.approx(two["sums"], rel=1e-4)
    for name, whole in one["grads"].items():
        if whole is not None:
            assert (two["grads"][name] - whole).abs().max() <= 1e-3 * max(float(whole.abs().max()), 1e-3), name


def test_a_floor_draws_other_hard_negatives_in_a_job(tiny):
    job = job_of(tiny, losses="image_text_matching:1")
    drawn = [first_step(job, negative_floor=floor)[3].negatives for floor in (0.0, 0.0, 1.0)]
    assert all(torch.equal(*sides) for sides in zip(drawn[0], drawn[1], strict=True))
    assert not all(torch.equal(*sides) for sides in zip(drawn[0], drawn[2], strict=True))
    train(job_of(tiny, losses="image_text_matching:1", negative_floor=1e-4, out=f"{tiny['out']}-floor"))
    assert len([line for line in lines_of_run(f"{tiny['out']}-floor") if "total" in line]) == 6


def lines_of_run(folder):
    return Run(folder).metrics()


@pytest.mark.parametrize(
    "changes, said",
    [(dict(answer_loss="total"), "one of 'mean', 'sum'"), (dict(negative_floor=-1.0), "from 0 to 1")],
    ids=str,
)
def test_answers_and_floors_that_cannot_be(changes, said, tiny):
    with pytest.raises(ValueError, match=said):
        job_of(tiny, **changes)


def test_a_blip_is_trained_by_its_papers_own_losses(of_people, scenes, tmp_path):
    given = dict(data=of_people, val=f"{scenes}/val-000000.tar", device="cpu", steps=6, batch_size=8, warmup=1, validate_every=3)
    given |= dict(validate_pairs=12, sizes="image:1x16, text:1x16, fusion:1, decoder:1", image_size=32, head_width=8, vocabulary=200)
    given |= dict(joint_width=8, answer_loss="sum", negative_floor=1e-4, crop_scale=0.5, flip=True, beta2=0.999, learning_rate_floor=1e-5)
    open_ = lambda out: open_blip_training(check_parameters(BlipTraining, given | dict(out=str(out), checkpoint_seconds=0.0)))  # noqa: E731
    job = open_(tmp_path / "whole")
    train(job)
    scored = [line for line in job.run.metrics() if line.get("event") == "validation"]
    assert all(0 <= line["answer_accuracy"] <= 1 for line in scored)
    again = open_(tmp_path / "again")
    again.run.control(stop=True)
    train(again)
    again.run.control(stop=False)
    train(open_(tmp_path / "again"))
    lines = [[line["total"] for line in run.metrics() if "total" in line] for run in (job.run, again.run)]
    assert len(lines[0]) == 6 and lines[0] == lines[1]


def test_a_student_of_crops_learns_what_the_teacher_says_of_whole_pictures(tiny):
    job = job_of(tiny, losses="image_features:1", crop_scale=0.4, flip=True, teacher_sees="whole")
    batch, plain = next(job.batches(0)), next(job_of(tiny, out=f"{tiny['out']}-plain").batches(0))
    assert torch.equal(batch.teacher_image, plain.image) and not torch.equal(batch.image, plain.image)
    student = make_student(job)[0].model
    objective = dlip_objective(job.options, job.teacher, make_student(job)[0], job.tasks)
    project = next(term for term in objective.terms if term.name == "image_features").function.project
    with torch.no_grad():
        rows = project(student.run_image(batch.image).states[:, 0])
        wanted = job.teacher.model.run_image(plain.image).states[:, 0]
        expected = float((1 - torch.nn.functional.cosine_similarity(rows, wanted)).mean())
    sums, *_ = first_step(job)
    assert sums["image_features"] == pytest.approx(expected, rel=1e-4)
    train(job)
