import pytest

from keras_edifice.backends import child

ECHO = """
import json, sys
for line in sys.stdin:
    job = json.loads(line)
    print("noise of an import")
    print('keras_edifice reply: ' + json.dumps(job.get("answer", {})), flush=True)
"""


@pytest.fixture(autouse=True)
def no_other_children(monkeypatch):
    monkeypatch.setattr(child, "_children", {})
    yield
    child.close_all()


def test_one_process_answers_every_job_amid_noise(monkeypatch):
    monkeypatch.setattr(child, "START", ECHO)
    child.request("jax", "first")
    process = child._children["jax"]
    child.request("jax", "second")
    assert child._children["jax"] is process


def test_failed_job_raises_its_reason_and_the_process_goes_on(monkeypatch):
    monkeypatch.setattr(child, "START", ECHO)
    with pytest.raises(RuntimeError, match="no such layer"):
        child.request("jax", "export", answer={"error": "no such layer"})
    process = child._children["jax"]
    child.request("jax", "export")
    assert child._children["jax"] is process


def test_end_of_the_process_is_told_and_the_next_job_starts_another(monkeypatch):
    dying = "import sys; sys.stdin.readline(); sys.exit('out of memory')"
    monkeypatch.setattr(child, "START", dying)
    with pytest.raises(RuntimeError, match="jax process ended .* 1: out of memory"):
        child.request("jax", "export")
    monkeypatch.setattr(child, "START", ECHO)
    child.request("jax", "export")
    assert child._children["jax"].alive


def test_process_that_ended_between_jobs_is_replaced(monkeypatch):
    monkeypatch.setattr(child, "START", ECHO)
    child.request("jax", "export")
    child._children["jax"]._process.kill()
    child._children["jax"]._process.wait()
    child.request("jax", "export")
    assert child._children["jax"].alive


def test_interrupted_job_does_not_answer_the_next_one(monkeypatch):
    monkeypatch.setattr(child, "START", ECHO)
    child.request("jax", "export")
    interrupted = child._children["jax"]
    with monkeypatch.context() as context:
        context.setattr(child.json, "loads", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            child.request("jax", "export")
    assert not interrupted.alive
    child.request("jax", "export")


def _interrupt(*_):
    raise KeyboardInterrupt
