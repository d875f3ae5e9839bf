"Tables and folders of pairs as shards: what a row, a file, a column means; what is missing, quoted or changed"

import csv
import json
import os
import shutil
import unicodedata

import pytest
import torch
from PIL import Image

from vlkd_lab import data as D
from vlkd_lab import sources as S


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A project with twelve pictures"
    (tmp_path / "settings.ini").write_text("lib_name = vlkd_lab\n")
    (tmp_path / "set" / "pictures").mkdir(parents=True)
    for k in range(12):
        Image.new("RGB", (8, 8), (k, k, k)).save(tmp_path / "set" / "pictures" / f"p.{k}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path, rows, **options):
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows(rows)
    return str(path)


ROWS = [[f"pictures/p.{k}.png", f"number {k}", k % 3] for k in range(12)]
HEADERS = {
    "open_clip": ["filepath", "title", "cls"],
    "capitals": ["Image", "Caption", "Label"],
    "spaces": [" image path", "Alt-Text", "class id"],
    "marked": ["\ufefffile_name", "text", "label"],
}


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("header", HEADERS)
def test_columns_and_delimiters_of_many_kinds(here, header, delimiter):
    path = table("set/t.csv", [HEADERS[header], *ROWS], delimiter=delimiter)
    pairs = D.load_pairs(path)
    assert pairs.captions == tuple(row[1] for row in ROWS) and pairs.labels == tuple(row[2] for row in ROWS)
    assert [image[0, 0, 0] for image in pairs.images] == list(range(12)) and pairs.keys[3] == "t-000000/pictures/p.3"


@pytest.mark.parametrize("name", ["t.csv", "T.CSV", "t.tsv"])
def test_captions_with_anything_in_them(here, name):
    captions = ['he said "no"', "one, two\tthree; four | five", "first line\nsecond line", "  ", "a\r\nb", "naïve 漢 🐶", "[not a list]"]
    rows = [[f"pictures/p.{k}.png", text] for k, text in enumerate(captions)]
    path = table(f"set/{name}", [["image", "caption"], *rows], delimiter="\t" if "tsv" in name else ",")
    samples = [sample for part in D.find_shards(path) for sample in D.raw_samples(part)]
    read = [json.loads(sample["json"])["captions"] for sample in samples if "json" in sample]
    assert read == [[text] for text in captions if text.strip()]
    assert all(sample["txt"].count(b"\n") == 0 for sample in samples), "a caption a line"
    assert samples[3]["txt"] == b"" and "json" not in samples[3]
    assert dict(D.load_pairs(path).skipped) == {f"{S.Path(path).stem}-000000/pictures/p.3": "caption is empty"}


def test_several_rows_columns_and_lists_are_several_captions_of_a_picture(here):
    path = table("set/t.csv", [["path", "caption_1", "caption_2"], ["pictures/p.0.png", "a", "b"], ["pictures/p.1.png", '["c", "d"]', ""],
                               ["./pictures/p.0.png", "e", "f"]])  # fmt: skip
    first, second = (sample for part in D.find_shards(path) for sample in D.raw_samples(part))
    assert (first["txt"], json.loads(first["json"])) == (b"a\nb\ne\nf", {"captions": list("abef")})
    assert json.loads(second["json"]) == {"captions": ["c", "d"]} and second["__key__"] == "pictures/p.1"


def test_paths_start_at_the_table_or_the_project_or_the_root(here):
    shutil.copy("set/pictures/p.5.png", "alone")
    rows = [["pictures/p.1.png", "a"], ["set/pictures/p.2.png", "b"], [str(here / "set/pictures/p.3.png"), "c"], ["pictures\\p.4.png", "d"],
            ["alone", "e"]]  # fmt: skip
    pairs = D.load_pairs(table("set/t.csv", [["image", "text"], *rows]))
    assert pairs.captions == tuple("abcde") and [image[0, 0, 0] for image in pairs.images] == [1, 2, 3, 4, 5]
    assert len(set(pairs.keys)) == 5


def test_missing_pictures_and_wrong_rows_are_bad_samples(here):
    rows = [*ROWS[:8], ["gone.png", "x", 1], ["pictures/p.9.png", "a caption, with a comma", 1], ["", "of nothing", 1], []]
    with open("set/t.csv", "w") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in [["image", "caption", "class"], *rows])
    report = D.inspect_shards("set/t.csv")
    assert report.total == 10 and report.ignored == {"rows without a picture": 1} and "rows without a picture 1" in str(report)
    pairs = D.load_pairs(report)
    assert len(pairs) == 8 and dict(pairs.skipped) == {
        "t-000000/gone": "gone.png is missing",
        "t-000000/pictures/p.9": "line 11 has 4 fields, its header 3: a caption with a delimiter needs quotes",
    }


