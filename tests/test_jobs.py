"""The job notebooks as a user runs them: through papermill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat.reader import NotJSONError
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from vlkd_lab.balancing import load_clusters
from vlkd_lab.data import load_pairs
from vlkd_lab.fusion import TASKS, load_blip
from vlkd_lab.runs import Run
from vlkd_lab.sent_pages import write_page
from vlkd_lab.trainers import open_job, train

ROOT = Path(__file__).parent.parent


def outputs(notebook):
    "Everything that the executed notebook shows, as text"
    return "\n".join(
        "".join(o.get("text", "")) + json.dumps(o.get("data", {})) for c in notebook.cells if c.cell_type == "code" for o in c.outputs
    )


def execute(name, to, kernel="warm", **parameters):
    notebook = ROOT / "nbs" / f"{name}.ipynb"
    return papermill.execute_notebook(notebook, to, parameters, kernel_name=kernel, cwd=str(to.parent), progress_bar=False)


@pytest.fixture
def given(scenes, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return dict(
        data=f"{scenes}/train-{{000000..000002}}.tar",
        val=f"{scenes}/val-000000.tar",
        teacher=str(tiny_teacher),
        stages=2,
        steps=4,
        batch_size=16,
        device="cpu",
        out=str(tmp_path / "run"),
    )


def a_cluster():
    "Dask with a worker in this process, which has imported what tasks need; a page finds it by its address as any other"
    from distributed import LocalCluster

    return LocalCluster(n_workers=1, threads_per_worker=1, processes=False, protocol="tcp://", dashboard_address=":0", silence_logs=50)


@pytest.fixture
def quick_umap(tmp_path, monkeypatch):
    "A stand-in for UMAP, which takes seconds, where a test asks nothing of it: the first two features"
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "umap.py").write_text("class UMAP:\n    def __init__(self, **settings): ...\n    def fit_transform(self, rows): return rows[:, :2]\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))


def test_the_tinyclip_job_tells_its_story(given, tmp_path):
    notebook = execute("train_tinyclip", tmp_path / "out.ipynb", kernel="python3", **given)
    shown = outputs(notebook)
    for wanted in (
        "teacher",
        "stage-1",
        "stage-2",
        "scratch-2",
        "parameters, M",
        "MMACs per pair",
        "latency",
        "R@10",
        "zero-shot",
        "same caption",
    ):
        assert wanted in shown, wanted
    assert len(re.findall('"image/png"', shown)) >= 6, "pictures that need no kernel"
    assert "widget-view" not in shown and "widgets" not in notebook.metadata
    run = Run(tmp_path / "run")
    assert run.status()["state"] == "finished" and set(run.result()["models"]) == {"teacher", "stage-1", "stage-2", "scratch-2"}
    lines = len(run.metrics())
    execute("train_tinyclip", tmp_path / "again.ipynb", **given)
    assert len(run.metrics()) == lines, "a finished run is shown, not trained again"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(stagez=3), "did you mean 'stages'"),
        (dict(stages="three"), "stages must be int"),
        (dict(target_sparsity=7), "target_sparsity must be float"),
        (dict(inheritance="magic"), "one of 'auto', 'auto_uniform', 'manual', 'mapped', 'none'"),
    ],
)
def test_a_wrong_parameter_stops_the_job_in_one_line(given, tmp_path, wrong, message):
    with pytest.raises(PapermillExecutionError, match=re.escape(message)) as error:
        execute("train_tinyclip", tmp_path / "out.ipynb", **given | wrong)
    assert error.value.ename == "ValueError" and "\n" not in error.value.evalue and not (tmp_path / "run").exists()


def test_the_teacher_job_leaves_a_model(given, tmp_path):
    kept = {k: given[k] for k in ("data", "val", "steps", "batch_size", "device", "out")}
    notebook = execute("train_teacher", tmp_path / "out.ipynb", **kept, image_size=32, vocabulary=300, context_length=24)
    assert (tmp_path / "run/teacher/student/open_clip_config.json").exists() and "image_to_text_r1" in outputs(notebook)
    assert "widget-view" not in outputs(notebook) and "widgets" not in notebook.metadata
    lines = len(Run(tmp_path / "run").metrics())
    execute("train_teacher", tmp_path / "again.ipynb", **kept, image_size=32, vocabulary=300, context_length=24)
    assert len(Run(tmp_path / "run").metrics()) == lines, "a finished model is shown, not trained again"


def test_the_clip_cid_job_tells_its_story_and_its_clusters_can_be_explored(given, tmp_path):
    kept = {k: given[k] for k in ("data", "val", "teacher", "steps", "batch_size", "out")}
    notebook = execute("train_clip_cid", tmp_path / "out.ipynb", **kept, removed_share=0.3, clusters=6, map_images=20)
    shown = outputs(notebook)
    for wanted in ("120 pairs, 84 stay", "cluster_distribution", "removed", "scratch", "R@10", "setting", "mean"):
        assert wanted in shown, wanted
    assert len(re.findall('"image/png"', shown)) >= 4 and "data:image/jpeg" in shown, "pictures that need no kernel"
    run = Run(tmp_path / "run")
    assert run.status()["state"] == "finished" and set(run.result()["models"]) == {"teacher", "student", "scratch"}
    assert str(run.folder / "balance.html") in shown and (run.folder / "balance.html").exists()
    watched = execute("watch_run", tmp_path / "watch.ipynb", run_folder=given["out"])
    assert "nothing was prepared by an engine" in outputs(watched)
    clusters = execute("explore_clusters", tmp_path / "clusters.ipynb", run_folder=given["out"])
    assert "agreement" in outputs(clusters) and '"image/png"' in outputs(clusters)
    chosen = dict(data=given["data"], teacher=given["teacher"], threshold=0.05, write=str(tmp_path / "chosen"))
    balance = execute("explore_balance", tmp_path / "balance.ipynb", **chosen)
    assert "removed" in outputs(balance) and (tmp_path / "chosen" / "balance.json").exists()
    for each in (notebook, clusters, balance):
        assert "widget-view" not in outputs(each) and "widgets" not in each.metadata
    with pytest.raises(PapermillExecutionError, match="would remove everything"):
        execute("train_clip_cid", tmp_path / "wrong.ipynb", **kept | dict(out=str(tmp_path / "wrong"), threshold=1.9, clusters=6))


def test_a_threshold_is_chosen_of_any_number_of_rows(given, tmp_path):
    common = dict(data=given["data"], teacher=given["teacher"], features=str(tmp_path / "features"), largest_threshold=0.5)
    options = dict(linkage=str(tmp_path / "linkage"), report=str(tmp_path / "report.html"), write=str(tmp_path / "chosen"), threshold=0.05)
    first = execute("explore_balance", tmp_path / "local.ipynb", **common, **options, engine="local", engine_workers=1)
    assert (tmp_path / "features" / "store.json").exists() and (tmp_path / "linkage" / "progress.json").exists()
    said = outputs(first)
    assert "all 120 images" in said and "counted over all 120 images" in said and "as a page" in said
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    kept = json.loads((tmp_path / "chosen" / "balance.json").read_text())["kept"]
    assert f"{1 - kept / 120:.1%} of 120 images go at 0.050" in page and "<td>engine</td><td>local</td>" in page
    stamp = (tmp_path / "linkage" / "linkage.safetensors").stat().st_mtime_ns
    again = execute("explore_balance", tmp_path / "again.ipynb", **common | dict(linkage=options["linkage"], threshold=0.05))
    assert (tmp_path / "linkage" / "linkage.safetensors").stat().st_mtime_ns == stamp, "opened, not made again"
    assert f"stay: {kept} of 120" in outputs(again)
    with a_cluster() as cluster:
        dask = dict(engine="dask", engine_address=cluster.scheduler_address, linkage=str(tmp_path / "dask"), threshold=0.05)
        assert f"stay: {kept} of 120" in outputs(execute("explore_balance", tmp_path / "dask.ipynb", **common | dask))
    drawn = [execute("explore_balance", tmp_path / f"s{seed}.ipynb", **common, sample=40, seed=seed, threshold=0.05) for seed in (1, 2)]
    share = 100 * 40 * 39 / (120 * 119)
    for notebook in drawn:
        assert f"a random sample of 40 of 120 images: {share:.3g} % of all pairs" in outputs(notebook) and "all 120 images" not in outputs(notebook)
    figures = [re.search("data:image.png;base64,([A-Za-z0-9+/]+)", outputs(notebook))[1] for notebook in drawn]
    assert figures[0] != figures[1], "another seed draws others"
    for wrong, message in (
        (dict(sample=40, write=str(tmp_path / "lost")), "images that were not drawn would be lost"),
        (dict(engine="local"), "name a folder for the linkage"),
        (dict(engine="ray"), "choose one of memory, local, dask"),
    ):
        with pytest.raises(PapermillExecutionError, match=message):
            execute("explore_balance", tmp_path / "wrong.ipynb", **common | wrong)
    assert not (tmp_path / "lost").exists()


def test_clusters_of_all_images_are_shown_by_a_sample(given, tmp_path, quick_umap):
    common = dict(val=given["data"], teacher=given["teacher"], pairs=30, clusters=4)
    of_sample = execute("explore_clusters", tmp_path / "sample.ipynb", **common)
    assert "on the map: 30 of 120 images" in outputs(of_sample) and "clusters of all" not in outputs(of_sample)
    stored = common | dict(features=str(tmp_path / "features"), clustering=str(tmp_path / "local"))
    made = execute("explore_clusters", tmp_path / "made.ipynb", **stored, engine="local", engine_workers=1)
    assert "4 clusters of all 120 images" in outputs(made) and "on the map: 30 of 120 images" in outputs(made) and "of all" in outputs(made)
    path = tmp_path / "local" / "clusters.safetensors"
    stamp = path.stat().st_mtime_ns
    again = execute("explore_clusters", tmp_path / "again.ipynb", **stored | dict(clusters=9, seed=1))
    assert "4 clusters of all 120 images" in outputs(again) and path.stat().st_mtime_ns == stamp
    with a_cluster() as cluster:
        dask = stored | dict(clustering=str(tmp_path / "dask"), engine="dask", engine_address=cluster.scheduler_address)
        execute("explore_clusters", tmp_path / "dask.ipynb", **dask)
    found = [load_clusters(tmp_path / name / "clusters.safetensors") for name in ("local", "dask")]
    assert found[0].assignment.tolist() == found[1].assignment.tolist() and len(found[0].assignment) == 120
    with pytest.raises(PapermillExecutionError, match="name a folder for them as clustering"):
        execute("explore_clusters", tmp_path / "wrong.ipynb", **common, engine="local")


def test_the_dime_fm_job_tells_its_story_with_and_without_captions(given, tmp_path):
    kept = {k: given[k] for k in ("data", "val", "teacher", "steps", "batch_size", "out")}
    said = [f"sentence {k} about a {'red' if k % 2 else 'blue'} star\n" for k in range(80)] + ["<script>alert(1)</script> on the sea\n"] * 9
    (tmp_path / "said.txt").write_text("".join(said))
    kept |= dict(sentences=str(tmp_path / "said.txt"), sentence_batch=20)
    notebook = execute("train_dime_fm", tmp_path / "out.ipynb", **kept, probe_pairs=8)
    shown = outputs(notebook)
    for wanted in ("vision_language_score", "scratch", "R@10", "zero-shot", "Linear-probe", "noise", "student, step 0", "sentences: "):
        assert wanted in shown, wanted
    pages = "".join("".join(o.data.get("text/html", "")) for c in notebook.cells for o in c.get("outputs", ()) if "data" in o)
    assert "student, step 0" in pages and "<script>alert" not in pages
    assert len(re.findall('"image/png"', shown)) >= 4 and "data:image/jpeg" in shown
    assert "widget-view" not in shown and "widgets" not in notebook.metadata
    run = Run(tmp_path / "run")
    assert run.status()["state"] == "finished" and set(run.result()["models"]) == {"teacher", "student", "scratch"}
    (tmp_path / "seen").mkdir()
    for k, image in enumerate(load_pairs(given["val"]).images[:24]):
        Image.fromarray(image).save(tmp_path / "seen" / f"{k}.png")
    loose = kept | dict(data=str(tmp_path / "seen"), out=str(tmp_path / "loose"), compare_scratch=False, grounded=30)
    shown = outputs(execute("train_dime_fm", tmp_path / "loose.ipynb", **loose))
    assert "30 samples" in shown and "zero-shot" in shown and set(Run(tmp_path / "loose").result()["models"]) == {"teacher", "student"}
    with pytest.raises(PapermillExecutionError, match="have no captions: choose compare_scratch=False"):
        execute("train_dime_fm", tmp_path / "wrong.ipynb", **loose | dict(out=str(tmp_path / "wrong"), compare_scratch=True))


@pytest.mark.parametrize("tasks", ["", "captioning", "retrieval"])
def test_the_dlip_job_tells_its_story(given, tiny_blip, tasks, tmp_path):
    kept = {k: given[k] for k in ("data", "val", "steps", "out")} | dict(teacher=str(tiny_blip), batch_size=8, tasks=tasks)
    notebook = execute("train_dlip", tmp_path / "out.ipynb", **kept, student="image:1x16, text:1x16", validate_pairs=12, probe_pairs=6)
    shown = outputs(notebook)
    for wanted in ("MMACs", "scratch", "run folder", "parameters"):
        assert wanted in shown, wanted
    special = {"CIDEr": "captioning", "decoder_cross_attention": "captioning", "R@10": "retrieval", "answer relation": "answering"}
    for wanted, task in special.items():
        assert (wanted in shown) == (tasks in ("", task)), wanted
    pictures = 4 if tasks == "retrieval" else 5  # a job without words has no maps of them
    assert len(re.findall('"image/png"', shown)) >= pictures and "data:image/jpeg" in shown, "data, plan, bench, words' maps, curves"
    assert "widget-view" not in shown and "widgets" not in notebook.metadata
    run = Run(tmp_path / "run")
    assert run.status()["state"] == "finished" and set(run.result()["models"]) == {"teacher", "student", "scratch"}


def test_the_blip_job_leaves_a_model_that_teaches(given, tmp_path):
    kept = {k: given[k] for k in ("data", "val", "steps", "out", "device")} | dict(batch_size=8, image_size=32, warmup=2)
    small = dict(sizes="image:1x32, text:1x32, fusion:1, decoder:1", head_width=16, joint_width=8, validate_pairs=12, probe_pairs=6)
    shown = outputs(execute("train_blip", tmp_path / "out.ipynb", **kept, **small))
    assert "CIDEr" in shown and "image_text_contrast" in shown and "what colour is" in shown
    made = load_blip(tmp_path / "run" / "teacher" / "student", "cpu")
    assert made.tasks == tuple(TASKS)
    with pytest.raises(PapermillExecutionError, match="cooking"):
        execute("train_blip", tmp_path / "wrong.ipynb", **kept | dict(out=str(tmp_path / "wrong"), tasks="cooking"))


def test_any_method_is_a_job_also_one_that_was_just_installed(given, tmp_path, monkeypatch):
    guide = nbformat.read(ROOT / "nbs" / "guides" / "add_a_method.ipynb", 4)
    names = {}
    for cell in [cell for cell in guide.cells if cell.cell_type == "code"][:3]:
        exec(cell.source, names)
    installed = tmp_path / "installed"
    command = "pip install --quiet --no-deps --no-index --no-build-isolation --target".split()
    subprocess.run([sys.executable, "-m", *command, str(installed), str(names["package"])], check=True, capture_output=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(installed), os.environ.get("PYTHONPATH")))))
    kept = {k: given[k] for k in ("data", "val", "teacher", "steps", "batch_size", "device", "out")}
    notebook = execute("train_method", tmp_path / "out.ipynb", **kept, method="Sharp", settings="sharpness=3; probe_pairs=8")
    shown = outputs(notebook)
    for wanted in ("affinity mimicking with a sharpened teacher", "DIME-FM", "baseline", "sharp_affinity", "R@10", "plain"):
        assert wanted in shown, wanted
    run = Run(given["out"])
    assert run.config()["method"] == "Sharp" and run.config()["parameters"]["sharpness"] == 3.0
    assert run.status()["state"] == "finished" and set(run.result()["models"]) == {"teacher", "sharp", "plain"}
    assert "widget-view" not in shown and "widgets" not in notebook.metadata
    for wrong, message in (("sharpnes=3", "did you mean 'sharpness'"), ("sharpness", "write NAME=VALUE")):
        with pytest.raises(PapermillExecutionError, match=message):
            execute("train_method", tmp_path / "wrong.ipynb", **kept | dict(out=str(tmp_path / "no")), method="Sharp", settings=wrong)
    blip = dict(method="BlipTraining", settings="image_size=32; context_length=24; head_width=16; joint_width=8; queue=16; "
                "sizes=image:1x32, text:1x32, fusion:1, decoder:1", batch_size=8)
    with pytest.raises(PapermillExecutionError, match="has scores of other kinds than this page shows: train_"):
        execute("train_method", tmp_path / "wrong.ipynb", **kept | dict(out=str(tmp_path / "blip")) | blip)
    alone = kept | dict(out=str(tmp_path / "alone"), method="Contrastive", settings="image_size=32; vocabulary=300; context_length=24")
    assert "R@10" in outputs(execute("train_method", tmp_path / "alone.ipynb", **alone))


def test_a_warm_kernel_would_show_a_progress_bar_that_leaves_a_widget(tmp_path):
    "So that its outputs can be searched for widgets as those of any kernel"
    cell = nbformat.v4.new_code_cell("from tqdm.auto import tqdm\nlist(tqdm(range(3)))")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, kernel_name="warm", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "widget-view" in outputs(notebook)


def test_papermill_lists_the_parameters():
    command = [forked.python(), "-m", "papermill", "--help-notebook", str(ROOT / "nbs/train_tinyclip.ipynb")]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    names = "stages target_sparsity inheritance teacher student data val steps batch_size learning_rate seed precision device workers"
    for name in [*names.split(), "compare_scratch", "out"]:
        assert re.search(rf"^\s+{name}: \w+ \(default .*\)", shown, re.M), name


def test_the_bench_notebooks_show_a_finished_run_without_a_page(given, tmp_path, quick_umap):
    given |= dict(compare_scratch=False, stages=1, steps=12)
    other = given | dict(learning_rate=2e-3, out=str(tmp_path / "other"))
    for parameters in (given, other):
        train(open_job("TinyCLIP", parameters))
    watched = execute("watch_run", tmp_path / "watch.ipynb", run_folder=given["out"], others=other["out"])
    shown = outputs(watched)
    assert '"image/png"' in shown and "learning_rate" in shown and "0.002" in shown and "waiting" in shown
    gates = execute("explore_gates", tmp_path / "gates.ipynb", run_folder=given["out"])
    assert "MMACs" in outputs(gates) and "data:image/png" in outputs(gates)
    affinity = execute("explore_affinity", tmp_path / "affinity.ipynb", run_folder=given["out"], pairs=16)
    assert "mended since the cut" in outputs(affinity) and "data:image/jpeg" in outputs(affinity)
    clusters = execute("explore_clusters", tmp_path / "clusters.ipynb", val=given["val"], teacher=given["teacher"], clusters=4, pairs=24)
    assert '"image/png"' in outputs(clusters) and "samples" in outputs(clusters)
    for notebook in (watched, gates, affinity, clusters):
        assert "widget-view" not in outputs(notebook) and "widgets" not in notebook.metadata
        page = HTMLExporter().from_notebook_node(notebook)[0]
        assert page.count("data:image/") >= 1, "an exported page has its pictures"
    with pytest.raises(PapermillExecutionError, match="is no run folder"):
        execute("watch_run", tmp_path / "wrong.ipynb", run_folder=str(tmp_path / "nowhere"))


def on_disk(path):
    "The notebook as papermill has saved it last: (text of the bench's output, its picture, outputs of the cell that trains)"
    notebook = nbformat.read(path, 4)
    (bench,) = (cell for cell in notebook.cells if cell.source.startswith("bench = attach("))
    (training,) = (cell for cell in notebook.cells if "training = start(job)" in cell.source)
    data = bench.outputs[0].data if bench.get("outputs") else {}
    return data.get("text/plain", ""), data.get("image/png"), training.get("outputs", [])


def wait_for(find, papermill_process, seconds=300):
    end = time.monotonic() + seconds
    while not (value := find()):
        assert time.monotonic() < end and papermill_process.poll() is None
        time.sleep(0.2)
    return value


DRAWS_OFTEN = "import vlkd_lab.widgets.bench\nvlkd_lab.widgets.bench.REDRAW_SHARE = 0.5  # of the time, and not 0.05"


def test_a_long_job_leaves_a_notebook_that_is_readable_while_it_runs_and_after_it_died(given, tmp_path):
    out, page = tmp_path / "out.ipynb", tmp_path / "train_tinyclip.ipynb"
    notebook = nbformat.read(ROOT / "nbs" / "train_tinyclip.ipynb", 4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(DRAWS_OFTEN))
    nbformat.write(notebook, page)
    parameters = given | dict(steps=100_000, stages=1, checkpoint_seconds=1.0)
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [forked.python(), "-m", "papermill", str(page), str(out), "--cwd", str(tmp_path)]
    command += ["--kernel", "warm", "--autosave-cell-every", "1", "--no-progress-bar", *words]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors)
    try:

        def seen():
            try:
                text, picture, training = on_disk(out)
            except (FileNotFoundError, NotJSONError):  # papermill writes it at this moment
                return None
            return picture and "step: " in text and training and (text, picture)

        first = wait_for(seen, process)
        later = wait_for(lambda: (now := seen()) and now[1] != first[1] and now, process)
        steps = [int(re.search(r"step: (\d+)", text)[1]) for text, _ in (first, later)]
        assert steps[0] < steps[1] and "time left" in later[0]
        os.kill(Run(given["out"]).status()["process"], signal.SIGKILL)
        assert process.wait(120) != 0
    finally:
        process.kill()
        process.wait()
    text, picture, training = on_disk(out)
    assert picture and int(re.search(r"step: (\d+)", text)[1]) >= steps[1], "how far it came, and its newest picture"
    assert "goes on from its last checkpoint" in text and given["out"] in text and "as of 20" in text
    lines = [output for output in training if output.output_type == "display_data"]
    assert len(lines) <= 2 and len(json.dumps(training)) < 20_000, "progress replaces itself"
    assert out.stat().st_size < 600_000


def cell_with(notebook, text):
    "Place of the only cell of code with a text"
    places = [k for k, c in enumerate(notebook.cells) if c.cell_type == "code" and text in c.source]
    assert len(places) == 1, text
    return places[0]


@pytest.fixture(scope="module")
def clip_cid_notebook(scenes, tiny_teacher, tmp_path_factory):
    "The executed notebook of a small CLIP-CID job"
    folder = tmp_path_factory.mktemp("clip_cid")
    given = dict(data=f"{scenes}/train-{{000000..000002}}.tar", val=f"{scenes}/val-000000.tar", teacher=str(tiny_teacher), features="features")
    given |= dict(steps=4, batch_size=16, removed_share=0.3, clusters=6, map_images=20, out=str(folder / "run"))
    return execute("train_clip_cid", folder / "out.ipynb", **given)


def test_an_executed_notebook_opens_with_its_result(clip_cid_notebook):
    place = cell_with(clip_cid_notebook, "headline = Headline()")
    assert place <= 5 and place < cell_with(clip_cid_notebook, "notebook_parameters(")
    (output,) = clip_cid_notebook.cells[place].outputs
    page = output.data["text/html"]
    assert "finished" in page and "latency, ms a pair" in page and "R@10" in page and "no result yet" not in page


def test_the_bench_stands_before_what_takes_long(clip_cid_notebook):
    bench = cell_with(clip_cid_notebook, "bench = attach(")
    for later in ("job.store, job.linkage", "job.clusters", "start(job)"):
        assert bench < cell_with(clip_cid_notebook, later), later
    for page, later in (("train_dime_fm", "job.source"), ("train_tinyclip", "show_batch("), ("train_dlip", "make_student("), ("train_method", "show_batch(")):
        notebook = nbformat.read(ROOT / "nbs" / f"{page}.ipynb", 4)
        cells = [k for k, c in enumerate(notebook.cells) if c.cell_type == "code" and later in c.source and "import" not in c.source]
        assert cell_with(notebook, "bench = attach(") < min(cells), page


def test_options_are_a_table_in_an_executed_notebook(clip_cid_notebook):
    (output,) = clip_cid_notebook.cells[cell_with(clip_cid_notebook, "notebook_parameters(")].outputs
    above, _, folded = output.data["text/html"].partition("<details>")
    assert "removed_share" in above and "0.3" in above and "cluster_margin" not in above and "cluster_margin" in folded


def test_an_executed_notebook_holds_its_runs_time_line_and_becomes_a_page(clip_cid_notebook, tmp_path):
    (output,) = clip_cid_notebook.cells[cell_with(clip_cid_notebook, "timeline(job.run.folder)")].outputs
    assert output.data["text/plain"].startswith("time line of run, 5 moments") and "widget" not in "".join(output.data)
    nbformat.write(clip_cid_notebook, tmp_path / "out.ipynb")
    page = write_page(tmp_path / "out.ipynb").read_text(encoding="utf-8")
    assert page.count("<iframe") == 1 and "clusters/student" in page and "CLIP-CID" in page
    assert not re.search(r"<script|src=.(?!data:)|<link", page), "nothing is loaded, and nothing runs outside the frame"


@pytest.mark.parametrize("page", ["train_tinyclip", "train_dime_fm", "train_clip_cid", "train_dlip", "train_method", "train_teacher", "train_blip"])
def test_every_job_notebook_has_a_place_for_its_result_and_fills_it(page):
    notebook = nbformat.read(ROOT / "nbs" / f"{page}.ipynb", 4)
    assert cell_with(notebook, "headline = Headline()") <= 5 and cell_with(notebook, "headline.show(") > cell_with(notebook, "when_trained(")


STOPPED = """
import time
from vlkd_lab.trainers import Training, train
training = Training(job, train)
training._thread.start()
while training.alive and not any("total" in line for line in job.run.metrics()):
    time.sleep(0.01)
