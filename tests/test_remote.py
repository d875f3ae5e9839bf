"Shards behind URLs: an S3 server with faults, web servers of two kinds, and what must never leave a machine"

import http.client
import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from urllib.parse import unquote, urlsplit

import fsspec
import pytest
import torch
from conftest import tar
from test_reading import members
from torchvision import transforms as T

from vlkd_lab import data as D
from vlkd_lab import remote, trainers
from vlkd_lab.data import archives
from vlkd_lab.pixels import as_floats
from vlkd_lab.runs import Run

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
VIEW = D.View(T.Compose([T.Resize((8, 8)), T.ToTensor()]), lambda captions: torch.tensor([[len(caption)] for caption in captions]))


class Door(BaseHTTPRequestHandler):
    "Hands requests on to a server behind it, and lets things go wrong on the way"

    protocol_version = "HTTP/1.1"

    def handle_one_request(self):
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = unquote(urlsplit(self.path).path).rpartition("/")[2]
        is_content = self.command == "GET" and name.endswith(".tar")
        with server.lock:
            server.requests.append((self.command, name))
            server.content += is_content
            number = server.content
        if name in server.gone or is_content and number in server.fails:
            return self.answer(503 if name in server.gone else 500, {}, b"<Error><Code>InternalError</Code></Error>")
        onward = http.client.HTTPConnection("127.0.0.1", server.behind)
        onward.request(self.command, self.path, body, dict(self.headers))
        reply = onward.getresponse()
        content = reply.read()
        onward.close()
        server.bytes[name] = server.bytes.get(name, 0) + len(content) * (self.command == "GET")
        if is_content and number in server.breaks:
            self.answer(reply.status, dict(reply.headers), content, content[: len(content) // 2])
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.answer(reply.status, dict(reply.headers), content)

    def answer(self, status, headers, content, sent=None):
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if sent is None else sent)

    def log_message(self, *_):
        pass


@contextmanager
def serving(handler, **about):
    "A web server on loopback"
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    vars(server).update(about)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    "Ten shards of twelve pairs here and in a bucket: (folder, the door before the server, its settings)"
    moto = pytest.importorskip("moto.server")
    folder = tmp_path_factory.mktemp("bucket") / "here"
    folder.mkdir()
    for shard in range(10):
        tar(folder / f"{shard:05d}.tar", list(members(shard * 12, 12, 4000)))
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": 12}))
    behind = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    behind.start()
    port = behind.get_host_and_port()[1]
    settings = {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
    with serving(Door, behind=port, lock=threading.Lock()) as door, pytest.MonkeyPatch.context() as patch:
        settings["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{door.server_port}"
        for name, value in settings.items():
            patch.setenv(name, value)
        well(door)
        store = fsspec.filesystem("s3")
        store.mkdir("pairs")
        for path in folder.iterdir():
            store.pipe(f"pairs/train/{path.name}", path.read_bytes())
        yield folder, door, settings
    behind.stop()


def well(door, fails=(), breaks=(), gone=()):
    "A server that works but for what is named: requests for shards by number, or files"
    vars(door).update(fails=set(fails), breaks=set(breaks), gone=set(gone), requests=[], bytes={}, content=0)
    remote._LOST.clear()
    remote._block.cache_clear()


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    "A cache of its own, and no long waits"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_WAIT", 0.01)
    monkeypatch.setenv(remote._SETTING, "")
    remote.use_cache(tmp_path / "fetched", 1)
    monkeypatch.setattr(archives, "_CATALOGUES", type(archives._CATALOGUES)())


def batches(where, count=12, **more):
    return list(islice(D.PairStream(where, VIEW, 10, seed=3, shuffle=30, **more).batches(), count))


def same(one, other):
    return len(one) == len(other) and all(
        a.keys == b.keys and torch.equal(as_floats(a.image), as_floats(b.image)) and not (a.skipped or b.skipped)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("where", ["s3://pairs/train/{00000..00009}.tar", "s3://pairs/train/*.tar", "s3://pairs/train/", "s3://pairs/train"])
def test_a_bucket_is_named_as_a_folder_is(bucket, where):
    folder, door, _ = bucket
    well(door)
    report = D.inspect_shards(where)
    assert [shard.name for shard in report.usable] == [f"{n:05d}" for n in range(10)] and report.total == 120
    assert door.content == 0, "the preflight reads no shard"
    assert len([name for kind, name in door.requests if kind == "HEAD"]) <= 4, "names, sizes and versions come with a list"
    assert sum(shard.bytes for shard in report.usable) == sum(path.stat().st_size for path in folder.glob("*.tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_gives_what_a_folder_gives_whatever_goes_wrong_on_the_way(bucket, workers):
    folder, door, _ = bucket
    well(door, fails={1, 4, 5, 9}, breaks={2, 7, 11})
    assert same(batches(str(folder)), batches("s3://pairs/train/*.tar", workers=workers))
    assert door.content > 10 or workers


def test_a_shard_is_fetched_once_by_all_processes_of_a_machine(bucket):
    _, door, _ = bucket
    well(door)
    first = batches("s3://pairs/train/*.tar", workers=3)
    assert door.content == 10
    remote._block.cache_clear()
    assert same(first, batches("s3://pairs/train/*.tar")) and door.content == 10


def test_the_cache_holds_no_more_than_it_may(bucket, tmp_path):
    _, door, _ = bucket
    well(door)
    size = 3 * 60_000  # three shards of ten
    cache = remote.use_cache(tmp_path / "small", size / 1e9)
    first = batches("s3://pairs/train/*.tar", workers=2, count=36)
    assert 0 < size_of_files(cache.folder) <= size
    remote.use_cache(tmp_path / "none", 0)
    remote._block.cache_clear()
    assert same(first, batches("s3://pairs/train/*.tar", count=36)) and size_of_files(tmp_path / "none") == 0


def size_of_files(folder):
    return sum(path.stat().st_size for path in folder.glob("files/*/*/*"))


def test_what_a_server_does_not_give_is_a_bad_shard_with_its_reason(bucket):
    _, door, _ = bucket
    well(door, gone={"00003.tar"})
    report = D.inspect_shards("s3://pairs/train/*.tar")
    assert not report.damaged, "the list of the folder names it"
    stream = D.PairStream(report, VIEW, 10, seed=3, shuffle=30)
    met = list(islice(stream.batches(), 12))
    lost = dict(entry for batch in met for entry in batch.skipped)
    assert lost and all(name.startswith("00003/") and "s3://pairs/train/00003.tar: " in why and "InternalError" in why for name, why in lost.items())
    heads = [name for kind, name in door.requests if name == "00003.tar"]
    assert len(heads) < 60, "a server that was tried in vain is left alone for a while"
    named = D.inspect_shards("s3://pairs/train/{00008..00011}.tar")
    assert [shard.name for shard in named.damaged] == ["00010", "00011"] and named.total == 24
    with pytest.raises(ValueError, match=r"2 of 4 shards are damaged .*00010.tar: not found.*!00010.tar"):
        D.check_split(named)
    with pytest.raises(FileNotFoundError, match="none of 3 can be had; s3://pairs/train/01000.tar: not found"):
        D.find_shards("s3://pairs/train/{01000..01002}.tar")
    with pytest.raises(FileNotFoundError, match="s3://no-such-bucket"):
        D.find_shards("s3://no-such-bucket/{0..2}.tar")


def run_job(out, where, val, steps, **more):
    "A job of a small student from nothing; its totals and a run's folder"
    small = dict(image_size=32, vocabulary=300, context_length=24, device="cpu", batch_size=10, warmup=1, probe_pairs=0, validate_pairs=10)
    trainers.train(trainers.open_job("Contrastive", small | dict(data=where, val=val, steps=steps, out=str(out), shuffle=30) | more))
    return [line["total"] for line in Run(out).metrics() if "total" in line]


def test_a_job_trains_from_a_bucket_with_faults_and_goes_on_from_a_folder(bucket, tmp_path, capfd):
    folder, door, settings = bucket
    well(door, fails={2, 3, 8}, breaks={1, 6})
    kept = dict(workers=1, cache_dir=str(tmp_path / "kept"))
    run_job(tmp_path / "run", "s3://pairs/train/{00000..00007}.tar", "s3://pairs/train/00009.tar", 2, cache_gb=0.0002, **kept)
    assert 0 < size_of_files(tmp_path / "kept") <= 200_000 and not (tmp_path / "fetched" / "files").exists()
    here = [str(folder / "{00000..00007}.tar"), str(folder / "00009.tar")]
    moved = run_job(tmp_path / "run", *here, 4, **kept)
    run_job(tmp_path / "local", *here, 2)
    assert moved == run_job(tmp_path / "local", *here, 4) and len(moved) == 4, "the same pairs, wherever they lay"
    written = "".join(path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*.json*")) + "".join(capfd.readouterr())
    assert "s3://pairs/train" in written and SECRET not in written and settings["AWS_ACCESS_KEY_ID"] not in written


class Signed(SimpleHTTPRequestHandler):
    "A web server without lists and ranges, for whoever has a signature"

    def do_GET(self):
        self.server.requests.append(self.path)
        if "signature=s3cret" not in self.path:
            return self.send_error(403, f"no right to {self.path}")
        super().do_GET()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_a_web_server_without_ranges_and_a_signature_that_nobody_else_reads(bucket, monkeypatch):
    folder = bucket[0]
    pytest.importorskip("aiohttp")

    def handler(*about):
        return Signed(*about, directory=str(folder))

    with serving(handler, requests=[]) as server:
        url = f"http://127.0.0.1:{server.server_port}/{{00000..00003}}.tar"
        monkeypatch.setenv("RIGHT", "signature=wrong")
        with pytest.raises(FileNotFoundError, match="none of 4 can be had; .*403") as refused:
            D.find_shards(f"{url}?$RIGHT")
        assert "wrong" not in str(refused.value) and "$RIGHT" in str(refused.value)
        monkeypatch.setenv("RIGHT", "signature=s3cret")
        local = batches([str(folder / f"{n:05d}.tar") for n in range(4)], 5)
        report = D.inspect_shards(f"{url}?$RIGHT")
        server.requests.clear()
        assert same(local, batches(report, 5))
        fetched = [path.partition("?")[0] for path in server.requests if path.startswith("/0")]
        assert sorted(set(fetched)) == sorted(fetched), "each shard came once, all of it"
        assert "s3cret" not in json.dumps(report.to_json())
        with pytest.raises(ValueError, match="signature=… would be kept in config.json"):
            D.find_shards(f"{url}?signature=s3cret")


def test_thousands_of_shards_are_one_list():
    calls = []

    class Many(fsspec.AbstractFileSystem):
        protocol = "many"
        entries = [{"name": f"many/{number:05d}.tar", "size": 3 * 10**8, "type": "file", "ETag": str(number)} for number in range(4000)]
        sizes = json.dumps({f"{number:05d}.tar": 10_000 for number in range(4000)}).encode()

        def ls(self, path, detail=True, **_):
            calls.append("ls")
            return [*self.entries, {"name": "many/sizes.json", "size": len(self.sizes), "type": "file"}]

        def info(self, path, **_):
            calls.append("info")
            raise FileNotFoundError(path)

        def cat_file(self, path, start=None, end=None, **_):
            calls.append(path)
            return self.sizes[start:end]

    fsspec.register_implementation("many", Many, clobber=True)
    report = D.inspect_shards("many://many/{00000..03999}.tar", cache=False, progress=False)
    assert report.total == 40_000_000 and report.to_json()["total"] == 40_000_000
    assert len(calls) < 7, calls[:9]
    assert {call for call in calls if "." in call} == {"many/sizes.json"}


def test_what_a_package_is_missing_for_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match="gs://bucket/a.tar: .*gcsfs"):
        D.find_shards("gs://bucket/a.tar")