def test_a_class_column_counts_when_it_holds_indices(here):
    path = table("set/t.csv", [["image", "caption", "label"], *([*row[:2], "cat"] for row in ROWS)])
    assert set(D.load_pairs(path).labels) == {None}
    assert D.inspect_shards(path).ignored == {"columns of classes that are no indices": 1}


@pytest.mark.parametrize("content, message", [
    ("url,height\nx,3\n", r"t.csv has the columns url, height: a table of pairs needs one of pictures \(filepath, .*captions \(caption"),
    ("", r"has the columns \(none\)"),
    ("image,caption\n", "has no row that names a picture"),
    ("image,caption\nno.png,a\nnot.png,b\n", r"names 2 pictures, and none of them exists \(the first is no.png\): paths start at"),
    ('image,caption\npictures/p.1.png,"never closed\n', "line 2: unexpected end of data; put a caption with quotes"),
    ('image,caption\npictures/p.1.png,"a "b" c"\n', "line 2: ',' expected after"),
])  # fmt: skip
def test_what_is_no_table_of_pairs_is_refused_in_a_line(here, content, message):
    (here / "set" / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        D.find_shards("set/t.csv")
    assert "\n" not in str(error.value) and not list(here.rglob("*.pairs.json"))


def test_text_of_another_encoding(here):
    with pytest.raises(ValueError, match="is UTF-16, not UTF-8"):
        D.find_shards(table("set/t.csv", [["image", "caption"], *ROWS], encoding="utf-16"))
    rows = [["image", "caption"], *([row[0], "café"] for row in ROWS)]
    with pytest.raises(ValueError, match=r"12 of 12 rows cannot be read \(the first at line 2\)"):
        D.find_shards(table("set/t.csv", rows, encoding="latin-1"))
    many = [["image", "caption"], *([row[0], f"{row[1]}, {k}"] for row in ROWS for k in range(5))]
    data = open(table("set/t.csv", many), "rb").read().replace(b"number 4, 0", b"caf\xe9")
    (here / "set/t.csv").write_bytes(data)
    samples = [sample for part in D.find_shards("set/t.csv") for sample in D.raw_samples(part)]
    assert samples[4]["txt"].startswith(b"caf\xe9\n") and "json" not in samples[4] and "json" in samples[5]


def test_parts_follow_the_table_and_its_pictures(here):
    path = table("set/t.csv", [["image", "caption"], *(row[:2] for row in ROWS)])
    report = D.inspect_shards(path)
    stamps = [shard.path.stat().st_mtime_ns for shard in report.shards]
    assert [part.stat().st_mtime_ns for part in D.find_shards(path)] == stamps, "nothing is made twice"
    os.utime(path, ns=(1, 1))
    assert not D.inspect_shards([shard.path for shard in report.shards]).damaged, "touched, and the same"
    assert D.inspect_shards(path).fingerprint == report.fingerprint
    Image.new("RGB", (9, 9)).save("set/pictures/p.3.png")
    assert "files of" in D.inspect_shards([shard.path for shard in report.shards]).damaged[0].problem
    changed = D.inspect_shards(path)
    assert changed.fingerprint != report.fingerprint and not changed.damaged
    table("set/t.csv", [["image", "caption"], *([row[0], "another"] for row in ROWS)])
    assert "was changed since" in D.inspect_shards([shard.path for shard in changed.shards]).damaged[0].problem
    assert D.inspect_shards(path).fingerprint != changed.fingerprint
    copied = shutil.copytree("set", "elsewhere")
    assert D.inspect_shards(f"{copied}/t.csv").fingerprint == D.inspect_shards(path).fingerprint, "wherever it lies"


def test_many_rows_are_many_parts_for_many_readers(here):
    rows = [[f"pictures/p.{k % 12}.png" if k < 12 else f"pictures/copy{k}.png", f"{k}"] for k in range(200)]
    for _, k in rows[12:]:
        os.link("set/pictures/p.0.png", f"set/pictures/copy{k}.png")
    report = D.inspect_shards(table("set/t.csv", [["image", "caption"], *rows]))
    assert report.total == 200 and len(report.shards) == 13
    view = D.View(lambda image: torch.zeros(3, 4, 4), lambda texts: torch.tensor([[int(text)] for text in texts]))
    streams = [D.PairStream(report, view, 20, rank=rank, world_size=5, workers=workers) for rank in range(5) for workers in (0, 2)]
    for workers in (0, 1):
        numbers = [n for stream in streams[workers::2] for batch in [b for _, b in zip(range(2), stream.batches(), strict=False)]
                   for n in batch.text.flatten().tolist()]  # fmt: skip
        assert len(numbers) == 200 and len(set(numbers)) > 150
    whole = [batch.keys for _, batch in zip(range(6), streams[0].batches(), strict=False)]
    assert [next(streams[0].batches(k)).keys for k in range(6)] == whole, "resumed anywhere"


def test_an_index_of_a_table_selects_pictures(here):
    [shard] = D.inspect_shards(table("set/t.csv", [["image", "caption"], *(row[:2] for row in ROWS)])).shards
    D.write_index(here / "kept" / "t.kept.json", shard, ["pictures/p.2", "pictures/p.7"])
    assert D.load_pairs(here / "kept").captions == ("number 2", "number 7")
    assert D.copy_samples(here / "copy" / "t.tar", shard.path, {"pictures/p.2"}) == 1
    assert D.load_pairs(here / "copy").keys == ("t/pictures/p.2",)


# folders


@pytest.fixture
def folder(here):
    for k in range(12):
        (here / "set" / "pictures" / f"p.{k}.txt").write_text(f"number {k}")
    return here / "set"


def test_a_folder_of_pairs(folder):
    (folder / "pictures" / "p.3.txt").unlink()
    (folder / "pictures" / "p.3.json").write_text('{"captions": ["three", "drei"], "cls": 3}')
    (folder / "pictures" / "p.5.cls").write_text("5")
    (folder / "pictures" / "p.6.txt").unlink()
    for name in ("classes.txt", "00000_stats.json", "00000.parquet", ".hidden.png", "x.heic"):
        (folder / name).write_text("x")
    (folder / "x.txt").write_text("of a picture that is not read")
    (folder / "pictures" / "p.7.seg.png").write_bytes(b"x")
    report = D.inspect_shards(folder)
    assert report.total == 13 and len(report.shards) == 1
    assert report.ignored == {"txt without a picture": 1, "json without a picture": 1, "parquet": 1, "seg.png": 1,
                              "heic (a picture format that is not read)": 1}  # fmt: skip
    samples = {sample["__key__"]: sample for sample in D.raw_samples(report.shards[0].path)}
    assert json.loads(samples["pictures/p.3"]["json"])["captions"] == ["three", "drei"] and samples["pictures/p.5"]["cls"] == b"5"
    pairs = D.load_pairs(str(folder))
    assert len(pairs) >= 10 and dict(pairs.skipped)["set-000000/pictures/p.6"] == "no caption"
    assert "no JPEG, PNG or WebP" in dict(pairs.skipped)["set-000000/x"]
    assert D.source_folder(report.shards[0].path) == folder
    (folder / "pictures" / "p.1.txt").write_text("changed")
    assert "were changed" in D.inspect_shards(report.shards[0].path).damaged[0].problem


def test_a_folder_without_captions_or_pictures_says_so(here):
    with pytest.raises(ValueError, match="set holds 12 pictures, and none has a caption: write NAME.txt"):
        D.find_shards("set")
    table("set/t.csv", [["image", "caption"], *(row[:2] for row in ROWS)])
    with pytest.raises(ValueError, match="none has a caption.*; name its table: .*set/t.csv"):
        D.find_shards("set")
    os.makedirs("empty/deep")
    with pytest.raises(FileNotFoundError, match="no shard .* and no picture in this folder; it holds deep/"):
        D.find_shards("empty")
    (here / "set" / "t.zip").touch()
    with pytest.raises(ValueError, match="t.zip is no shard; shards end in .tar, .tar.gz, .tgz, tables in .csv, .tsv"):
        D.find_shards("set/t.zip")


def test_pictures_and_sentences_of_pairs_alone(folder):
    path = table("set/t.csv", [["image", "caption"], *(row[:2] for row in ROWS), ["gone.png", "of a missing picture\nin two lines"]])
    for where, count in ((path, 13), ("set/pictures", 12)):
        sentences = [s["txt"].decode() for part in D.find_sentences(where) for s in D.raw_samples(part)]
        assert len(sentences) == count and sentences[1] in ("number 1", "number 10")
        assert D.inspect_shards(D.find_images(where)).total == count
        assert D.find_sentences(where) == D.find_sentences(where)
    assert "of a missing picture in two lines" in [s["txt"].decode() for part in D.find_sentences(path) for s in D.raw_samples(part)]
    table(path, [["image", "caption"], *([row[0], "another"] for row in ROWS)])
    assert {s["txt"] for part in D.find_sentences(path) for s in D.raw_samples(part)} == {b"another"}
    assert D.load_pairs(D.find_images("set/pictures"), limit=3).captions == ("number 0", "number 1", "number 10")


def test_a_folder_of_texts_and_one_of_pictures_stay_what_they_were(here):
    (here / "set" / "notes.txt").write_text("a\nb\n")
    assert len([s for part in D.find_sentences("set") for s in D.raw_samples(part)]) == 2
    assert D.inspect_shards(D.find_images("set")).total == 12 and D.find_images("set")[0].name.endswith(".files.json")
    (here / "set" / "x.heic").touch()
    assert "heic (a picture format that is not read) 1" in str(D.inspect_shards(D.find_images("set")))


LISTS = {
    "JSON": '["a dog", "it\'s a cat"]', "Python": """['a dog', "it's a cat"]""", "NumPy": """['a dog'\n "it's a cat"]""",
    "tail": """[ 'a dog', 'it\\'s a cat', ]""",
}  # fmt: skip


@pytest.mark.parametrize("form", LISTS)
def test_a_list_in_a_cell_is_several_captions_however_it_was_written(here, form):
    path = table("set/t.csv", [["image", "caption"], ["pictures/p.1.png", LISTS[form]]])
    assert D.load_pairs(path).all_captions == (("a dog", "it's a cat"),)


@pytest.mark.parametrize("text", ["[sign] 'stop'", "['a' + 'b']", "[1, 2]", "['open", "[]", "[" * 5000, "['a', 3]", "[b'a']"])
def test_a_caption_in_brackets_is_no_list(here, text):
    path = table("set/t.csv", [["image", "caption"], ["pictures/p.1.png", text]])
    assert D.load_pairs(path).all_captions == ((text[:2000],),)


def test_classes_that_became_fractions_in_a_data_frame(here):
    rows = [["pictures/p.1.png", "a", "2.0"], ["pictures/p.2.png", "b", ""], ["pictures/p.3.png", "c", "-1.0"]]
    assert D.load_pairs(table("set/t.csv", [["image", "caption", "label"], *rows])).labels == (2, None, None)


def test_accents_in_paths_are_written_in_two_ways(here):
    for number, (on_disk, in_table) in enumerate((("NFC", "NFD"), ("NFD", "NFC"))):
        name = f"é{number}.png"
        shutil.copy("set/pictures/p.1.png", f"set/{unicodedata.normalize(on_disk, name)}")
        path = table(f"set/t{number}.csv", [["image", "caption"], [unicodedata.normalize(in_table, name), "a"]])
        assert D.load_pairs(path).captions == ("a",)


def test_addresses_in_a_table_are_not_fetched(here):
    path = table("set/t.csv", [["image", "caption"], ["https://example.org/a.jpg", "a"]])
    with pytest.raises(ValueError, match="only local files are read; download the pictures first"):
        D.find_shards(path)