job.run.control(stop=True)
training._thread.join()
assert job.run.status()["state"] == "stopped"
"""


@pytest.mark.parametrize("page", ["train_tinyclip", "train_teacher", "train_blip"])
def test_a_run_that_was_stopped_at_its_first_step_can_be_evaluated(page, given, tmp_path):
    "The button below a stopped training offers it; no stage has a plan or a student then"
    notebook = nbformat.read(ROOT / "nbs" / f"{page}.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("training = start(job)", STOPPED).replace("retrieve(current_student(job.run), job.val, queries=4)", "")
    nbformat.write(notebook, tmp_path / f"{page}.ipynb")
    if page != "train_tinyclip":
        del given["stages"], given["teacher"]
    small = {"sizes": "image:2x32, text:2x32, fusion:1, decoder:1", "warmup": 2} if page == "train_blip" else {}
    told = papermill.execute_notebook(
        tmp_path / f"{page}.ipynb", tmp_path / "out.ipynb", {**given, **small, "steps": 200}, kernel_name="warm", cwd=str(tmp_path), progress_bar=False
    )
    assert "stopped" in outputs(told) and "no result yet" not in outputs(told)


def test_make_lab_opens_getting_started():
    assert re.search(r"^lab:.*\n\t.*jupyter lab nbs/getting_started\.ipynb$", (ROOT / "Makefile").read_text(), re.M)
