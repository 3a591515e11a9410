"""Signals held back while a run's state changes."""

import contextlib
import os
import signal
import time

import pytest

from konic.finetuning.system.signals import raising_on_signals, stopping_on_signals, uninterrupted


@pytest.fixture
def terminations():
    """How often the process was asked to end."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    yield came
    signal.signal(signal.SIGTERM, before)


def asked(*numbers, done, depth=1, error=None):
    """A block held together that gets signals, notes that it went on, and may end by an error."""
    with contextlib.ExitStack() as blocks:
        for _ in range(depth):
            blocks.enter_context(uninterrupted())
        for number in numbers:
            os.kill(os.getpid(), number)
        done.append("went on")
        if error:
            raise error


def test_signals_wait_and_then_come():
    done = []
    with pytest.raises(KeyboardInterrupt):
        asked(signal.SIGINT, done=done)
    assert done


def test_a_second_ctrl_c_does_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt):
        asked(signal.SIGINT, signal.SIGINT, done=done)
    assert not done


def test_a_termination_ends_the_process_once_the_run_has_ended(terminations):
    with pytest.raises(KeyboardInterrupt), stopping_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert len(terminations) == 1


def test_a_swallowed_termination_is_remembered(terminations):
    with stopping_on_signals() as handler:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert handler.has_come
    assert len(terminations) == 1


def test_a_closed_pipe_is_an_error_within_a_run_and_then_what_the_script_chose():
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        with stopping_on_signals():
            reader, writer = os.pipe()
            os.close(reader)
            with pytest.raises(BrokenPipeError):
                os.write(writer, b"x")
            os.close(writer)
        assert signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGPIPE, before)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_termination_in_a_block_that_fails_is_remembered_and_the_error_goes_on(terminations, depth):
    with stopping_on_signals() as handler:
        with pytest.raises(ValueError, match="of the block"):
            asked(signal.SIGTERM, done=[], depth=depth, error=ValueError("of the block"))
        assert handler.termination is not None
    assert len(terminations) == 1


@pytest.mark.parametrize("answer", ["swallow", "another error"])
def test_a_stop_that_a_block_catches_is_raised_at_its_end(answer):
    @raising_on_signals()
    def caught():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            if answer != "swallow":
                raise ValueError from None

    with pytest.raises(KeyboardInterrupt):
        caught()
    with raising_on_signals():
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("within", [stopping_on_signals, uninterrupted])
def test_a_child_that_a_reward_forks_ends_as_any_program_does(within):
    """`multiprocessing.Pool` ends its children with SIGTERM; a handler of ours would swallow it."""
    with within():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        child = os.fork()
        if child == 0:
            own = [signal.getsignal(number) for number in before]
            is_usual = own == [signal.default_int_handler, signal.SIG_DFL]
            os._exit(0 if is_usual and not signal.pthread_sigmask(signal.SIG_BLOCK, ()) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert {number: signal.getsignal(number) for number in before} == before
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
