"""`konic report --watch`: who gets the page, when it changes, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection

import pytest
from test_report import HOSTILE, evaluation, make_run, metrics

import warm
from command import konic_here
from konic.report import watch
from konic.report.watch import LivePage, Server


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def server(run):
    with Server(LivePage([run]), 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(server, path=None, method="GET", host=None, **headers):
    """The status, the headers and the text of an answer."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, server.path if path is None else path, skip_host=True)
    for name, value in {"Host": f"127.0.0.1:{server.server_port}" if host is None else host, **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.headers), answer.read().decode()
    connection.close()
    return found


def state(server):
    return json.loads(ask(server, f"{server.path}state")[2])["state"]


def go_on(run, iteration, **others):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics(iteration, 0.4, **others)) + "\n")


def test_the_page_goes_only_to_this_machine_and_to_who_knows_its_token(server):
    here = f"127.0.0.1:{server.server_port}"
    assert server.server_address[0] == "127.0.0.1"
    assert len(server.path) >= 32 and server.path in server.url
    assert [ask(server)[0], ask(server, host=f"localhost:{server.server_port}")[0]] == [200, 200]
    assert ask(server, Origin=f"http://{here}")[0] == 200
    for path in ("/", "/state", "/run.json", server.path[:-1], f"{server.path}?", f"{server.path}../run.json",
                 f"{server.path}run.json", f"/{'x' * 32}/", "/%e9", f"{server.url}"):  # fmt: skip
        assert ask(server, path)[::2] == (404, ""), path
    for host in (
        "",
        "127.0.0.1",
        "localhost",
        f"evil.example:{server.server_port}",
        f"127.0.0.1:{1}",
        f"{here}.evil.example",
    ):
        assert ask(server, host=host)[::2] == (403, ""), host
    for origin in ("http://evil.example", "null", f"https://{here}", f"http://localhost:{server.server_port}", ""):
        assert ask(server, Origin=origin)[::2] == (403, ""), origin
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "<b>"):
        assert ask(server, method=method)[::2] == (403, ""), method
    status, headers, text = ask(server, method="HEAD")
    assert (status, text) == (200, "") and int(headers["Content-Length"]) > 10_000


def test_the_served_page_asks_only_its_own_server_and_is_kept_and_framed_by_nobody(server, run):
    evaluation(run, 0, [0.0])
    evaluation(run, 3, [1.0], [HOSTILE])
    _, headers, text = ask(server)
    assert "connect-src 'self'" in text and "default-src 'none'" in text and "<script>alert(1)" not in text
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert headers["Cache-Control"] == "no-store" and headers["Server"] == "konic"
    assert 'href="final/' not in text
    (run / "final").mkdir()
    assert 'href="final/' not in ask(server)[2] and "final/: 0.3 at" in ask(server)[2]


def test_the_page_follows_the_run(server, run):
    before = state(server)
    assert f'content="{before}"' in ask(server)[2] and state(server) == before
    go_on(run, 4)
    assert state(server) != before
    assert "4 iterations" in ask(server)[2] and f'content="{state(server)}"' in ask(server)[2]


def test_a_page_is_made_once_for_each_change(server, run, monkeypatch):
    made = []
    monkeypatch.setattr(watch, "render", lambda runs, folder, state: made.append(state) or "a page")
    go_on(run, 4)
    assert {ask(server)[2] for _ in range(3)} == {"a page"} and len(made) == 1


def test_a_half_written_file_keeps_the_last_page_until_it_has_settled(server, run, monkeypatch):
    evaluation(run, 0, [0.0])
    evaluation(run, 3, [1.0])
    last = ask(server)[2]
    assert "The same prompts before and after" in last
    path = run / "evaluations" / "000003.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    go_on(run, 4)
    assert ask(server)[2] == last
    path.write_bytes(whole)
    assert "4 iterations" in ask(server)[2]
    path.write_bytes(whole[: len(whole) // 3])
    monkeypatch.setattr(watch, "SETTLED", 0.0)
    assert "evaluations/000003.parquet is left out" in ask(server)[2]


def test_a_run_that_goes_away_or_breaks_the_page_keeps_the_last_one(server, run, monkeypatch, capsys):
    last = ask(server)[2]
    run.rename(run.parent / "moved")
    assert ask(server)[2] == last
    (run.parent / "moved").rename(run)
    monkeypatch.setattr(watch, "render", lambda *_: 1 / 0)
    go_on(run, 4)
    assert [ask(server)[2], ask(server)[2]] == [last, last]
    assert capsys.readouterr().err.count("division by zero") == 1


def test_a_run_without_an_iteration_is_waited_for(tmp_path):
    run = make_run(tmp_path / "<b>", [])
    page = LivePage([run])
    assert "&lt;b&gt; has not finished an iteration yet" in page.html() and 'http-equiv="refresh"' in page.html()
    go_on(run, 1)
    assert "1 iteration<" in page.html()
    assert "other has not finished an iteration yet" in LivePage([run, make_run(tmp_path / "other", [])]).html()


def test_what_is_no_run_and_a_port_in_use_are_one_error(run, tmp_path):
    failed = konic_here("report", tmp_path, "--watch")
    assert failed.returncode == 1 and "has no run.json" in failed.stderr
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        failed = konic_here("report", run, "--watch", "--port", port)
    assert failed.returncode == 1 and f"Port {port} is in use by another program. Give another --port" in failed.stderr
    for options in (["--port", "80"], ["--watch", "--output", "page.html"], ["--watch", "--port", "70000"]):
        assert konic_here("report", run, *options).returncode == 2


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as a signal")
@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_ends_it_without_a_traceback(run, again):
    at_exit = "atexit.register(signal.raise_signal, signal.SIGINT); " * again  # while Python ends
    code = f"import atexit, signal; {at_exit}from konic.cli import main; main()"
    with warm.Popen([sys.executable, "-c", code, "report", run, "--watch"], stderr=subprocess.PIPE, text=True) as it:
        told = next(line for line in it.stderr if line.startswith("Open http://127.0.0.1:"))
        time.sleep(0.2)
        it.send_signal(signal.SIGINT)
        rest = it.stderr.read()
    assert it.returncode == (-signal.SIGINT if again else 130) and rest == "", told + rest  # a shell says 130 to both
    assert not (run / "report.html").exists()
